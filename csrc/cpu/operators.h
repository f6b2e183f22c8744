// The operators of the CPU: kernels of the unit in use over chunks and threads.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace ssiuu {

// One pass over all tensors. nonfinite receives one count a tensor.
PenaltySums penalty(const std::vector<PenaltyTensor>& tensors, const PenaltyOptions& options, std::int64_t* nonfinite,
                    int threads);

// max, min and sum over tokens of hidden · gradient.
void neuron_attribution(const AttributionTensors& tensors, int threads);

// The penalty per sample and neuron, or per neuron over the whole batch; the injection is written over the gradient.
NeuronPenaltySums neuron_penalty(const NeuronPenaltyTensors& tensors, const NeuronPenaltyOptions& options,
                                 bool per_sample, int threads);

// The memory traffic of penalty without its arithmetic; all types of a tensor alike. For benchmarks only.
void penalty_traffic(const std::vector<PenaltyTensor>& tensors, int threads);

} // namespace ssiuu
