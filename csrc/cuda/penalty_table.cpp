#include "penalty_table.h"

namespace ssiuu {
namespace {

// The codes of an 8-bit reference are read 8 bytes at a time, all else 16; any tile then starts aligned where its
// tensor does.
bool is_aligned(const void* address, Dtype type) {
    return reinterpret_cast<std::uintptr_t>(address) % (type == Dtype::blockwise8 ? 8 : 16) == 0;
}

bool all_aligned(const PenaltyTensor& tensor) {
    return is_aligned(tensor.gradient, tensor.gradient_type) && is_aligned(tensor.parameter, tensor.parameter_type) &&
           is_aligned(tensor.reference, tensor.reference_type) && is_aligned(tensor.out, tensor.out_type);
}

} // namespace

PenaltyTable penalty_table(const std::vector<PenaltyTensor>& tensors) {
    PenaltyTable table{{}, 0};
    table.rows.reserve(tensors.size());
    for (const PenaltyTensor& tensor : tensors) {
        table.rows.push_back({tensor.gradient, tensor.parameter, tensor.reference, tensor.absmax, tensor.out,
                              tensor.size, table.chunks, std::uint8_t(tensor.gradient_type),
                              std::uint8_t(tensor.parameter_type), std::uint8_t(tensor.reference_type),
                              std::uint8_t(tensor.out_type), tensor.add, all_aligned(tensor)});
        table.chunks += (tensor.size + kChunk - 1) / kChunk;
    }
    return table;
}

} // namespace ssiuu
