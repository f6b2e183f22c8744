#include "neuron.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "launch.h"
#include "reduce.cuh"
#include "ssiuu/elementwise.h"
#include "storage.cuh"

namespace ssiuu {
namespace {

// tokens of a split are a multiple of what the warps of a block pass over together
constexpr std::int64_t kGrain = 32;
constexpr std::int64_t kShortestSplit = 512;

// The attributions of one sample over some tokens, to wherever the pointers that aren't null show: at
// [split, sample, neuron], which is [sample, neuron] where there is one split.
struct Reduced {
    float* max;
    float* min;
    float* sum;
    double* exact_sum;
};

// 16-byte accesses fit every row.
bool rows_aligned(const void* base, std::int64_t batch_stride, std::int64_t token_stride, Dtype type) {
    const std::int64_t bytes = type == Dtype::float32 ? 4 : 2;
    return reinterpret_cast<std::uintptr_t>(base) % 16 == 0 && batch_stride * bytes % 16 == 0 &&
           token_stride * bytes % 16 == 0;
}

bool is_aligned(const NeuronTensors& t) {
    return t.neurons % kPack == 0 && rows_aligned(t.hidden, t.hidden_batch_stride, t.hidden_token_stride, t.type) &&
           rows_aligned(t.gradient, t.gradient_batch_stride, t.gradient_token_stride, t.type);
}

std::int64_t tiles_of(const NeuronTensors& tensors) { return (tensors.neurons + kTile - 1) / kTile; }

// The lane's part of a row, from neuron `begin` on; neurons past the row are 0.
template <bool Neighbours>
__device__ __forceinline__ Pack<Neighbours> load_row(const void* buffer, Dtype type, std::int64_t row,
                                                     std::int64_t begin, std::int64_t neurons) {
    if (Neighbours && begin + lane_index() * kPack >= neurons) return {};
    return load_tile<Neighbours>(buffer, type, row + begin, row + neurons);
}

// The type is fixed here, since both inputs share it and a lane's share of registers decides how many loads are under
// way: four tokens of 16 bits, or two.
template <bool Neighbours, Dtype Type>
__global__ void __launch_bounds__(kThreads, 2)
    reduce_kernel(const __grid_constant__ NeuronTensors tensors, TokenSplits splits, const __grid_constant__ Reduced out) {
    constexpr int kTogether = Neighbours && Type != Dtype::float32 ? 4 : 2;
    __shared__ float largest_of[kWarps][kTile];
    __shared__ float smallest_of[kWarps][kTile];
    __shared__ double sum_of[kWarps][kTile];

    const std::int64_t tiles = (tensors.neurons + kTile - 1) / kTile;
    const std::int64_t begin = blockIdx.x % tiles * kTile;
    const std::int64_t part = blockIdx.x / tiles;
    const std::int64_t sample = part % tensors.batch, split = part / tensors.batch;
    const std::int64_t first = split * splits.length;
    const std::int64_t last = first + splits.length < tensors.tokens ? first + splits.length : tensors.tokens;

    float largest[kPack], smallest[kPack];
    double sum[kPack];
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
        largest[i] = -INFINITY;
        smallest[i] = INFINITY;
        sum[i] = 0;
    }
    for (std::int64_t token = first + warp_index() * kTogether; token < last; token += kWarps * kTogether) {
        Pack<Neighbours> hidden[kTogether], gradient[kTogether];
        bool counted[kTogether];
#pragma unroll
        for (int k = 0; k < kTogether; ++k) {
            counted[k] = token + k < last && (!tensors.mask || tensors.mask[sample * tensors.tokens + token + k]);
            if (!counted[k]) continue;
            hidden[k] = load_row<Neighbours>(
                tensors.hidden, Type,
                sample * tensors.hidden_batch_stride + (token + k) * tensors.hidden_token_stride, begin,
                tensors.neurons);
            gradient[k] = load_row<Neighbours>(
                tensors.gradient, Type,
                sample * tensors.gradient_batch_stride + (token + k) * tensors.gradient_token_stride, begin,
                tensors.neurons);
        }
        // neighbours are added in fp32, which loses little more than the products themselves did; all else in fp64
        float few[kPack] = {};
#pragma unroll
        for (int k = 0; k < kTogether; ++k) {
            if (!counted[k]) continue;
            float h[kPack], g[kPack];
            hidden[k].to_floats(Type, h);
            gradient[k].to_floats(Type, g);
#pragma unroll
            for (int i = 0; i < kPack; ++i) {
                const float product = h[i] * g[i];
                largest[i] = larger(product, largest[i]);
                smallest[i] = smaller(product, smallest[i]);
                few[i] += product;
            }
        }
#pragma unroll
        for (int i = 0; i < kPack; ++i) sum[i] += few[i];
    }
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
        const int place = Pack<Neighbours>::place(i);
        largest_of[warp_index()][place] = largest[i];
        smallest_of[warp_index()][place] = smallest[i];
        sum_of[warp_index()][place] = sum[i];
    }
    __syncthreads();

