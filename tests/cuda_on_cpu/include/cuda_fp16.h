#pragma once
#include "cuda_runtime.h"

using __half = _Float16;

inline __half __ushort_as_half(unsigned short bits) {
    __half value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline unsigned short __half_as_ushort(__half value) {
    unsigned short bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float __half2float(__half value) { return float(value); }
inline __half __float2half_rn(float value) { return __half(value); }

struct alignas(4) __half2 { __half x, y; };

inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
