// What every processor of the architecture runs.
#define SSIUU_UNIT baseline
#define SSIUU_UNIT_NAME "baseline"
#include "unit.inc"
