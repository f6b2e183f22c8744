// Sums over a warp, a block and all blocks, in an order that depends on the launch alone: no atomics on floats.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace ssiuu {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

// what a block has summed
struct PartialSums {
    double penalty;
    double gradient_square;
    long long negative;
};

__device__ __forceinline__ int lane_index() { return int(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_index() { return int(threadIdx.x) / kWarp; }

// lane 0 receives the sum
template <class Number> __device__ __forceinline__ Number warp_sum(Number x) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_down_sync(kAllLanes, x, offset);
    return x;
}

// thread 0 receives the sum; every thread of the block has to take part
__device__ __forceinline__ PartialSums block_sum(PartialSums own) {
    __shared__ PartialSums warps[kWarps];
    own.penalty = warp_sum(own.penalty);
    own.gradient_square = warp_sum(own.gradient_square);
    own.negative = warp_sum(own.negative);
    if (lane_index() == 0) warps[warp_index()] = own;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < kWarps; ++i) {
            own.penalty += warps[i].penalty;
            own.gradient_square += warps[i].gradient_square;
            own.negative += warps[i].negative;
        }
    }
    return own;
}

// The second stage, run by one block; writes floats[2] = penalty, gradient_square and integers[0] = negative.
static __global__ void __launch_bounds__(kThreads)
    total_kernel(const PartialSums* partial, std::int64_t blocks, double* floats, long long* integers) {
    PartialSums own = {0, 0, 0};
    for (std::int64_t i = threadIdx.x; i < blocks; i += kThreads) {
        own.penalty += partial[i].penalty;
        own.gradient_square += partial[i].gradient_square;
        own.negative += partial[i].negative;
    }
    own = block_sum(own);
    if (threadIdx.x == 0) {
        floats[0] = own.penalty;
        floats[1] = own.gradient_square;
        integers[0] = own.negative;
    }
}

} // namespace ssiuu
