#include "operators.h"

#include <algorithm>

#include "plan.h"
#include "pool.h"

namespace ssiuu {
namespace {

ChunkPlan plan_of(const std::vector<PenaltyTensor>& tensors) {
    std::vector<std::int64_t> sizes;
    sizes.reserve(tensors.size());
    for (const PenaltyTensor& tensor : tensors) sizes.push_back(tensor.size);
    return ChunkPlan(sizes);
}

int threads_for(std::int64_t elements, int threads) { return elements < kSerialBelow ? 1 : threads; }

} // namespace

PenaltySums penalty(const std::vector<PenaltyTensor>& tensors, const PenaltyOptions& options, std::int64_t* nonfinite,
                    int threads) {
    const ChunkPlan plan = plan_of(tensors);
    const CpuKernels& unit = unit_in_use();
    std::vector<PenaltySums> partial(plan.count(), PenaltySums{});
    parallel_for(plan.count(), threads_for(plan.elements(), threads), [&](std::int64_t i) {
        const Chunk chunk = plan[i];
        // summed on this thread's stack: neighbours in `partial` share cache lines
        PenaltySums sums{};
        unit.penalty(tensors[chunk.tensor], options, chunk.begin, chunk.end, sums);
        partial[i] = sums;
    });

    PenaltySums total{};
    std::fill_n(nonfinite, tensors.size(), 0);
    for (std::int64_t i = 0; i < plan.count(); ++i) {
        total.penalty += partial[i].penalty;
        total.gradient_square += partial[i].gradient_square;
        total.negative += partial[i].negative;
        total.nonfinite += partial[i].nonfinite;
        nonfinite[plan[i].tensor] += partial[i].nonfinite;
    }
    return total;
}

void neuron_attribution(const AttributionTensors& tensors, int threads) {
    const CpuKernels& unit = unit_in_use();
    const std::int64_t tiles = (tensors.neurons + kAttributionTile - 1) / kAttributionTile;
    const std::int64_t elements = tensors.batch * tensors.tokens * tensors.neurons;
    parallel_for(tensors.batch * tiles, threads_for(elements, threads), [&](std::int64_t i) {
        const std::int64_t begin = i % tiles * kAttributionTile;
        unit.attribution(tensors, i / tiles, begin, std::min(begin + kAttributionTile, tensors.neurons));
    });
}

NeuronPenaltySums neuron_penalty(const NeuronPenaltyTensors& tensors, const NeuronPenaltyOptions& options,
                                 bool per_sample, int threads) {
    const std::int64_t batch = tensors.batch;
    const CpuKernels& unit = unit_in_use();
    const std::int64_t tiles = (tensors.neurons + kNeuronTile - 1) / kNeuronTile;
    const std::int64_t items = (per_sample ? batch : 1) * tiles;
    const std::int64_t elements = batch * tensors.tokens * tensors.neurons;
    std::vector<NeuronPenaltySums> partial(items, NeuronPenaltySums{});
    parallel_for(items, threads_for(elements, threads), [&](std::int64_t i) {
        const std::int64_t sample = i / tiles, begin = i % tiles * kNeuronTile;
        const NeuronTile tile{sample, per_sample ? sample + 1 : batch, begin,
                              std::min(begin + kNeuronTile, tensors.neurons)};
        NeuronPenaltySums sums{};
        unit.neuron_penalty(tensors, options, tile, sums);
        partial[i] = sums;
    });

    NeuronPenaltySums total{};
    for (const NeuronPenaltySums& sums : partial) {
        total.penalty += sums.penalty;
        total.negative += sums.negative;
    }
    return total;
}

void penalty_traffic(const std::vector<PenaltyTensor>& tensors, int threads) {
    const ChunkPlan plan = plan_of(tensors);
    const CpuKernels& unit = unit_in_use();
    parallel_for(plan.count(), threads_for(plan.elements(), threads), [&](std::int64_t i) {
        const Chunk chunk = plan[i];
        unit.traffic(tensors[chunk.tensor], chunk.begin, chunk.end);
    });
}

} // namespace ssiuu
