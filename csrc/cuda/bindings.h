// The CUDA part of ssiuu_fast._C.
#pragma once

#include <pybind11/pybind11.h>

namespace ssiuu {

void bind_cuda(pybind11::module_& module);

} // namespace ssiuu
