#include "penalty.h"

#include <algorithm>
#include <limits>

#include "launch.h"
#include "penalty_table.h"
#include "reduce.cuh"
#include "ssiuu/blockwise8.h"
#include "ssiuu/elementwise.h"
#include "storage.cuh"

namespace ssiuu {
namespace {

static_assert(kTile == kBlockwise8Block, "a warp sees all of a block of an 8-bit reference");

__device__ const Blockwise8Table blockwise8_values = blockwise8_table();
__device__ const Blockwise8OctaveTable blockwise8_groups = blockwise8_octaves();

// The tables of 8-bit references, near at hand.
struct Codebook {
    float value[256];
    Blockwise8OctaveTable octaves;

    __device__ __forceinline__ void load() {
        const int i = int(threadIdx.x);
        value[i] = blockwise8_values.values[i];
        if (i < kBlockwise8Octaves) octaves.midpoint[i] = blockwise8_groups.midpoint[i];
        if (i < 2 * kBlockwise8Octaves) octaves.group[i] = blockwise8_groups.group[i];
    }
    // blockwise8_code, with its comparisons looked up
    __device__ __forceinline__ int code(float value, float inverse) const {
        const float scaled = fabsf(value) * inverse;
        const int octave = max(int(__float_as_uint(scaled) >> 23), kBlockwise8FirstOctave) - kBlockwise8FirstOctave;
        const int upper = scaled >= octaves.midpoint[octave];
        return blockwise8_code_in(octaves.group[2 * octave + upper], value, scaled);
    }
};

struct PenaltyArguments {
    const float* weight; // null: twice_weight is it
    float twice_weight;
    float scale;
    float bound;
    bool update_references;
    bool first;
};

// The table reaches the device as arguments of launches, which are copied at once: no pinned memory to keep alive,
// nothing to wait for, and a captured graph holds its own copy.
constexpr int kRowsPerUpload = 500;
struct alignas(sizeof(uint4)) RowBatch {
    PenaltyRow rows[kRowsPerUpload];
};
static_assert(sizeof(RowBatch) + 64 <= 32764, "what a launch can be given");

// Arguments are read one address at a time: small blocks, so that many multiprocessors share in that.
constexpr int kUploadThreads = kWarp;
constexpr int kWordsPerRow = int(sizeof(PenaltyRow) / sizeof(uint4));
constexpr int kRowsPerBlock = kUploadThreads / kWordsPerRow;

__global__ void __launch_bounds__(kUploadThreads) upload_kernel(const __grid_constant__ RowBatch batch, int count,
                                                                PenaltyRow* table, unsigned long long* nonfinite) {
    const int word = int(blockIdx.x) * kUploadThreads + int(threadIdx.x), row = word / kWordsPerRow;
    if (row >= count) return;
    reinterpret_cast<uint4*>(table)[word] = reinterpret_cast<const uint4*>(batch.rows)[word];
    if (word % kWordsPerRow == 0) nonfinite[row] = 0;
}

// The tensor that a chunk belongs to, found by the lanes of a warp together.
__device__ std::int64_t tensor_of(const PenaltyRow* table, std::int64_t tensors, std::int64_t chunk) {
    // table[low] begins at or before the chunk, table[high] behind it
    std::int64_t low = 0, high = tensors;
    while (high - low > 1) {
        const std::int64_t step = (high - low + kWarp - 1) / kWarp;
        const std::int64_t probe = low + (lane_index() + 1) * step;
        const bool before = probe < high && table[probe].first_chunk <= chunk;
        const int steps = __popc(__ballot_sync(kAllLanes, before));
        low += steps * step;
        high = low + step < high ? low + step : high;
    }
    return low;
}

// the largest finite value that both a reference of this type and fp32 can hold
__device__ float largest(Dtype type) {
    switch (type) {
    case Dtype::float16: return 65504.0f;
    case Dtype::bfloat16: return 0x1.fep127f;
    case Dtype::blockwise8: return kBlockwise8Limit;
    default: return 0x1.fffffep127f;
    }
}

// 2^-k and 2^k for 2^k ≤ x < 2^(k+1), k kept to where both are normal numbers.
struct PowerOfTwo {
    float down, up;

