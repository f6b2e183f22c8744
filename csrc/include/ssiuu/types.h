// What the kernels of the CPU and of CUDA are handed: tensors as addresses, sizes and dtype codes.
#pragma once

#include <cstdint>

namespace ssiuu {

// blockwise8, for references only: one byte an element, and the tensor's absmax (ssiuu/blockwise8.h)
enum class Dtype : std::int64_t { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3, blockwise8 = 4 };

// One tensor of a penalty call. `out` is the gradient itself unless `add`.
struct PenaltyTensor {
    const void* gradient;
    const void* parameter;
    void* reference;
    void* out;
    std::int64_t size;
    Dtype gradient_type, parameter_type, reference_type, out_type;
    bool add;
    float* absmax; // null unless reference_type is blockwise8
};

struct PenaltyOptions {
    double weight;
    double gradient_scale;
    bool one_sided;
    bool update_references;
    bool first;
};

struct PenaltySums {
    double penalty;
    double gradient_square;
    std::int64_t negative;
    std::int64_t nonfinite;
};

// hidden and gradient [batch, tokens, neurons], strides in elements, the last one 1; mask [batch, tokens] or null.
struct NeuronTensors {
    const void* hidden;
    void* gradient; // neuron_penalty overwrites it
    const std::uint8_t* mask;
    std::int64_t batch, tokens, neurons;
    std::int64_t hidden_batch_stride, hidden_token_stride;
    std::int64_t gradient_batch_stride, gradient_token_stride;
    Dtype type;
};

} // namespace ssiuu
