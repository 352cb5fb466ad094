// AVX2 with fused multiply-add; a tile of 6 rows fits its 16 vector registers.

#include "kernel.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")

#define TURNFAST_ISA avx2
#define TURNFAST_LANES 8
#define TURNFAST_ROWS 6
#define TURNFAST_AVX512 0
#define TURNFAST_PAIRS 0
#define TURNFAST_AMX 0

#include "kernel_impl.h"

#pragma GCC pop_options

namespace turnfast {

extern constinit const Kernel kAvx2 = avx2::table(
    "avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); });

}  // namespace turnfast
#endif
