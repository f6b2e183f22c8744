// The list of tensors of a penalty call as the device sees it: rows of a table, and the chunks they are cut into.
// Plain C++, so that its arithmetic is tested where there is no device.
#pragma once

#include <cstdint>
#include <vector>

#include "ssiuu/types.h"

namespace ssiuu {

// A warp handles one chunk at a time, in tiles of as many elements as its lanes hold: a block of an 8-bit reference.
constexpr std::int64_t kTile = 256;
constexpr std::int64_t kChunk = 16 * kTile;

struct PenaltyRow {
    const void* gradient;
    const void* parameter;
    void* reference;
    float* absmax; // of an 8-bit reference
    void* out;     // the gradient itself unless `add`
    std::int64_t size;
    std::int64_t first_chunk; // chunks of the tensors before this one
    std::uint8_t gradient_type, parameter_type, reference_type, out_type; // Dtype
    bool add;
    bool aligned; // accesses of 16 bytes fit all four buffers, of 8 the codes of an 8-bit reference
};
static_assert(sizeof(PenaltyRow) == 64);

struct PenaltyTable {
    std::vector<PenaltyRow> rows;
    std::int64_t chunks; // of all tensors
};

PenaltyTable penalty_table(const std::vector<PenaltyTensor>& tensors);

} // namespace ssiuu
