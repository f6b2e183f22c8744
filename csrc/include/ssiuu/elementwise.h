// The formulas per element: one text for the CPU's instruction-set units and for CUDA.
// It includes nothing, and its functions have internal linkage: a unit compiled for AVX2 must not lend its
// code to the rest of the program.
#pragma once

#if defined(__CUDACC__)
#define SSIUU_ELEMENTWISE static __host__ __device__ __forceinline__
#elif defined(__GNUC__) || defined(__clang__)
#define SSIUU_ELEMENTWISE static inline __attribute__((always_inline))
#else
#define SSIUU_ELEMENTWISE static inline
#endif

namespace ssiuu {

template <class Value, class Flag> struct PenaltyTerms {
    Value stored;     // the new reference: A, or the old one where that is left out
    Value difference; // d, 0 where nothing is punished
    Value gradient;   // g, 0 where it may be infinite
    Flag left_out;    // not finite: adds nothing, keeps its reference, is counted
    Flag negative;    // A < 0
};

// Value is a number, or a vector of numbers in the compilers' notation (Flag is then a vector of 0 and −1).
// `bound` chooses the variant: d counts where A − A^ref < bound.
// +infinity: both directions, 0: one-sided, −infinity: nothing (the first step). Bounded = false leaves the test out,
// where it is +infinity.
// `limit` is the largest finite value that both the arithmetic and the reference can hold. Tame = true leaves that test
// out, where the caller has shown that |A| + |A^ref| is within it.
template <bool Bounded, bool Tame, class Value>
SSIUU_ELEMENTWISE auto penalty_terms(Value gradient, Value parameter, Value reference, Value bound, Value limit) {
    const Value zero = Value{};
    const Value attribution = parameter * gradient;
    const Value gap = attribution - reference;
    using Flag = decltype(attribution < zero);
    const Flag below = attribution < zero;
    // where A >= 0 the reference doesn't matter; where A < 0 a reference below 0 may hide in the gap that A is too large
    const Value decisive = below ? gap : attribution;
    const Flag finite = (decisive <= limit) & (decisive >= -limit) & (attribution >= -limit);
    const Flag negative = Tame ? below : Flag(finite & below);
    const Flag punished = Bounded ? Flag(negative & (gap < bound)) : negative;
    if (Tame)
        return PenaltyTerms<Value, Flag>{attribution, punished ? gap : zero, gradient, Flag{}, negative};
    return PenaltyTerms<Value, Flag>{finite ? attribution : reference, punished ? gap : zero,
                                     punished ? gradient : zero, finite == Flag{}, negative};
}

// The larger and the smaller of two, and NaN where either is one.
template <class Number> SSIUU_ELEMENTWISE Number larger(Number candidate, Number most) {
    return (candidate > most) | (candidate != candidate) ? candidate : most;
}

template <class Number> SSIUU_ELEMENTWISE Number smaller(Number candidate, Number least) {
    return (candidate < least) | (candidate != candidate) ? candidate : least;
}

} // namespace ssiuu
