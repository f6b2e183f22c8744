// Which instruction-set units this processor can run, and which one is in use.
#include <atomic>
#include <cstring>

#include "kernels.h"

namespace ssiuu {

namespace baseline { extern const CpuKernels kernels; }
#if defined(SSIUU_HAS_AVX2)
namespace avx2 { extern const CpuKernels kernels; }
#endif

namespace {

struct Units {
    const CpuKernels* list[2];
    int count = 0;

    Units() {
        list[count++] = &baseline::kernels;
#if defined(SSIUU_HAS_AVX2)
        // the compiler's own test asks the operating system too (xgetbv)
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) list[count++] = &avx2::kernels;
#endif
    }
};

const Units& units() {
    static const Units found;
    return found;
}

std::atomic<const CpuKernels*> chosen{nullptr};

} // namespace

const CpuKernels* const* usable_units(int& count) {
    count = units().count;
    return units().list;
}

const CpuKernels& unit_in_use() {
    const CpuKernels* unit = chosen.load();
    return unit ? *unit : *units().list[units().count - 1];
}

bool use_unit(const char* name) {
    for (int i = 0; i < units().count; ++i) {
        if (std::strcmp(units().list[i]->name, name) == 0) {
            chosen.store(units().list[i]);
            return true;
        }
    }
    return false;
}

} // namespace ssiuu
