// The register tile that all three matrix products run through.

#pragma once

#include "vector.h"

namespace turnfast::TURNFAST_ISA {
namespace {

// How a register tile of kRows broadcast rows by NR lanes is multiplied. kInRegisters: the sums
// stay in vector registers. kGAlongK: the rows of G in the d-hidden product lie along the summed
// index; those of the other products always do. Shapes: an object that exists during products.
struct NoShapes {};

struct MulFloat {
  using Shapes = NoShapes;
  static constexpr int kRows = MR;
  static constexpr bool kInRegisters = true, kGAlongK = false;
  static TF_INLINE F add(uint32_t a, F b, F c) {
    float x;
    __builtin_memcpy(&x, &a, 4);
    return x * b + c;
  }
};

#if TURNFAST_AMX
struct MulPairs {
  using Shapes = TileShapes;
  static constexpr int kRows = 32;
  static constexpr bool kInRegisters = false, kGAlongK = true;
};
#elif TURNFAST_PAIRS
struct MulPairs : MulFloat {
  static TF_INLINE F add(uint32_t a, F b, F c) { return dot_pairs(a, b, c); }
};
#else
using MulPairs = MulFloat;
#endif
static_assert(kBlock % MulPairs::kRows == 0);

// acc[i][lane] = sum_k a(i, k) b(k, lane) for all rows; a(i, k) = a[i * ld + k] with kAlongK, else
// a[i + k * ld]; b is a packed panel [k][NR].
template <class Mul, bool kAlongK>
  requires Mul::kInRegisters
TF_INLINE void multiply(const uint32_t* a, int64_t ld, const float* b, int64_t k,
                        F (&acc)[Mul::kRows][2]) {
#pragma GCC unroll 16
  for (int i = 0; i < Mul::kRows; ++i) acc[i][0] = acc[i][1] = F{};
  for (int64_t step = 0; step < k; ++step) {
    const F b0 = load(b);
    const F b1 = load(b + L);
    b += NR;
#pragma GCC unroll 16
    for (int i = 0; i < Mul::kRows; ++i) {
      const uint32_t x = kAlongK ? a[i * ld] : a[i];
      acc[i][0] = Mul::add(x, b0, acc[i][0]);
      acc[i][1] = Mul::add(x, b1, acc[i][1]);
    }
    a += kAlongK ? 1 : ld;
  }
}

#if TURNFAST_AMX
template <class Mul, bool kAlongK>
  requires(!Mul::kInRegisters && kAlongK)
TF_INLINE void multiply(const uint32_t* a, int64_t ld, const float* b, int64_t k,
                        F (&acc)[Mul::kRows][2]) {
  multiply_tiles(a, ld, b, k, acc);
}
#endif

// c[i][lane] = or += the tile. The old value is added last, so the rounding error of a sum over the
// vocabulary grows with the number of blocks, not with the number of terms.
template <class Mul, bool kAlongK>
__attribute__((noinline)) void tile(const uint32_t* a, int64_t ld, const float* b, int64_t k,
                                    float* c, int64_t ldc, bool add) {
  F acc[Mul::kRows][2];
  multiply<Mul, kAlongK>(a, ld, b, k, acc);
  if (add) {
#pragma GCC unroll 16
    for (int i = 0; i < Mul::kRows; ++i) {
      acc[i][0] += load(c + i * ldc);
      acc[i][1] += load(c + i * ldc + L);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Mul::kRows; ++i) {
    store(c + i * ldc, acc[i][0]);
    store(c + i * ldc + L, acc[i][1]);
  }
}

}  // namespace
}  // namespace turnfast::TURNFAST_ISA
