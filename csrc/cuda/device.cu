#include <cuda_runtime_api.h>

#include "device.h"

namespace ssiuu {
namespace {

std::string text(cudaError_t code) {
    return std::string(cudaGetErrorString(code)) + " (error " + std::to_string(int(code)) + ")";
}

} // namespace

std::vector<CudaDevice> cuda_devices(std::string& error) {
    std::vector<CudaDevice> devices;
    int count = 0;
    cudaError_t code = cudaGetDeviceCount(&count);
    for (int i = 0; code == cudaSuccess && i < count; ++i) {
        cudaDeviceProp properties;
        code = cudaGetDeviceProperties(&properties, i);
        if (code == cudaSuccess) devices.push_back({properties.name, properties.major, properties.minor});
    }
    if (code != cudaSuccess) {
        error = text(code);
        devices.clear();
    }
    return devices;
}

} // namespace ssiuu
