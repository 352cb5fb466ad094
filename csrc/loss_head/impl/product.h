// The register tile that all three matrix products run through, and the layouts that it reads.

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

// Units of n elements along a summed index, rounded up to what one tile instruction reads.
int64_t units(const Head& head, int64_t n) {
  if (!use_pairs(head)) return n;
  return round_up((n + 1) / 2, TURNFAST_AMX ? 16 : 1);
}

int64_t panel_bytes(const Head& head, int64_t C, bool scaled) {
  const int64_t k = scaled ? units(head, C) : units(head, head.D);
  const int64_t width = round_up(scaled ? head.D : C, NR);
  return k * width * 4;
}

// Packs tokens; panel p is [units of D][NR tokens].
void pack_tokens(const Head& head, const void* x, int64_t C, int64_t begin, int64_t end,
                 void* out) {
  const int64_t k = units(head, head.D);
  const bool pairs = use_pairs(head);
  for (int64_t p = begin; p < end; ++p) {
    auto* panel = static_cast<uint32_t*>(out) + p * k * NR;
    for (int64_t lane = 0; lane < NR; ++lane) {
      const int64_t n = p * NR + lane;
      if (n >= C) {
        for (int64_t i = 0; i < k; ++i) panel[i * NR + lane] = 0;
        continue;
      }
      const char* row = at(x, head.type, n * head.D);
      if (pairs || head.type == Type::kFloat) {
        const int64_t full_units = pairs ? head.D / 2 : head.D;
        for (int64_t i = 0; i < full_units; ++i) {
          __builtin_memcpy(panel + i * NR + lane, row + 4 * i, 4);
        }
        for (int64_t i = full_units; i < k; ++i) {
          uint16_t last = 0;
          if (2 * i < head.D) __builtin_memcpy(&last, row + 4 * i, 2);
          panel[i * NR + lane] = last;
        }
        continue;
      }
      for (int64_t d = 0; d < head.D; d += L) {
        const int64_t m = head.D - d < L ? head.D - d : L;
        const U wide = as_bits(load_some(row + 2 * d, head.type, m));
        for (int64_t i = 0; i < m; ++i) panel[(d + i) * NR + lane] = wide[i];
      }
    }
  }
}

// Packs tokens times their scales; panel p is [units of C][NR hidden columns].
void pack_scaled(const Head& head, const void* x, const float* row_scales, int64_t C, int64_t begin,
                 int64_t end, void* out) {
  const int64_t k = units(head, C);
  const auto scaled = [&](int64_t n, int64_t d) {
    if (n >= C || d >= head.D) return F{};
    return load_some(at(x, head.type, n * head.D + d), head.type, head.D - d) * row_scales[n];
  };
  for (int64_t p = begin; p < end; ++p) {
    auto* panel = static_cast<uint32_t*>(out) + p * k * NR;
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t lane = 0; lane < NR; lane += L) {
        const int64_t d = p * NR + lane;
        if (use_pairs(head)) {
          const U low = from_halves(narrow(scaled(2 * i, d)));
          const U high = from_halves(narrow(scaled(2 * i + 1, d)));
          store(panel + i * NR + lane, as_float(low | (high << 16)));
        } else {
          store(panel + i * NR + lane, scaled(i, d));
        }
      }
    }
  }
}

// Packs vocabulary rows [v, v + n) as the lanes of the d-hidden product; panel j is
// [units of n][NR hidden columns].
void pack_weight(const Head& head, int64_t v, int64_t n, float* out) {
  const int64_t k = units(head, n);
  const int64_t panels = round_up(head.D, NR) / NR;
  for (int64_t i = 0; i < k; ++i) {
    const int64_t first = use_pairs(head) ? 2 * i : i;
    const char* row = at(head.weight, head.type, (v + first) * head.D);
    const bool is_padding = first >= n, is_last = first + 1 >= n;
    for (int64_t j = 0; j < panels; ++j) {
      for (int64_t lane = 0; lane < NR; lane += L) {
        const int64_t d = j * NR + lane;
        float* to = out + (j * k + i) * NR + lane;
        if (is_padding || d >= head.D) {
          store(to, F{});
        } else if (!use_pairs(head)) {
          store(to, load_some(row + d * bytes(head.type), head.type, head.D - d));
        } else {
          const U low = as_bits(load_some(row + 2 * d, head.type, head.D - d)) >> 16;
          const U high =
              is_last ? U{} : as_bits(load_some(row + 2 * (head.D + d), head.type, head.D - d));
          store(to, as_float(low | high));
        }
      }
    }
  }
}

// Returns rows [v, v + count) of W as broadcast rows: W itself where its layout allows, else a copy
// with zero rows past `end`.
const uint32_t* broadcast_rows(const Head& head, int64_t v, int64_t count, int64_t end, float* copy,
                               int64_t* ld) {
  const bool pairs = use_pairs(head);
  *ld = units(head, head.D);
  const bool in_place = pairs ? head.D == 2 * *ld : head.type == Type::kFloat;
  if (in_place && v + count <= end) {
    return reinterpret_cast<const uint32_t*>(at(head.weight, head.type, v * head.D));
  }
  for (int64_t i = 0; i < count; ++i) {
    float* to = copy + i * *ld;
    if (v + i >= end) {
      for (int64_t d = 0; d < *ld; ++d) to[d] = 0.0f;
      continue;
    }
    const char* row = at(head.weight, head.type, (v + i) * head.D);
    if (pairs) {
      for (int64_t d = head.D / 2; d < *ld; ++d) to[d] = 0.0f;
      __builtin_memcpy(to, row, 2 * head.D);
      continue;
    }
    for (int64_t d = 0; d < head.D; d += L) {
      store_some(to + d, load_some(row + d * bytes(head.type), head.type, head.D - d), head.D - d);
    }
  }
  return reinterpret_cast<const uint32_t*>(copy);
}

}  // namespace
}  // namespace turnfast::TURNFAST_ISA
