// Tiles of a tensor in the registers of a warp: 8 elements a lane, in any storage type, to and from fp32. The type is
// looked at when running, the same for the whole warp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "penalty_table.h"
#include "reduce.cuh"
#include "ssiuu/types.h"

namespace ssiuu {

constexpr int kPack = 8;
static_assert(kTile == kWarp * kPack);

__device__ __forceinline__ float bits_to_float(std::uint32_t bits, Dtype type) {
    if (type == Dtype::float32) return __uint_as_float(bits);
    return type == Dtype::bfloat16 ? __uint_as_float(bits << 16) : __half2float(__ushort_as_half(std::uint16_t(bits)));
}

// rounded to nearest, ties to even
__device__ __forceinline__ std::uint32_t float_to_bits(float value, Dtype type) {
    if (type == Dtype::float32) return __float_as_uint(value);
    return type == Dtype::bfloat16 ? __bfloat16_as_ushort(__float2bfloat16_rn(value))
                                   : __half_as_ushort(__float2half_rn(value));
}

// two numbers of 16 bits, the first in the lower half
template <class Pair> __device__ __forceinline__ std::uint32_t word_of(const Pair& pair) {
    static_assert(sizeof(Pair) == sizeof(std::uint32_t));
    return reinterpret_cast<const std::uint32_t&>(pair);
}

__device__ __forceinline__ float load_float(const void* buffer, Dtype type, std::int64_t at) {
    if (type == Dtype::float32) return static_cast<const float*>(buffer)[at];
    return bits_to_float(static_cast<const std::uint16_t*>(buffer)[at], type);
}

// What a lane holds of a tile, not yet converted, so that all loads of a lane are under way before the first is waited
// for. Either eight neighbours as they lie in memory, for accesses of 16 bytes, or one element a word, every 32nd of
// the tile, for any address and for the tile that the tensor ends in.
template <bool Neighbours> struct Pack {
    std::uint32_t word[kPack];

    // place in the tile of element i
    static __device__ __forceinline__ int place(int i) {
        return Neighbours ? lane_index() * kPack + i : lane_index() + i * kWarp;
    }
    __device__ __forceinline__ std::uint32_t code(int i) const {
        return Neighbours ? word[i / 4] >> (i % 4 * 8) & 0xffu : word[i];
    }
    __device__ __forceinline__ void set_code(int i, std::uint32_t code) {
        if (!Neighbours)
            word[i] = code;
        else
            word[i / 4] = (i % 4 ? word[i / 4] : 0) | code << (i % 4 * 8);
    }
    __device__ __forceinline__ void to_floats(Dtype type, float (&values)[kPack]) const {
        if (!Neighbours || type == Dtype::float32) {
#pragma unroll
            for (int i = 0; i < kPack; ++i) values[i] = bits_to_float(word[i], type);
        } else if (type == Dtype::bfloat16) {
#pragma unroll
            for (int i = 0; i < kPack; i += 2) {
                values[i] = __uint_as_float(word[i / 2] << 16);
                values[i + 1] = __uint_as_float(word[i / 2] & 0xffff0000u);
            }
        } else {
#pragma unroll
            for (int i = 0; i < kPack; ++i) values[i] = bits_to_float(word[i / 2] >> (i % 2 * 16) & 0xffffu, type);
        }
    }
    static __device__ __forceinline__ Pack from_floats(const float (&values)[kPack], Dtype type) {
        Pack pack = {};
        if (!Neighbours || type == Dtype::float32) {
#pragma unroll
            for (int i = 0; i < kPack; ++i) pack.word[i] = float_to_bits(values[i], type);
        } else if (type == Dtype::bfloat16) {
#pragma unroll
            for (int i = 0; i < kPack; i += 2)
                pack.word[i / 2] = word_of(__floats2bfloat162_rn(values[i], values[i + 1]));
        } else {
#pragma unroll
            for (int i = 0; i < kPack; i += 2) pack.word[i / 2] = word_of(__floats2half2_rn(values[i], values[i + 1]));
        }
        return pack;
    }
};

// one element a word, of the `count` that are left of the tensor
template <class Element>
__device__ __forceinline__ void load_scattered(const Element* from, std::int64_t count, Pack<false>& pack) {
#pragma unroll
    for (int i = 0; i < kPack; ++i)
        if (pack.place(i) < count) pack.word[i] = from[pack.place(i)];
}

template <class Element>
__device__ __forceinline__ void store_scattered(const Pack<false>& pack, Element* to, std::int64_t count) {
#pragma unroll
    for (int i = 0; i < kPack; ++i)
        if (pack.place(i) < count) to[pack.place(i)] = Element(pack.word[i]);
}

// The lane's part of the tile that starts at element `begin` of a buffer; elements from `size` on are 0.
template <bool Neighbours>
__device__ __forceinline__ Pack<Neighbours> load_tile(const void* buffer, Dtype type, std::int64_t begin,
                                                      std::int64_t size) {
    Pack<Neighbours> pack = {};
    if constexpr (Neighbours) {
        const std::int64_t at = begin + lane_index() * kPack;
        if (type == Dtype::blockwise8) {
            const uint2 low = *reinterpret_cast<const uint2*>(static_cast<const std::uint8_t*>(buffer) + at);
            pack.word[0] = low.x, pack.word[1] = low.y;
            return pack;
        }
        const bool wide = type == Dtype::float32;
        const uint4* from = reinterpret_cast<const uint4*>(static_cast<const char*>(buffer) + (wide ? 4 : 2) * at);
        const uint4 low = from[0];
        pack.word[0] = low.x, pack.word[1] = low.y, pack.word[2] = low.z, pack.word[3] = low.w;
        if (wide) {
            const uint4 high = from[1];
            pack.word[4] = high.x, pack.word[5] = high.y, pack.word[6] = high.z, pack.word[7] = high.w;
        }
    } else if (type == Dtype::float32) {
        load_scattered(static_cast<const std::uint32_t*>(buffer) + begin, size - begin, pack);
    } else if (type == Dtype::blockwise8) {
        load_scattered(static_cast<const std::uint8_t*>(buffer) + begin, size - begin, pack);
    } else {
        load_scattered(static_cast<const std::uint16_t*>(buffer) + begin, size - begin, pack);
    }
    return pack;
}

template <bool Neighbours>
__device__ __forceinline__ void store_tile(const Pack<Neighbours>& pack, void* buffer, Dtype type, std::int64_t begin,
                                           std::int64_t size) {
    if constexpr (Neighbours) {
        const std::int64_t at = begin + lane_index() * kPack;
        if (type == Dtype::blockwise8) {
            *reinterpret_cast<uint2*>(static_cast<std::uint8_t*>(buffer) + at) = make_uint2(pack.word[0], pack.word[1]);
            return;
        }
        const bool wide = type == Dtype::float32;
        uint4* to = reinterpret_cast<uint4*>(static_cast<char*>(buffer) + (wide ? 4 : 2) * at);
        to[0] = make_uint4(pack.word[0], pack.word[1], pack.word[2], pack.word[3]);
        if (wide) to[1] = make_uint4(pack.word[4], pack.word[5], pack.word[6], pack.word[7]);
    } else if (type == Dtype::float32) {
        store_scattered(pack, static_cast<std::uint32_t*>(buffer) + begin, size - begin);
    } else if (type == Dtype::blockwise8) {
        store_scattered(pack, static_cast<std::uint8_t*>(buffer) + begin, size - begin);
    } else {
        store_scattered(pack, static_cast<std::uint16_t*>(buffer) + begin, size - begin);
    }
}

} // namespace ssiuu