    const int own = int(threadIdx.x);
    if (begin + own >= tensors.neurons) return;
    float most = largest_of[0][own], least = smallest_of[0][own];
    double total = sum_of[0][own];
    for (int warp = 1; warp < kWarps; ++warp) {
        most = larger(largest_of[warp][own], most);
        least = smaller(smallest_of[warp][own], least);
        total += sum_of[warp][own];
    }
    const std::int64_t at = part * tensors.neurons + begin + own;
    if (out.max) out.max[at] = most;
    if (out.min) out.min[at] = least;
    if (out.sum) out.sum[at] = float(total);
    if (out.exact_sum) out.exact_sum[at] = total;
}
static_assert(kThreads == kTile, "a thread for every neuron of a tile");

// The second stage works on 32 neurons a block: each warp walks over every eighth part of them, then warp 0 goes on with
// the eight results in their order.
constexpr int kColumns = kWarp;

__device__ __forceinline__ std::int64_t column() { return std::int64_t(blockIdx.x) * kColumns + lane_index(); }

// Σ of the parts, to be used by warp 0; every thread of the block has to take part.
__device__ __forceinline__ double sum_of_parts(const double* sums, std::int64_t parts, std::int64_t neurons) {
    __shared__ double warps[kWarps][kColumns];
    double own = 0;
    if (column() < neurons)
        for (std::int64_t part = warp_index(); part < parts; part += kWarps) own += sums[part * neurons + column()];
    warps[warp_index()][lane_index()] = own;
    __syncthreads();
    for (int warp = 1; warp < kWarps; ++warp) own += warps[warp][lane_index()];
    return own;
}

__global__ void __launch_bounds__(kThreads)
    merge_kernel(const __grid_constant__ Reduced partial, std::int64_t splits, std::int64_t neurons,
                 const __grid_constant__ Reduced out) {
    __shared__ float largest_of[kWarps][kColumns], smallest_of[kWarps][kColumns];
    float most = -INFINITY, least = INFINITY;
    if (column() < neurons) {
        for (std::int64_t split = warp_index(); split < splits; split += kWarps) {
            most = larger(partial.max[split * neurons + column()], most);
            least = smaller(partial.min[split * neurons + column()], least);
        }
    }
    largest_of[warp_index()][lane_index()] = most;
    smallest_of[warp_index()][lane_index()] = least;
    const double total = sum_of_parts(partial.exact_sum, splits, neurons);
    if (warp_index() > 0 || column() >= neurons) return;
    for (int warp = 1; warp < kWarps; ++warp) {
        most = larger(largest_of[warp][lane_index()], most);
        least = smaller(smallest_of[warp][lane_index()], least);
    }
    out.max[column()] = most;
    out.min[column()] = least;
    out.sum[column()] = float(total);
}

// From the sums over tokens to A, d and what the gradient is multiplied by; `parts` sums make one A.
__global__ void __launch_bounds__(kThreads)
    difference_kernel(const double* sums, std::int64_t parts, std::int64_t neurons,
                      const __grid_constant__ NeuronPenaltyArguments arguments, float* factor, PartialSums* partial) {
    const double total = sum_of_parts(sums, parts, neurons);
    const std::int64_t at = column();
    PartialSums own = {0, 0, 0};
    if (warp_index() == 0 && at < neurons) {
        const float attribution = float(total);
        const bool first = !arguments.reference;
        const float bound = first ? -INFINITY : arguments.one_sided ? 0.0f : INFINITY;
        // the formula of the parameters, whose A is a product
        const auto terms = penalty_terms<true, false>(attribution, 1.0f, first ? 0.0f : arguments.reference[at], bound,
                                                      0x1.fffffep127f);
        const float twice_weight = arguments.weight_tensor ? 2 * *arguments.weight_tensor : float(2 * arguments.weight);
        arguments.attribution[at] = attribution;
        factor[at] = twice_weight * terms.difference;
        own = {double(terms.difference) * terms.difference, 0, terms.negative};
    }
    own = block_sum(own);
    if (threadIdx.x == 0) partial[blockIdx.x] = own;
}

