// What an instruction-set unit offers, as plain structs and function pointers.
#pragma once

#include <cstdint>

#include "ssiuu/types.h"

namespace ssiuu {

// Results [batch, neurons].
struct AttributionTensors : NeuronTensors {
    void* max;
    void* min;
    void* sum;
};

// Columns of the attribution are worked on in tiles of this many neurons.
constexpr std::int64_t kAttributionTile = 512;

// reference (or null: there is none yet) and attribution are [batch, neurons], or [neurons] where a tile spans the whole
// batch.
struct NeuronPenaltyTensors : NeuronTensors {
    const void* reference;
    void* attribution;
};

struct NeuronPenaltyOptions {
    double weight;
    bool one_sided;
};

struct NeuronPenaltySums {
    double penalty;
    std::int64_t negative;
};

// Neurons [begin, end), at most kNeuronTile, over the samples whose attributions are one sum.
struct NeuronTile {
    std::int64_t first_sample, last_sample;
    std::int64_t begin, end;
};

constexpr std::int64_t kNeuronTile = 512;

struct CpuKernels {
    const char* name;
    // elements [begin, end) of one tensor
    void (*penalty)(const PenaltyTensor&, const PenaltyOptions&, std::int64_t begin, std::int64_t end, PenaltySums&);
    // neurons [begin, end) of one sample, at most kAttributionTile
    void (*attribution)(const AttributionTensors&, std::int64_t sample, std::int64_t begin, std::int64_t end);
    void (*neuron_penalty)(const NeuronPenaltyTensors&, const NeuronPenaltyOptions&, const NeuronTile&,
                           NeuronPenaltySums&);
    // reads three buffers and rewrites two: the limit of the penalty's memory traffic, for benchmarks
    void (*traffic)(const PenaltyTensor&, std::int64_t begin, std::int64_t end);
};

// The units usable on this processor, baseline first.
const CpuKernels* const* usable_units(int& count);
// The unit in use: the last usable one unless use_unit chose another.
const CpuKernels& unit_in_use();
// False if there is no usable unit of this name.
bool use_unit(const char* name);

} // namespace ssiuu
