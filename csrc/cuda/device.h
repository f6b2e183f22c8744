// The CUDA devices of this machine, for `info`.
#pragma once

#include <string>
#include <vector>

namespace ssiuu {

struct CudaDevice {
    std::string name;
    int major, minor;
};

// Empty with `error` set to the runtime's own text if they can't be listed (no driver, no device).
std::vector<CudaDevice> cuda_devices(std::string& error);

} // namespace ssiuu
