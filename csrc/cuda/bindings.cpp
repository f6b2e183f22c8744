// Addresses, sizes, dtype codes and a stream in; results stay on the device. Checks are made in ssiuu_fast/ops.
#include "bindings.h"

#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "flat.h"
#include "launch.h"
#include "neuron.h"
#include "penalty.h"
#include "penalty_table.h"

namespace ssiuu {
namespace {

namespace py = pybind11;

using Table = std::vector<std::int64_t>;
cudaStream_t stream_of(std::int64_t stream) { return pointer<std::remove_pointer_t<cudaStream_t>>(stream); }

std::string obstacle(int device) {
    try {
        use_device(device);
        load_penalty_kernels();
        load_neuron_kernels();
    } catch (const std::runtime_error& error) {
        return error.what();
    }
    return "";
}

void run_penalty(const Table& table, double weight, std::int64_t weight_tensor, double gradient_scale, bool one_sided,
                 bool update_references, bool first, std::int64_t workspace, std::int64_t floats,
                 std::int64_t integers, std::int64_t nonfinite, int device, std::int64_t stream) {
    cuda_penalty(penalty_tensors(table), {weight, gradient_scale, one_sided, update_references, first},
                 pointer<float>(weight_tensor), pointer<void>(workspace), pointer<double>(floats),
                 pointer<long long>(integers), pointer<unsigned long long>(nonfinite), device, stream_of(stream));
}

// (first chunk, aligned) of every row, and the number of chunks
std::tuple<std::vector<std::tuple<std::int64_t, bool>>, std::int64_t> table_rows(const Table& table) {
    const PenaltyTable packed = penalty_table(penalty_tensors(table));
    std::vector<std::tuple<std::int64_t, bool>> rows;
    for (const PenaltyRow& row : packed.rows) rows.emplace_back(row.first_chunk, row.aligned);
    return {rows, packed.chunks};
}

void run_neuron_attribution(const NeuronNumbers& tensors, std::int64_t max, std::int64_t min, std::int64_t sum,
                            std::int64_t workspace, int device, std::int64_t stream) {
    cuda_neuron_attribution(neuron_tensors(tensors), pointer<float>(max), pointer<float>(min), pointer<float>(sum),
                            pointer<void>(workspace), device, stream_of(stream));
}

void run_neuron_penalty(const NeuronNumbers& tensors, std::int64_t reference, std::int64_t attribution, double weight,
                        std::int64_t weight_tensor, bool per_sample, bool one_sided, std::int64_t workspace,
                        std::int64_t floats, std::int64_t integers, int device, std::int64_t stream) {
    cuda_neuron_penalty(neuron_tensors(tensors),
                        {pointer<float>(reference), pointer<float>(attribution), pointer<float>(weight_tensor), weight,
                         per_sample, one_sided},
                        pointer<void>(workspace), pointer<double>(floats), pointer<long long>(integers), device,
                        stream_of(stream));
}

} // namespace

void bind_cuda(py::module_& module) {
    using py::arg;
    // without the interpreter lock: a launch waits where the device's queue is full
    const auto unlocked = py::call_guard<py::gil_scoped_release>();
    module.def("cuda_obstacle", obstacle, arg("device"), unlocked,
               "Why the device can't run what was built, or nothing; loads every kernel.");
    module.def("cuda_penalty_workspace", &cuda_penalty_workspace, arg("tensors"), arg("device"),
               "Bytes beside the tensors, for a list of so many.");
    module.def("cuda_penalty", run_penalty, arg("table"), arg("weight"), arg("weight_tensor"), arg("gradient_scale"),
               arg("one_sided"), arg("update_references"), arg("first"), arg("workspace"), arg("floats"),
               arg("integers"), arg("nonfinite"), arg("device"), arg("stream"), unlocked,
               "Results on the device: floats[2] penalty and gradient_square, integers[1] negative, nonfinite[tensors].");
    module.def("cuda_penalty_rows", table_rows, arg("table"), "([(first chunk, aligned), …], chunks), for tests.");
    module.def(
        "cuda_neuron_attribution_workspace",
        [](const NeuronNumbers& n, int device) { return cuda_neuron_attribution_workspace(neuron_tensors(n), device); },
        arg("tensors"), arg("device"));
    module.def("cuda_neuron_attribution", run_neuron_attribution, arg("tensors"), arg("max"), arg("min"), arg("sum"),
               arg("workspace"), arg("device"), arg("stream"), unlocked);
    module.def(
        "cuda_neuron_penalty_workspace",
        [](const NeuronNumbers& n, bool per_sample, int device) {
            return cuda_neuron_penalty_workspace(neuron_tensors(n), per_sample, device);
        },
        arg("tensors"), arg("per_sample"), arg("device"));
    module.def("cuda_neuron_penalty", run_neuron_penalty, arg("tensors"), arg("reference"), arg("attribution"),
               arg("weight"), arg("weight_tensor"), arg("per_sample"), arg("one_sided"), arg("workspace"),
               arg("floats"), arg("integers"), arg("device"), arg("stream"), unlocked);
    module.def(
        "cuda_token_splits",
        [](const NeuronNumbers& n, std::int64_t resident) {
            const TokenSplits splits = split_tokens(neuron_tensors(n), resident);
            return std::tuple(splits.count, splits.length);
        },
        arg("tensors"), arg("resident"), "(number of splits, tokens in each)");
}

} // namespace ssiuu
