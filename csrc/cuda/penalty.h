// penalty_ on the device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "ssiuu/types.h"

namespace ssiuu {

// Loads the kernels on the current device; throws where it can't run them.
void load_penalty_kernels();

// Bytes that the call needs beside its tensors: the table of `tensors` rows and the sums of each block.
std::int64_t cuda_penalty_workspace(std::int64_t tensors, int device);

// One pass over all tensors, on `stream`, without waiting for it. weight: one fp32 on the device, or null to take
// options.weight. workspace: 16-byte aligned, of cuda_penalty_workspace bytes. floats[2]: penalty, gradient_square;
// integers[1]: negative; nonfinite: one count a tensor. All results are on the device.
void cuda_penalty(const std::vector<PenaltyTensor>& tensors, const PenaltyOptions& options, const float* weight,
                  void* workspace, double* floats, long long* integers, unsigned long long* nonfinite, int device,
                  cudaStream_t stream);

} // namespace ssiuu