    __device__ __forceinline__ explicit PowerOfTwo(float x) {
        const unsigned exponent = min(max(__float_as_uint(x) >> 23, 1u), 253u);
        down = __uint_as_float((254 - exponent) << 23);
        up = __uint_as_float(exponent << 23);
    }
};

// The squares of a pack in fp32. d and g are brought near 1 before, by powers of two from bounds that the pack has
// itself: gradients of a small probability would vanish when squared, and they are the ordinary case while a model
// unlearns.
struct PackSquares {
    PowerOfTwo difference_scale, gradient_scale;
    float penalty = 0, gradient_square = 0;
    bool any = false;

    __device__ __forceinline__ void add(float difference, float gradient) {
        const float scaled = difference * difference_scale.down;
        const float product = scaled * (gradient * gradient_scale.down);
        // fused here, where no sign hangs on the rounding
        penalty = fmaf(scaled, scaled, penalty);
        gradient_square = fmaf(product, product, gradient_square);
        any |= difference != 0;
    }
    // A pack whose d are all tiny beside its A, or beside what isn't punished, isn't: terms far below 1 would be lost.
    // Above this each sum has lost less than 2^-24 of itself.
    __device__ __forceinline__ bool safe() const { return !any || (penalty > 1e-24f && gradient_square > 1e-24f); }
    __device__ __forceinline__ void add_to(PartialSums& sums) const {
        const double up = difference_scale.up, both = up * gradient_scale.up;
        sums.penalty += up * up * penalty;
        sums.gradient_square += 4 * (both * both) * gradient_square;
    }
};

// The same in fp64, for the rare pack whose squares fp32 can't hold. Its elements are read again, so that the usual way
// keeps none of them in registers.
template <bool Neighbours>
__device__ __forceinline__ void add_exact_squares(const PenaltyRow& row, std::int64_t begin,
                                                  const PenaltyArguments& arguments, const Codebook& codebook,
                                                  PartialSums& sums) {
    const Dtype reference_type = Dtype(row.reference_type);
#pragma unroll 1
    for (int i = 0; i < kPack; ++i) {
        const std::int64_t at = begin + Pack<Neighbours>::place(i);
        if (at >= row.size) break;
        const float gradient = load_float(row.gradient, Dtype(row.gradient_type), at) * arguments.scale;
        const float parameter = load_float(row.parameter, Dtype(row.parameter_type), at);
        const float reference =
            reference_type == Dtype::blockwise8
                ? codebook.value[static_cast<const std::uint8_t*>(row.reference)[at]] * row.absmax[at / kTile]
                : load_float(row.reference, reference_type, at);
        const auto terms =
            penalty_terms<true, false>(gradient, parameter, reference, arguments.bound, largest(reference_type));
        const double product = double(terms.difference) * terms.gradient;
        sums.penalty += double(terms.difference) * terms.difference;
        sums.gradient_square += 4 * (product * product);
    }
}

template <bool Neighbours>
__device__ __forceinline__ Pack<Neighbours> encode(const float (&values)[kPack], const Codebook& codebook,
                                                   float* absmax) {
    float most = 0;
#pragma unroll
    for (int i = 0; i < kPack; ++i) most = fmaxf(most, fabsf(values[i]));
    // numbers of one sign are ordered as their bits are
    most = __uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(most)));
    const float kept = blockwise8_absmax(most);
    const float inverse = blockwise8_inverse(kept);
    Pack<Neighbours> pack = {};
#pragma unroll
    for (int i = 0; i < kPack; ++i) pack.set_code(i, std::uint32_t(codebook.code(values[i], inverse)));
    if (lane_index() == 0) *absmax = kept;
    return pack;
}

struct Counts {
    int negative, nonfinite;
};

