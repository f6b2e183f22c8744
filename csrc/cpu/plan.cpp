#include "plan.h"

#include <algorithm>

namespace ssiuu {
namespace {

constexpr std::int64_t kShortest = 16 * 1024;
// bounds the memory for partial sums: 32 bytes a chunk
constexpr std::int64_t kMostChunks = 4096;
constexpr std::int64_t kGrain = 1024;

std::int64_t chunk_length(std::int64_t elements) {
    const std::int64_t even = (elements + kMostChunks - 1) / kMostChunks;
    return std::max(kShortest, (even + kGrain - 1) / kGrain * kGrain);
}

} // namespace

ChunkPlan::ChunkPlan(const std::vector<std::int64_t>& sizes) : sizes_(sizes) {
    for (std::int64_t size : sizes_) elements_ += size;
    length_ = chunk_length(elements_);
    first_.reserve(sizes_.size() + 1);
    first_.push_back(0);
    for (std::int64_t size : sizes_) first_.push_back(first_.back() + (size + length_ - 1) / length_);
}

Chunk ChunkPlan::operator[](std::int64_t chunk) const {
    const std::int64_t tensor = std::upper_bound(first_.begin(), first_.end(), chunk) - first_.begin() - 1;
    const std::int64_t begin = (chunk - first_[tensor]) * length_;
    return {tensor, begin, std::min(begin + length_, sizes_[tensor])};
}

} // namespace ssiuu
