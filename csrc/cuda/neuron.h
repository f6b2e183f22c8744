// neuron_attribution and neuron_penalty on the device, on the caller's stream and without waiting for it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "ssiuu/types.h"

namespace ssiuu {

// How the tokens of a sample are shared out: a block sums `length` of them, `count` blocks all.
struct TokenSplits {
    std::int64_t count, length;
};

// Splits so that `resident` blocks have work, but never so fine that partial sums (16 bytes a neuron and split) come
// near one percent of the inputs.
TokenSplits split_tokens(const NeuronTensors& tensors, std::int64_t resident);

// Loads the kernels on the current device; throws where it can't run them.
void load_neuron_kernels();

// Bytes needed beside inputs and results.
std::int64_t cuda_neuron_attribution_workspace(const NeuronTensors& tensors, int device);
std::int64_t cuda_neuron_penalty_workspace(const NeuronTensors& tensors, bool per_sample, int device);

// max, min and sum: [batch, neurons] in fp32
void cuda_neuron_attribution(const NeuronTensors& tensors, float* max, float* min, float* sum, void* workspace,
                             int device, cudaStream_t stream);

// reference (or null: there is none yet) and attribution: [batch, neurons] if per_sample, else [neurons]. weight_tensor:
// one fp32 on the device, or null to take weight.
struct NeuronPenaltyArguments {
    const float* reference;
    float* attribution;
    const float* weight_tensor;
    double weight;
    bool per_sample;
    bool one_sided;
};

// tensors.gradient is overwritten. floats[0] receives the penalty (floats[1] is scratch), integers[0] the negatives.
void cuda_neuron_penalty(const NeuronTensors& tensors, const NeuronPenaltyArguments& arguments, void* workspace,
                         double* floats, long long* integers, int device, cudaStream_t stream);

} // namespace ssiuu
