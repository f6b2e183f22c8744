// Enough of CUDA to run its kernels on a CPU, for tests: blocks one after another, the threads of a block as fibres
// that hand over at barriers and warp collectives. Found instead of the toolkit's header of this name.
//
// A collective that not all lanes of a warp reach ends the process with a message.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static

struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    explicit dim3(unsigned x = 1) : x(x) {}
};

using std::max;
using std::min;

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

constexpr unsigned kWarpSize = 32;
// a launch's arguments, up to 32 KB of them, lie on every fibre's stack
constexpr std::size_t kStack = 192 * 1024;

enum class State { ready, at_collective, at_barrier, done };

struct Fibre {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    State state = State::ready;
    std::uint64_t offered = 0;
};

struct Block {
    std::vector<Fibre> fibres;
    ucontext_t scheduler;
    std::function<void()> body;
    unsigned current = 0;
};

inline Block& block() {
    static Block only;
    return only;
}

[[noreturn]] inline void fail(const char* message) {
    std::fprintf(stderr, "CUDA emulation, block %u: %s\n", blockIdx.x, message);
    std::abort();
}

inline void wait_as(State state) {
    Block& here = block();
    Fibre& own = here.fibres[here.current];
    own.state = state;
    swapcontext(&own.context, &here.scheduler);
}

inline void enter() {
    block().body();
    wait_as(State::done);
}

inline bool open_collectives(Block& here, unsigned threads) {
    bool opened = false;
    for (unsigned warp = 0; warp < threads; warp += kWarpSize) {
        unsigned waiting = 0;
        for (unsigned i = warp; i < warp + kWarpSize; ++i) waiting += here.fibres[i].state == State::at_collective;
        if (!waiting) continue;
        if (waiting < kWarpSize) fail("some lanes of a warp wait in a collective that others never reach");
        for (unsigned i = warp; i < warp + kWarpSize; ++i) here.fibres[i].state = State::ready;
        opened = true;
    }
    return opened;
}

inline void run_block(unsigned threads) {
    Block& here = block();
    if (here.fibres.size() < threads) here.fibres.resize(threads);
    for (unsigned i = 0; i < threads; ++i) {
        Fibre& fibre = here.fibres[i];
        fibre.state = State::ready;
        getcontext(&fibre.context);
        fibre.context.uc_stack.ss_sp = fibre.stack.get();
        fibre.context.uc_stack.ss_size = kStack;
        fibre.context.uc_link = nullptr;
        makecontext(&fibre.context, enter, 0);
    }
    while (true) {
        bool ran = false;
        for (unsigned i = 0; i < threads; ++i) {
            if (here.fibres[i].state != State::ready) continue;
            ran = true;
            here.current = i;
            threadIdx.x = i;
            swapcontext(&here.scheduler, &here.fibres[i].context);
        }
        if (ran) continue;
        // nobody can go on: collectives open first, since those at a barrier may wait for lanes in one
        if (open_collectives(here, threads)) continue;
        bool opened = false;
        for (unsigned i = 0; i < threads; ++i) {
            if (here.fibres[i].state != State::at_barrier) continue;
            here.fibres[i].state = State::ready;
            opened = true;
        }
        if (!opened) return; // all are done
    }
}

// every lane offers a number and receives those of its warp
template <class Number> struct Offered {
    Number of[kWarpSize];
};

template <class Number> Offered<Number> exchange(Number own) {
    static_assert(sizeof(Number) <= 8);
    Block& here = block();
    std::memcpy(&here.fibres[here.current].offered, &own, sizeof own);
    wait_as(State::at_collective);
    Offered<Number> all;
    const unsigned warp = here.current / kWarpSize * kWarpSize;
    for (unsigned lane = 0; lane < kWarpSize; ++lane)
        std::memcpy(&all.of[lane], &here.fibres[warp + lane].offered, sizeof own);
    // nobody offers again before all have read
    wait_as(State::at_collective);
    return all;
}

inline unsigned lane() { return block().current % kWarpSize; }

} // namespace emulated

inline void __syncthreads() { emulated::wait_as(emulated::State::at_barrier); }
inline void __syncwarp() { emulated::wait_as(emulated::State::at_collective); }

template <class Number> Number __shfl_down_sync(unsigned, Number own, int offset) {
    const auto all = emulated::exchange(own);
    const unsigned from = emulated::lane() + unsigned(offset);
    return from < emulated::kWarpSize ? all.of[from] : own;
}

inline unsigned __ballot_sync(unsigned, bool own) {
    const auto all = emulated::exchange(own);
    unsigned bits = 0;
    for (unsigned lane = 0; lane < emulated::kWarpSize; ++lane) bits |= unsigned(all.of[lane]) << lane;
    return bits;
}

inline unsigned __reduce_max_sync(unsigned, unsigned own) {
    const auto all = emulated::exchange(own);
    unsigned most = 0;
    for (unsigned number : all.of) most = number > most ? number : most;
    return most;
}

inline unsigned __reduce_add_sync(unsigned, unsigned own) {
    const auto all = emulated::exchange(own);
    unsigned sum = 0;
    for (unsigned number : all.of) sum += number;
    return sum;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

template <class Number> Number atomicAdd(Number* at, Number more) {
    const Number before = *at;
    *at += more;
    return before;
}

inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// the runtime: one device of three multiprocessors
using cudaStream_t = struct Stream*;
enum cudaError_t { cudaSuccess = 0 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 3, cudaSuccess; }

struct cudaFuncAttributes {};
template <class Kernel> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) { return cudaSuccess; }

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, std::size_t) {
    return *blocks = 1, cudaSuccess;
}

template <class... Parameters, std::size_t... Index>
void call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<Index...>) {
    kernel(*static_cast<std::remove_const_t<Parameters>*>(arguments[Index])...);
}

template <class... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 threads, void** arguments, std::size_t,
                             cudaStream_t) {
    gridDim = grid;
    blockDim = threads;
    emulated::block().body = [=] { call(kernel, arguments, std::index_sequence_for<Parameters...>{}); };
    for (unsigned i = 0; i < grid.x; ++i) {
        blockIdx.x = i;
        emulated::run_block(threads.x);
    }
    return cudaSuccess;
}