// From gradient, parameter and reference of a pack to what is written (before `out` is added) and stored.
template <bool Tame>
__device__ __forceinline__ void penalty_terms_of(float (&value)[kPack], const float (&parameter)[kPack],
                                                 float (&stored)[kPack], float bound, float limit, float twice_weight,
                                                 PackSquares& squares, Counts& counts) {
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
        const auto terms = penalty_terms<true, Tame>(value[i], parameter[i], stored[i], bound, limit);
        stored[i] = terms.stored;
        value[i] = terms.difference * twice_weight * terms.gradient;
        squares.add(terms.difference, terms.gradient);
        counts.negative += terms.negative;
        counts.nonfinite += terms.left_out;
    }
}

// One tile of one tensor; every lane of the warp takes part, with zeros past the tensor's end.
template <bool Neighbours>
__device__ __forceinline__ void penalty_tile(const PenaltyRow& row, std::int64_t begin,
                                             const PenaltyArguments& arguments, float twice_weight,
                                             const Codebook& codebook, PartialSums& sums, Counts& counts) {
    const Dtype reference_type = Dtype(row.reference_type), out_type = Dtype(row.out_type);
    const std::int64_t size = row.size;
    const auto gradients = load_tile<Neighbours>(row.gradient, Dtype(row.gradient_type), begin, size);
    const auto parameters = load_tile<Neighbours>(row.parameter, Dtype(row.parameter_type), begin, size);
    Pack<Neighbours> references = {};
    if (!arguments.first) references = load_tile<Neighbours>(row.reference, reference_type, begin, size);

    float value[kPack], parameter[kPack], stored[kPack];
    gradients.to_floats(Dtype(row.gradient_type), value);
    parameters.to_floats(Dtype(row.parameter_type), parameter);
    if (reference_type == Dtype::blockwise8) {
        const float absmax = arguments.first ? 0.0f : row.absmax[begin / kTile];
#pragma unroll
        for (int i = 0; i < kPack; ++i) stored[i] = codebook.value[references.code(i)] * absmax;
    } else {
        references.to_floats(reference_type, stored);
    }

    // one test for a whole pack, nearly always passed, spares the guards of each element
    float magnitudes = 0, gradients_sum = 0;
    const float limit = largest(reference_type);
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
        value[i] *= arguments.scale;
        magnitudes += fabsf(parameter[i] * value[i]) + fabsf(stored[i]);
        gradients_sum += fabsf(value[i]);
    }
    PackSquares squares{PowerOfTwo(magnitudes), PowerOfTwo(gradients_sum)};
    if (magnitudes <= limit)
        penalty_terms_of<true>(value, parameter, stored, arguments.bound, limit, twice_weight, squares, counts);
    else
        penalty_terms_of<false>(value, parameter, stored, arguments.bound, limit, twice_weight, squares, counts);
    // before anything is overwritten; the first step has no differences, so its reference isn't read
    if (squares.safe())
        squares.add_to(sums);
    else
        add_exact_squares<Neighbours>(row, begin, arguments, codebook, sums);

    if (row.add) {
        float before[kPack];
        load_tile<Neighbours>(row.out, out_type, begin, size).to_floats(out_type, before);
#pragma unroll
        for (int i = 0; i < kPack; ++i) value[i] += before[i];
    }
    store_tile(Pack<Neighbours>::from_floats(value, out_type), row.out, out_type, begin, size);
    if (!arguments.update_references) return;
    if (reference_type == Dtype::blockwise8)
        store_tile(encode<Neighbours>(stored, codebook, row.absmax + begin / kTile), row.reference, reference_type, begin,
                   size);
    else
        store_tile(Pack<Neighbours>::from_floats(stored, reference_type), row.reference, reference_type, begin, size);
}

// Three blocks a multiprocessor keep enough loads under way, at 80 registers a thread. The compiler needs a few more for
// 12.0, whose multiprocessors have less memory bandwidth to fill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kResident = 2;
#else
constexpr int kResident = 3;
#endif

