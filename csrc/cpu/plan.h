// Cuts a list of tensors into chunks. The cut depends on their sizes alone, never on the number of threads:
// a sum formed chunk by chunk then has one order.
#pragma once

#include <cstdint>
#include <vector>

namespace ssiuu {

// Under this many elements waking threads costs more than they save.
constexpr std::int64_t kSerialBelow = 64 * 1024;

struct Chunk {
    std::int64_t tensor, begin, end;
};

class ChunkPlan {
public:
    explicit ChunkPlan(const std::vector<std::int64_t>& sizes);
    std::int64_t count() const { return first_.back(); }
    std::int64_t elements() const { return elements_; }
    Chunk operator[](std::int64_t chunk) const;

private:
    std::vector<std::int64_t> sizes_;
    std::vector<std::int64_t> first_; // number of chunks before each tensor, and of all
    std::int64_t elements_ = 0;
    std::int64_t length_;
};

} // namespace ssiuu
