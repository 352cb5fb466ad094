// Runs on every machine: all 64-bit targets have 128-bit vectors.

#include "kernel.h"

#define TURNFAST_ISA portable
#define TURNFAST_LANES 4
#define TURNFAST_ROWS 6
#define TURNFAST_AVX512 0
#define TURNFAST_PAIRS 0
#define TURNFAST_AMX 0

#include "kernel_impl.h"

namespace turnfast {

extern constinit const Kernel kPortable = portable::table("portable", [] { return true; });

}  // namespace turnfast
