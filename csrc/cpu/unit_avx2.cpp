// x86-64 with AVX2 and F16C; compiled with their flags, and entered only after CPUID has shown both.
#define SSIUU_UNIT avx2
#define SSIUU_UNIT_NAME "avx2"
#include "unit.inc"
