// From the numbers of the flat interface to the structs of the kernels.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "ssiuu/types.h"

namespace ssiuu {

template <class T> T* pointer(std::int64_t address) {
    return reinterpret_cast<T*>(static_cast<std::uintptr_t>(address));
}

// Ten numbers a tensor: addresses of gradient, parameter, reference, out (0: the gradient is overwritten), size,
// dtype codes of the four, address of absmax (0 unless the reference is blockwise8).
constexpr std::size_t kRow = 10;

inline std::vector<PenaltyTensor> penalty_tensors(const std::vector<std::int64_t>& table) {
    if (table.size() % kRow != 0) throw std::invalid_argument("the table must have ten numbers a tensor");
    std::vector<PenaltyTensor> tensors;
    tensors.reserve(table.size() / kRow);
    for (const std::int64_t* row = table.data(); row != table.data() + table.size(); row += kRow) {
        const bool add = row[3] != 0;
        tensors.push_back({pointer<void>(row[0]), pointer<void>(row[1]), pointer<void>(row[2]),
                           pointer<void>(add ? row[3] : row[0]), row[4], Dtype(row[5]), Dtype(row[6]), Dtype(row[7]),
                           Dtype(add ? row[8] : row[5]), add, pointer<float>(row[9])});
    }
    return tensors;
}

// Addresses of hidden, gradient and mask (or 0); batch, tokens, neurons; batch and token strides of hidden, and of
// gradient; dtype code.
using NeuronNumbers = std::array<std::int64_t, 11>;

inline NeuronTensors neuron_tensors(const NeuronNumbers& n) {
    return {pointer<void>(n[0]), pointer<void>(n[1]), pointer<std::uint8_t>(n[2]), n[3], n[4], n[5], n[6], n[7], n[8],
            n[9], Dtype(n[10])};
}

} // namespace ssiuu
