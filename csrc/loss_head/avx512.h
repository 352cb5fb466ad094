// Shared by the AVX-512 kernels, which set the compiler's target, TURNFAST_ISA and TURNFAST_PAIRS
// first: the vector size, and functions for which the compiler does not find the instruction. All
// masks are ones: GCC warns about its own header in the forms without a mask.

#define TURNFAST_LANES 16
#define TURNFAST_ROWS 12
#define TURNFAST_AVX512 1

#include <immintrin.h>

#include <cstdint>

namespace turnfast::TURNFAST_ISA {
namespace {

typedef float Lanes __attribute__((vector_size(64)));
typedef uint32_t WordLanes __attribute__((vector_size(64)));
typedef uint16_t HalfLanes __attribute__((vector_size(32)));
typedef int8_t ByteLanes __attribute__((vector_size(16)));

// p * 2^n; 0 or infinity outside the range.
inline __attribute__((always_inline)) Lanes scale(Lanes p, Lanes n) {
  return (Lanes)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);
}

inline __attribute__((always_inline)) WordLanes from_halves(HalfLanes x) {
  return (WordLanes)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)x);
}

// Sign-extends each byte.
inline __attribute__((always_inline)) WordLanes from_bytes(ByteLanes x) {
  return (WordLanes)_mm512_maskz_cvtepi8_epi32(0xffff, (__m128i)x);
}

// Keeps the low bits.
inline __attribute__((always_inline)) HalfLanes to_halves(WordLanes x) {
  return (HalfLanes)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)x);
}

inline __attribute__((always_inline)) ByteLanes to_bytes(WordLanes x) {
  return (ByteLanes)_mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)x);
}

#if TURNFAST_PAIRS
// Rounds to bf16, to nearest even.
inline __attribute__((always_inline)) HalfLanes narrow(Lanes x) {
  return (HalfLanes)_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x));
}
#endif

}  // namespace
}  // namespace turnfast::TURNFAST_ISA