constexpr int kRowsTogether = 4;

// gradient ← factor · gradient, over as many tokens a block as a split has
template <bool Neighbours>
__global__ void __launch_bounds__(kThreads, 2)
    injection_kernel(const __grid_constant__ NeuronTensors tensors, TokenSplits splits, const float* factor,
                     std::int64_t factor_stride) {
    const std::int64_t tiles = (tensors.neurons + kTile - 1) / kTile;
    const std::int64_t begin = blockIdx.x % tiles * kTile;
    const std::int64_t part = blockIdx.x / tiles;
    const std::int64_t sample = part % tensors.batch, split = part / tensors.batch;
    const std::int64_t first = split * splits.length;
    const std::int64_t last = first + splits.length < tensors.tokens ? first + splits.length : tensors.tokens;
    void* gradient = tensors.gradient;
    if (Neighbours && begin + lane_index() * kPack >= tensors.neurons) return;

    float factors[kPack];
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
        const std::int64_t neuron = begin + Pack<Neighbours>::place(i);
        factors[i] = neuron < tensors.neurons ? factor[sample * factor_stride + neuron] : 0.0f;
    }
    for (std::int64_t token = first + warp_index() * kRowsTogether; token < last; token += kWarps * kRowsTogether) {
        Pack<Neighbours> rows[kRowsTogether];
#pragma unroll
        for (int k = 0; k < kRowsTogether; ++k) {
            if (token + k >= last) continue;
            const std::int64_t row =
                sample * tensors.gradient_batch_stride + (token + k) * tensors.gradient_token_stride;
            rows[k] = load_tile<Neighbours>(gradient, tensors.type, row + begin, row + tensors.neurons);
        }
#pragma unroll
        for (int k = 0; k < kRowsTogether; ++k) {
            if (token + k >= last) continue;
            const bool counted = !tensors.mask || tensors.mask[sample * tensors.tokens + token + k];
            float values[kPack];
            rows[k].to_floats(tensors.type, values);
#pragma unroll
            // 0 where nothing is injected, whatever the gradient holds
            for (int i = 0; i < kPack; ++i) values[i] = counted && factors[i] != 0 ? factors[i] * values[i] : 0.0f;
            const std::int64_t row =
                sample * tensors.gradient_batch_stride + (token + k) * tensors.gradient_token_stride;
            store_tile(Pack<Neighbours>::from_floats(values, tensors.type), gradient, tensors.type, row + begin,
                       row + tensors.neurons);
        }
    }
}

std::int64_t blocks_for(std::int64_t neurons) { return (neurons + kColumns - 1) / kColumns; }

using ReduceKernel = void (*)(NeuronTensors, TokenSplits, Reduced);

template <bool Neighbours> ReduceKernel reduce_kernel_for(Dtype type) {
    switch (type) {
    case Dtype::bfloat16: return reduce_kernel<Neighbours, Dtype::bfloat16>;
    case Dtype::float16: return reduce_kernel<Neighbours, Dtype::float16>;
    default: return reduce_kernel<Neighbours, Dtype::float32>;
    }
}

ReduceKernel reduce_kernel_of(const NeuronTensors& tensors) {
    return is_aligned(tensors) ? reduce_kernel_for<true>(tensors.type) : reduce_kernel_for<false>(tensors.type);
}

TokenSplits splits_of(const NeuronTensors& tensors) {
    return split_tokens(tensors, resident_blocks(reduce_kernel_of(tensors), kThreads));
}

void reduce(const NeuronTensors& tensors, TokenSplits splits, const Reduced& out, cudaStream_t stream) {
    const std::int64_t blocks = tiles_of(tensors) * tensors.batch * splits.count;
    launch(reduce_kernel_of(tensors), blocks, kThreads, stream, tensors, splits, out);
}

// places for results of `count` neurons in a workspace: 8-byte numbers first
struct Places {
    char* next;

