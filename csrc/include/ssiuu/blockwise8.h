// 8-bit references: the map between codes and values, and the formulas of encoding; one text for the CPU and CUDA.
// It includes no more than elementwise.h, and everything here has internal linkage.
//
// 256 consecutive elements of a tensor, the last block fewer, share one fp32 absmax, the largest magnitude among them;
// an element is value = table[code] · absmax. The table is the dynamic map: in group i = 0 … 6 lie 2^i magnitudes,
//
//     10^(i−6) · (0.1 + 0.9 · (j + ½) / 2^i)        j = 0 … 2^i − 1        code 2^i + j, and + 128 where negative
//
// beside 0 (code 0) and +1 (code 128). Group i spans a decade of 10^(i−7) … 10^(i−6), in which code + its fraction
// grows linearly from 2^i to 2^(i+1).
//
// Every backend must give the same bits: no multiply-add may be contracted, and no subnormal flushed to zero.
#pragma once

#include "ssiuu/elementwise.h"

namespace ssiuu {

constexpr int kBlockwise8Block = 256;
// The largest magnitude that may be stored: 1 / absmax is then a normal number.
constexpr float kBlockwise8Limit = 0x1p126f;
// A block whose largest magnitude is below this, the smallest normal number, is stored as zeros.
constexpr float kBlockwise8Smallest = 0x1p-126f;

struct Blockwise8Table {
    float values[256];
};

// for the compiler to evaluate, into a constant of whichever memory suits
static constexpr Blockwise8Table blockwise8_table() {
    Blockwise8Table table = {};
    double decades = 1e7; // 10^(7 − i)
    for (int size = 1; size < 128; size *= 2) {
        for (int j = 0; j < size; ++j) {
            // two whole numbers: rounded once in double and once in float, on every compiler
            const float value = float((2 * size + 18 * j + 9) / (2 * size * decades));
            table.values[size + j] = value;
            table.values[size + j + 128] = -value;
        }
        decades /= 10;
    }
    table.values[128] = 1;
    return table;
}

// What is stored for a block whose largest magnitude is `largest`.
SSIUU_ELEMENTWISE float blockwise8_absmax(float largest) { return largest < kBlockwise8Smallest ? 0.0f : largest; }

// What every element of the block is multiplied by before encoding: the division is one correctly rounded one.
SSIUU_ELEMENTWISE float blockwise8_inverse(float absmax) { return absmax > 0.0f ? 1.0f / absmax : 0.0f; }

// A group of codes: their number, and codes a unit of |value| / absmax.
struct Blockwise8Group {
    float size, factor;
};

// The group whose values are nearest to `scaled`; below half the smallest magnitude the one of code 0.
SSIUU_ELEMENTWISE constexpr Blockwise8Group blockwise8_group(float scaled) {
    float size = 0.5f, factor = 0.0f;
    // From the midpoint of two groups on, the upper one: 2^i codes, and 10^7 / (9 · 5^i) codes a unit.
    size = scaled >= 2.75e-7f ? 1.0f : size;
    factor = scaled >= 2.75e-7f ? float(1e7 / 9) : factor;
    size = scaled >= 1.9e-6f ? 2.0f : size;
    factor = scaled >= 1.9e-6f ? float(1e7 / 45) : factor;
    size = scaled >= 1.45e-5f ? 4.0f : size;
    factor = scaled >= 1.45e-5f ? float(1e7 / 225) : factor;
    size = scaled >= 1.225e-4f ? 8.0f : size;
    factor = scaled >= 1.225e-4f ? float(1e7 / 1125) : factor;
    size = scaled >= 1.1125e-3f ? 16.0f : size;
    factor = scaled >= 1.1125e-3f ? float(1e7 / 5625) : factor;
    size = scaled >= 1.05625e-2f ? 32.0f : size;
    factor = scaled >= 1.05625e-2f ? float(1e7 / 28125) : factor;
    size = scaled >= 0.1028125f ? 64.0f : size;
    factor = scaled >= 0.1028125f ? float(1e7 / 140625) : factor;
    return {size, factor};
}

SSIUU_ELEMENTWISE int blockwise8_code_in(Blockwise8Group group, float value, float scaled) {
    // between two groups' values the midpoint lies above the lower one's decade
    const float place = scaled * group.factor + group.size * float(8.0 / 9), last = group.size + group.size - 1.0f;
    const int magnitude = int(place < last ? place : last);
    // negative values have no 1, and zero has no sign
    const int positive = scaled > 0.996484375f ? 128 : magnitude;
    const int negative = magnitude > 0 ? magnitude + 128 : 0;
    return value < 0.0f ? negative : positive;
}

// The code of the nearest value, but for roundings of `scaled` at a midpoint. |value| ≤ absmax, never NaN.
SSIUU_ELEMENTWISE int blockwise8_code(float value, float inverse) {
    const float scaled = (value < 0.0f ? -value : value) * inverse;
    return blockwise8_code_in(blockwise8_group(scaled), value, scaled);
}

// The same groups by octave of `scaled`, for processors on which a look into a small table is cheaper than seven
// comparisons. No octave has more than one midpoint of groups. From 2^-23, below which all is code 0, to 1.
constexpr int kBlockwise8FirstOctave = 127 - 23; // as the biased exponent of fp32
constexpr int kBlockwise8Octaves = 24;
struct Blockwise8OctaveTable {
    float midpoint[kBlockwise8Octaves];        // from here on the upper group; 2 where there is none
    Blockwise8Group group[2 * kBlockwise8Octaves]; // the lower and the upper one of each
};

static constexpr Blockwise8OctaveTable blockwise8_octaves() {
    Blockwise8OctaveTable table = {};
    float begin = 0x1p-23f;
    for (int i = 0; i < kBlockwise8Octaves; ++i, begin *= 2) {
        const Blockwise8Group lower = blockwise8_group(begin);
        // the first of the octave's 2^23 numbers that isn't of the lower group, by halving
        int low = 0, high = 1 << 23;
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            const bool same = blockwise8_group(begin + float(middle) * (begin * 0x1p-23f)).size == lower.size;
            low = same ? middle : low;
            high = same ? high : middle;
        }
        const bool whole = high == 1 << 23;
        table.midpoint[i] = whole ? 2.0f : begin + float(high) * (begin * 0x1p-23f);
        table.group[2 * i] = lower;
        table.group[2 * i + 1] = whole ? lower : blockwise8_group(table.midpoint[i]);
    }
    return table;
}

} // namespace ssiuu
