// The module ssiuu_fast._C: pointers, int64 sizes and dtype codes in, numbers out. Checks are made in ssiuu_fast/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/operators.h"
#include "cpu/plan.h"
#include "flat.h"
#if defined(SSIUU_WITH_CUDA)
#include "cuda/bindings.h"
#include "cuda/device.h"
#endif

namespace py = pybind11;
using namespace ssiuu;

namespace {

std::tuple<double, std::int64_t, double> run_penalty(const std::vector<std::int64_t>& table, double weight,
                                                     double gradient_scale, bool one_sided, bool update_references,
                                                     bool first, std::int64_t nonfinite, int threads) {
    const std::vector<PenaltyTensor> tensors = penalty_tensors(table);
    const PenaltyOptions options{weight, gradient_scale, one_sided, update_references, first};
    PenaltySums sums;
    {
        py::gil_scoped_release release;
        sums = penalty(tensors, options, pointer<std::int64_t>(nonfinite), threads);
    }
    return {sums.penalty, sums.negative, sums.gradient_square};
}

void run_penalty_traffic(const std::vector<std::int64_t>& table, int threads) {
    const std::vector<PenaltyTensor> tensors = penalty_tensors(table);
    py::gil_scoped_release release;
    penalty_traffic(tensors, threads);
}

void run_neuron_attribution(const NeuronNumbers& numbers, std::int64_t max, std::int64_t min, std::int64_t sum,
                            int threads) {
    const AttributionTensors tensors{neuron_tensors(numbers), pointer<void>(max), pointer<void>(min),
                                     pointer<void>(sum)};
    py::gil_scoped_release release;
    neuron_attribution(tensors, threads);
}

std::tuple<double, std::int64_t> run_neuron_penalty(const NeuronNumbers& numbers, std::int64_t reference,
                                                    std::int64_t attribution, double weight, bool per_sample,
                                                    bool one_sided, int threads) {
    const NeuronPenaltyTensors tensors{neuron_tensors(numbers), pointer<void>(reference), pointer<void>(attribution)};
    NeuronPenaltySums sums;
    {
        py::gil_scoped_release release;
        sums = neuron_penalty(tensors, {weight, one_sided}, per_sample, threads);
    }
    return {sums.penalty, sums.negative};
}

std::vector<std::tuple<std::int64_t, std::int64_t, std::int64_t>> chunks(const std::vector<std::int64_t>& sizes) {
    const ChunkPlan plan(sizes);
    std::vector<std::tuple<std::int64_t, std::int64_t, std::int64_t>> list;
    for (std::int64_t i = 0; i < plan.count(); ++i) list.emplace_back(plan[i].tensor, plan[i].begin, plan[i].end);
    return list;
}

std::vector<std::string> cpu_units() {
    int count = 0;
    const CpuKernels* const* units = usable_units(count);
    std::vector<std::string> names;
    for (int i = 0; i < count; ++i) names.push_back(units[i]->name);
    return names;
}

void use_cpu_unit(const std::string& name) {
    if (!use_unit(name.c_str())) throw py::value_error("no instruction-set unit " + name + " can run here");
}

std::tuple<std::vector<std::tuple<std::string, int, int>>, std::string> list_cuda_devices() {
    std::vector<std::tuple<std::string, int, int>> devices;
    std::string error;
#if defined(SSIUU_WITH_CUDA)
    for (const CudaDevice& device : cuda_devices(error))
        devices.emplace_back(device.name, device.major, device.minor);
#else
    error = "built without CUDA";
#endif
    return {devices, error};
}

} // namespace

PYBIND11_MODULE(_C, module) {
    using py::arg;
    module.doc() = "Flat interface to the kernels of ssiuu_fast; csrc/README.md describes it.";
    module.def("penalty", run_penalty, arg("table"), arg("weight"), arg("gradient_scale"), arg("one_sided"),
               arg("update_references"), arg("first"), arg("nonfinite"), arg("threads"));
    module.def("penalty_traffic", run_penalty_traffic, arg("table"), arg("threads"));
    module.def("neuron_attribution", run_neuron_attribution, arg("tensors"), arg("max"), arg("min"), arg("sum"),
               arg("threads"));
    module.def("neuron_penalty", run_neuron_penalty, arg("tensors"), arg("reference"), arg("attribution"),
               arg("weight"), arg("per_sample"), arg("one_sided"), arg("threads"));
    module.def("chunks", chunks, arg("sizes"), "(tensor, begin, end) of every chunk a pass over these sizes is cut into.");
    module.def("cpu_units", cpu_units);
    module.def("cpu_unit", [] { return std::string(unit_in_use().name); });
    module.def("use_cpu_unit", use_cpu_unit, arg("name"));
    module.def("cuda_devices", list_cuda_devices, "([(name, major, minor), …], error text)");
    module.attr("CUDA_BUILD") = SSIUU_CUDA_BUILD;
#if defined(SSIUU_WITH_CUDA)
    bind_cuda(module);
    module.attr("CUDA_BUILT") = true;
#else
    module.attr("CUDA_BUILT") = false;
#endif
}
