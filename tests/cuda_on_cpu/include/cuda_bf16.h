#pragma once
#include "cuda_runtime.h"

struct __nv_bfloat16 { std::uint16_t bits; };

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    const unsigned bits = __float_as_uint(value);
    if (value != value) return {0x7fff};
    return {std::uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }

struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