__global__ void __launch_bounds__(kThreads, kResident)
    penalty_kernel(const PenaltyRow* table, std::int64_t tensors, std::int64_t chunks,
                   const __grid_constant__ PenaltyArguments arguments, PartialSums* partial,
                   unsigned long long* nonfinite) {
    __shared__ Codebook codebook;
    // kept here and not in registers, which the elements need
    __shared__ PenaltyRow rows[kWarps];
    codebook.load();
    __syncthreads();
    const float twice_weight = arguments.weight ? 2 * *arguments.weight : arguments.twice_weight;

    PartialSums sums = {0, 0, 0};
    // a lane sees some 10^5 elements of a model of billions: its counts fit 32 bits
    Counts counts = {0, 0};
    for (std::int64_t chunk = std::int64_t(blockIdx.x) * kWarps + warp_index(); chunk < chunks;
         chunk += std::int64_t(gridDim.x) * kWarps) {
        const std::int64_t tensor = tensor_of(table, tensors, chunk);
        PenaltyRow& row = rows[warp_index()];
        __syncwarp();
        if (lane_index() == 0) row = table[tensor];
        __syncwarp();
        const std::int64_t begin = (chunk - row.first_chunk) * kChunk;
        const int count = int(row.size - begin < kChunk ? row.size - begin : kChunk);
        counts.nonfinite = 0;
        for (int offset = 0; offset < count; offset += int(kTile)) {
            if (row.aligned && count - offset >= kTile)
                penalty_tile<true>(row, begin + offset, arguments, twice_weight, codebook, sums, counts);
            else
                penalty_tile<false>(row, begin + offset, arguments, twice_weight, codebook, sums, counts);
        }
        // integers: the order in which they are added doesn't matter
        const unsigned nonfinite_here = __reduce_add_sync(kAllLanes, unsigned(counts.nonfinite));
        if (nonfinite_here && lane_index() == 0)
            atomicAdd(nonfinite + tensor, static_cast<unsigned long long>(nonfinite_here));
    }
    sums.negative = counts.negative;
    sums = block_sum(sums);
    if (threadIdx.x == 0) partial[blockIdx.x] = sums;
}

std::int64_t table_bytes(std::int64_t tensors) { return tensors * std::int64_t(sizeof(PenaltyRow)); }

} // namespace

void load_penalty_kernels() {
    load(upload_kernel);
    load(penalty_kernel);
    load(total_kernel);
}

std::int64_t cuda_penalty_workspace(std::int64_t tensors, int device) {
    use_device(device);
    return table_bytes(tensors) + resident_blocks(penalty_kernel, kThreads) * std::int64_t(sizeof(PartialSums));
}

void cuda_penalty(const std::vector<PenaltyTensor>& tensors, const PenaltyOptions& options, const float* weight,
                  void* workspace, double* floats, long long* integers, unsigned long long* nonfinite, int device,
                  cudaStream_t stream) {
    use_device(device);
    const PenaltyTable table = penalty_table(tensors);
    const std::int64_t count = std::int64_t(table.rows.size());
    PenaltyRow* rows = static_cast<PenaltyRow*>(workspace);
    PartialSums* partial = reinterpret_cast<PartialSums*>(static_cast<char*>(workspace) + table_bytes(count));

    for (std::int64_t begin = 0; begin < count; begin += kRowsPerUpload) {
        const int some = int(std::min<std::int64_t>(kRowsPerUpload, count - begin));
        RowBatch batch;
        std::copy_n(table.rows.begin() + begin, some, batch.rows);
        launch(upload_kernel, (some + kRowsPerBlock - 1) / kRowsPerBlock, kUploadThreads, stream, batch, some,
               rows + begin, nonfinite + begin);
    }
    const float infinity = std::numeric_limits<float>::infinity();
    const float bound = options.first ? -infinity : options.one_sided ? 0 : infinity;
    const PenaltyArguments arguments = {weight,
                                        float(2 * options.weight),
                                        float(options.gradient_scale),
                                        bound,
                                        options.update_references,
                                        options.first};
    const std::int64_t blocks =
        std::min(resident_blocks(penalty_kernel, kThreads), (table.chunks + kWarps - 1) / kWarps);
    launch(penalty_kernel, blocks, kThreads, stream, rows, count, table.chunks, arguments, partial, nonfinite);
    launch(total_kernel, 1, kThreads, stream, partial, blocks, floats, integers);
}

} // namespace ssiuu