    template <class Number> Number* take(std::int64_t count) {
        Number* here = reinterpret_cast<Number*>(next);
        next += count * std::int64_t(sizeof(Number));
        return here;
    }
};

} // namespace

TokenSplits split_tokens(const NeuronTensors& tensors, std::int64_t resident) {
    const std::int64_t blocks = std::max<std::int64_t>(1, tiles_of(tensors) * tensors.batch);
    const std::int64_t wanted = (resident + blocks - 1) / blocks;
    const std::int64_t most = std::max<std::int64_t>(1, tensors.tokens / kShortestSplit);
    const std::int64_t count = std::min(wanted, most);
    const std::int64_t even = (tensors.tokens + count - 1) / count;
    const std::int64_t length = std::max<std::int64_t>(kGrain, (even + kGrain - 1) / kGrain * kGrain);
    return {std::max<std::int64_t>(1, (tensors.tokens + length - 1) / length), length};
}

void load_neuron_kernels() {
    for (const Dtype type : {Dtype::float32, Dtype::bfloat16, Dtype::float16}) {
        load(reduce_kernel_for<true>(type));
        load(reduce_kernel_for<false>(type));
    }
    load(merge_kernel);
    load(difference_kernel);
    load(total_kernel);
    load(injection_kernel<true>);
    load(injection_kernel<false>);
}

std::int64_t cuda_neuron_attribution_workspace(const NeuronTensors& tensors, int device) {
    use_device(device);
    const TokenSplits splits = splits_of(tensors);
    const std::int64_t each = sizeof(double) + 2 * sizeof(float);
    return splits.count == 1 ? 0 : splits.count * tensors.batch * tensors.neurons * each;
}

void cuda_neuron_attribution(const NeuronTensors& tensors, float* max, float* min, float* sum, void* workspace,
                             int device, cudaStream_t stream) {
    use_device(device);
    const TokenSplits splits = splits_of(tensors);
    const Reduced out = {max, min, sum, nullptr};
    if (splits.count == 1) return reduce(tensors, splits, out, stream);
    const std::int64_t neurons = tensors.batch * tensors.neurons, all = splits.count * neurons;
    Places places{static_cast<char*>(workspace)};
    double* sums = places.take<double>(all);
    const Reduced partial = {places.take<float>(all), places.take<float>(all), nullptr, sums};
    reduce(tensors, splits, partial, stream);
    launch(merge_kernel, blocks_for(neurons), kThreads, stream, partial, splits.count, neurons, out);
}

std::int64_t cuda_neuron_penalty_workspace(const NeuronTensors& tensors, bool per_sample, int device) {
    use_device(device);
    const std::int64_t sums = splits_of(tensors).count * tensors.batch * tensors.neurons;
    const std::int64_t results = (per_sample ? tensors.batch : 1) * tensors.neurons;
    return sums * std::int64_t(sizeof(double)) + blocks_for(results) * std::int64_t(sizeof(PartialSums)) +
           results * std::int64_t(sizeof(float));
}

void cuda_neuron_penalty(const NeuronTensors& tensors, const NeuronPenaltyArguments& arguments, void* workspace,
                         double* floats, long long* integers, int device, cudaStream_t stream) {
    use_device(device);
    const TokenSplits splits = splits_of(tensors);
    const std::int64_t results = (arguments.per_sample ? tensors.batch : 1) * tensors.neurons;
    const std::int64_t parts = splits.count * (arguments.per_sample ? 1 : tensors.batch);
    Places places{static_cast<char*>(workspace)};
    double* sums = places.take<double>(splits.count * tensors.batch * tensors.neurons);
    PartialSums* partial = places.take<PartialSums>(blocks_for(results));
    float* factor = places.take<float>(results);

    reduce(tensors, splits, {nullptr, nullptr, nullptr, sums}, stream);
    launch(difference_kernel, blocks_for(results), kThreads, stream, sums, parts, results, arguments, factor, partial);
    launch(total_kernel, 1, kThreads, stream, partial, blocks_for(results), floats, integers);
    launch(is_aligned(tensors) ? injection_kernel<true> : injection_kernel<false>,
           tiles_of(tensors) * tensors.batch * splits.count, kThreads, stream, tensors, splits, factor,
           arguments.per_sample ? tensors.neurons : 0);
}

} // namespace ssiuu
