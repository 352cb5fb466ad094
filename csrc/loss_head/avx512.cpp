// AVX-512 without bf16 products: bf16 heads are widened block by block.

#include "kernel.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")

#define TURNFAST_ISA avx512
#define TURNFAST_PAIRS 0
#define TURNFAST_AMX 0

#include "avx512.h"

#include "kernel_impl.h"

#pragma GCC pop_options

namespace turnfast {

extern constinit const Kernel kAvx512 = avx512::table("avx512", [] {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
});

}  // namespace turnfast
#endif
