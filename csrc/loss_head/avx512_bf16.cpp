// AVX-512 with dot products of bf16 pairs (Zen 4, Cooper Lake, Sapphire Rapids and later).

#include "kernel.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")

#define TURNFAST_ISA avx512_bf16
#define TURNFAST_PAIRS 1
#define TURNFAST_AMX 0

#include "avx512.h"

namespace turnfast::avx512_bf16 {
namespace {

// c + a.low b.low + a.high b.high in float, per lane.
inline __attribute__((always_inline)) Lanes dot_pairs(uint32_t a, Lanes b, Lanes c) {
  return reinterpret_cast<Lanes>(_mm512_dpbf16_ps(
      reinterpret_cast<__m512>(c), (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b));
}

}  // namespace
}  // namespace turnfast::avx512_bf16

#include "kernel_impl.h"

#pragma GCC pop_options

namespace turnfast {

extern constinit const Kernel kAvx512Bf16 = avx512_bf16::table("avx512_bf16", [] {
  return kAvx512.supported() && __builtin_cpu_supports("avx512bf16");
});

}  // namespace turnfast
#endif
