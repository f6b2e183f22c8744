// The CUDA sources themselves, host code and kernels, as a module that runs on the CPU. Nothing in them knows of it:
// the headers beside this file stand in for the toolkit's.
#include "cuda/neuron.cu"
#include "cuda/penalty.cu"

#include "cuda/bindings.cpp"
#include "cuda/penalty_table.cpp"

PYBIND11_MODULE(emulated, module) { ssiuu::bind_cuda(module); }
