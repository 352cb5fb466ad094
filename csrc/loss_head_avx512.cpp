// AVX-512 without bf16 products: bf16 heads are widened block by block.

#include "loss_head_kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")

#define TURNFAST_ISA avx512
#define TURNFAST_LANES 16
#define TURNFAST_ROWS 12
#define TURNFAST_SCALE 1
#define TURNFAST_PAIRS 0

namespace turnfast::avx512 {
namespace {

typedef float Lanes __attribute__((vector_size(64)));

// p * 2^n, 0 or infinite where that leaves the range.
inline __attribute__((always_inline)) Lanes scale(Lanes p, Lanes n) {
  return reinterpret_cast<Lanes>(
      _mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
}

}  // namespace
}  // namespace turnfast::avx512

#include "loss_head_kernel_impl.h"

#pragma GCC pop_options

namespace turnfast {

extern constinit const Kernel kAvx512 = avx512::table("avx512", [] {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
});

}  // namespace turnfast
#endif
