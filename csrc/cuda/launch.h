// What host code needs of the CUDA runtime: launches on the caller's stream, the size of a grid that fills the
// device, and errors as exceptions with the runtime's own text. Nothing here waits for the device.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace ssiuu {

inline void check(cudaError_t code, const char* doing) {
    if (code != cudaSuccess)
        throw std::runtime_error(std::string("CUDA: ") + doing + ": " + cudaGetErrorString(code) + " (error " +
                                 std::to_string(int(code)) + ")");
}

// The caller has made `device` current in torch's copy of the runtime; this makes it current in ours.
inline void use_device(int device) { check(cudaSetDevice(device), "choosing the device"); }

// Blocks of this kernel that the current device runs at once.
template <class... Parameters> std::int64_t resident_blocks(void (*kernel)(Parameters...), int threads) {
    int device = 0, multiprocessors = 0, blocks = 0;
    check(cudaGetDevice(&device), "asking for the device");
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "counting multiprocessors");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0), "asking for the occupancy");
    return std::int64_t(multiprocessors) * std::max(blocks, 1);
}

// Loads a kernel, which could not be done while a graph is captured; throws where the device has no code of it.
template <class... Parameters> void load(void (*kernel)(Parameters...)) {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel), "loading a kernel");
}

template <class... Parameters>
void launch(void (*kernel)(Parameters...), std::int64_t blocks, int threads, cudaStream_t stream,
            std::common_type_t<Parameters>... arguments) {
    if (blocks == 0) return;
    if (blocks > 0x7fffffff)
        throw std::runtime_error("CUDA: a launch can't have " + std::to_string(blocks) + " blocks");
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
    check(cudaLaunchKernel(kernel, dim3(unsigned(blocks)), dim3(unsigned(threads)), pointers, 0, stream), "launching");
}

} // namespace ssiuu
