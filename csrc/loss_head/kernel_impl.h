// The inner loops for one instruction set. The including file has set the compiler's target and
//   TURNFAST_ISA     namespace of this copy
//   TURNFAST_LANES   floats per vector
//   TURNFAST_ROWS    broadcast rows per register tile
//   TURNFAST_AVX512  1: loss_head_avx512.h is included
//   TURNFAST_PAIRS   1: bf16 heads use products of bf16 pairs (`narrow` is defined)
//   TURNFAST_AMX     1: of whole tiles (`TileShapes`, `multiply_tiles`, `transpose` are defined);
//                    0: of vectors (`dot_pairs` is defined)
//
// "Unit" below is 4 bytes: one float, or a pair of bf16 that lie next to each other along the
// summed index. With units, the float and the bf16 products are the same loop.

namespace turnfast::TURNFAST_ISA {
namespace {

constexpr int L = TURNFAST_LANES;
constexpr int NR = 2 * L;
constexpr int MR = TURNFAST_ROWS;
static_assert(kBlock % MR == 0);

typedef float F __attribute__((vector_size(4 * L)));
typedef int32_t I __attribute__((vector_size(4 * L)));
typedef uint32_t U __attribute__((vector_size(4 * L)));
typedef uint16_t H __attribute__((vector_size(2 * L)));
typedef int8_t B __attribute__((vector_size(L)));
// Any address, any type: what loads and stores go through.
typedef float Fu __attribute__((vector_size(4 * L), aligned(4), may_alias));
typedef int32_t Iu __attribute__((vector_size(4 * L), aligned(4), may_alias));
typedef uint32_t Uu __attribute__((vector_size(4 * L), aligned(2), may_alias));
typedef uint16_t Hu __attribute__((vector_size(2 * L), aligned(2), may_alias));
typedef int8_t Bu __attribute__((vector_size(L), aligned(1), may_alias));

#define TF_INLINE inline __attribute__((always_inline))

TF_INLINE F load(const void* p) { return *static_cast<const Fu*>(p); }
TF_INLINE void store(void* p, F x) { *static_cast<Fu*>(p) = x; }
TF_INLINE F splat(float x) { return x - F{}; }
TF_INLINE F as_float(U x) { return reinterpret_cast<F>(x); }
TF_INLINE U as_bits(F x) { return reinterpret_cast<U>(x); }
TF_INLINE F select(I mask, F yes, F no) { return mask ? yes : no; }
TF_INLINE F at_least(F x, float low) { return select(x < low, splat(low), x); }
TF_INLINE F at_most(F x, float high) { return select(x > high, splat(high), x); }

// exp(r) for |r| <= log(2) / 2, degree 6, relative error 1e-8 before rounding.
TF_INLINE F exp_reduced(F r) {
  F p = r * 1.3814465e-3f + 8.3687808e-3f;
  p = p * r + 4.1668393e-2f;
  p = p * r + 1.66665196e-1f;
  p = p * r + 4.9999994e-1f;
  p = p * r + 1.0f;
  return p * r + 1.0f;
}

constexpr float kLog2E = 1.44269504f;
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
// log(2) in two parts; products of the first with small integers are exact.
constexpr float kLog2High = 0.693359375f, kLog2Low = -2.12194440e-4f;

// exp(x) for x in [-87, 88], clamped outside; relative error below 2e-7. NaN stays NaN: the clamps
// compare false, and the power of two is multiplied in rather than added to the exponent bits.
TF_INLINE F exp_clamped(F x) {
  x = at_most(at_least(x, -87.0f), 88.0f);
  const F shifted = x * kLog2E + kRound;
  const F n = shifted - kRound;
  const F p = exp_reduced((x - n * kLog2High) - n * kLog2Low);
  return p * as_float((as_bits(shifted) << 23) + 0x3f800000u);
}

// exp(x) for |x| < 1e5 with the same error in [-87, 88]; below, something from 0 to 1.7e-38; above,
// anything, since sums with such terms are taken again with another anchor.
TF_INLINE F exp_anchored(F x) {
#if TURNFAST_AVX512
  const F n = (x * kLog2E + kRound) - kRound;
  return scale(exp_reduced((x - n * kLog2High) - n * kLog2Low), n);
#else
  return exp_clamped(x);
#endif
}

// log(x) for normal x > 0: absolute error below 2e-7 + 1e-7 |log x|.
TF_INLINE F log_normal(F x) {
  // Mantissa in [sqrt(1/2), sqrt(2)).
  const U shifted = as_bits(x) - 0x3f3504f3u;
  const I exponent = reinterpret_cast<I>(shifted) >> 23;
  const F m = as_float((shifted & 0x007fffffu) + 0x3f3504f3u);
  const F s = (m - 1.0f) / (m + 1.0f);
  const F t = s * s;
  F p = t * 1.4939587e-1f + 1.9988643e-1f;
  p = p * t + 3.3333388e-1f;
  const F n = __builtin_convertvector(exponent, F);
  return n * kLog2High + ((s + s) * (p * t) + (n * kLog2Low + (s + s)));
}

TF_INLINE F tanh_clamped(F y) {
  const F t = y * y;
  F p = t * -5.7165796e-3f + 2.0650189e-2f;
  p = p * t + -5.3743381e-2f;
  p = p * t + 1.33314893e-1f;
  p = p * t + -3.33332837e-1f;
  const F small = p * t * y + y;
  const F large = 1.0f - 2.0f / (exp_clamped(y + y) + 1.0f);
  return select(t < 0.39f, small, large);
}

TF_INLINE F times(F x, Factor factor) { return x * factor.high + x * factor.low; }

TF_INLINE F logits(const Head& head, F dot) {
  if (head.capped) dot = tanh_clamped(times(dot, head.into_cap));
  return times(dot, head.scale);
}

#if !TURNFAST_AVX512
TF_INLINE U from_halves(H x) { return __builtin_convertvector(x, U); }
TF_INLINE U from_bytes(B x) { return reinterpret_cast<U>(__builtin_convertvector(x, I)); }
TF_INLINE H to_halves(U x) { return __builtin_convertvector(x, H); }
TF_INLINE B to_bytes(U x) { return __builtin_convertvector(reinterpret_cast<I>(x), B); }
#endif

// --- element types -------------------------------------------------------------------------------

TF_INLINE F widen(H bits, Type type) {
  const U x = from_halves(bits);
  if (type == Type::kBFloat16) return as_float(x << 16);
  // Half: moving the exponent into place and scaling is right for subnormals too.
  const U magnitude = (x & 0x7fffu) << 13;
  const F scaled = as_float(magnitude) * 0x1p112f;
  const F special = as_float(magnitude | 0x7f800000u);
  const F value = select(reinterpret_cast<I>((x & 0x7c00u) == 0x7c00u), special, scaled);
  return as_float(as_bits(value) | ((x & 0x8000u) << 16));
}

TF_INLINE int64_t bytes(Type type) { return type == Type::kFloat ? 4 : 2; }

TF_INLINE const char* at(const void* base, Type type, int64_t index) {
  return static_cast<const char*>(base) + index * bytes(type);
}

// `n` <= L elements as floats, zeros behind them.
TF_INLINE F load_some(const void* p, Type type, int64_t n) {
  if (n >= L) {
    if (type == Type::kFloat) return load(p);
    return widen(*static_cast<const Hu*>(p), type);
  }
  if (type == Type::kFloat) {
    F x{};
    __builtin_memcpy(&x, p, 4 * n);
    return x;
  }
  H x{};
  __builtin_memcpy(&x, p, 2 * n);
  return widen(x, type);
}

TF_INLINE void store_some(float* p, F x, int64_t n) {
  if (n >= L) return store(p, x);
  __builtin_memcpy(p, &x, 4 * n);
}

TF_INLINE H load_halves(const uint16_t* p, int64_t n) {
  if (n >= L) return *reinterpret_cast<const Hu*>(p);
  H x{};
  if (n > 0) __builtin_memcpy(&x, p, 2 * n);
  return x;
}

TF_INLINE void store_halves(uint16_t* p, H x, int64_t n) {
  if (n >= L) {
    *reinterpret_cast<Hu*>(p) = x;
  } else if (n > 0) {
    __builtin_memcpy(p, &x, 2 * n);
  }
}

// The bits of a value rounded to 20 bits, as the first 16 rounded to nearest and a signed rest; a
// carry into the exponent is right, too.
struct Halved {
  U high, rest;
};

TF_INLINE Halved halved(F value) {
  const U bits = (as_bits(value) + 0x800u) >> 12;
  const U high = (bits + 8u) >> 4;
  return {high, bits - (high << 4)};
}

// Adds (a, b) to hidden columns [d, d + NR) of row v, or writes them there; columns past D are left
// out. d: a multiple of NR. The rests of column i and i + L share a byte.
TF_INLINE void add_gradient(const HeadGradient& g, int64_t D, bool first, int64_t v, int64_t d, F a,
                            F b) {
  const int64_t n = D - d;
  if (g.whole != nullptr) {
    float* to = g.whole + v * D + d;
    store_some(to, first ? a : load_some(to, Type::kFloat, n) + a, n);
    if (n > L) store_some(to + L, first ? b : load_some(to + L, Type::kFloat, n - L) + b, n - L);
    return;
  }
  uint16_t* high = g.high + v * D + d;
  auto* rests = reinterpret_cast<Bu*>(g.low + v * g.low_row + d / 2);
  if (!first) {
    const U both = from_bytes(*rests);
    const U rest_a = reinterpret_cast<U>(reinterpret_cast<I>(both << 28) >> 16);
    const U rest_b = (both & ~15u) << 8;
    a += as_float((from_halves(load_halves(high, n)) << 16) + rest_a);
    b += as_float((from_halves(load_halves(high + L, n - L)) << 16) + rest_b);
  }
  const Halved x = halved(a), y = halved(b);
  store_halves(high, to_halves(x.high), n);
  store_halves(high + L, to_halves(y.high), n - L);
  *rests = to_bytes((x.rest & 15u) | (y.rest << 4));
}

#if !TURNFAST_PAIRS
// Never called: without products of pairs nothing is narrowed to bf16.
TF_INLINE H narrow(F) { return H{}; }
#endif

TF_INLINE bool use_pairs(const Head& head) {
  return TURNFAST_PAIRS && head.type == Type::kBFloat16;
}

// --- the register tile ---------------------------------------------------------------------------

// A product's register tile: kRows broadcast rows by NR lanes. Its rows lie along k in memory but
// for G in the d-hidden product, where kGAlongK says so. Shapes is what lives during products.
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

// c[i][lane] (+)= the tile. What is there is added last: sums over the vocabulary then have two
// levels, and their error grows with the number of blocks instead of the number of terms.
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

// --- packing -------------------------------------------------------------------------------------

// Units along a summed index, zeros behind the last: tiles take 16 at a time.
int64_t units(const Head& head, int64_t n) {
  if (!use_pairs(head)) return n;
  return round_up((n + 1) / 2, TURNFAST_AMX ? 16 : 1);
}

int64_t panel_bytes(const Head& head, int64_t C, bool scaled) {
  const int64_t k = scaled ? units(head, C) : units(head, head.D);
  const int64_t width = round_up(scaled ? head.D : C, NR);
  return k * width * 4;
}

// Panel p: [units of D][NR tokens].
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
        const int64_t whole = pairs ? head.D / 2 : head.D;
        for (int64_t i = 0; i < whole; ++i) __builtin_memcpy(panel + i * NR + lane, row + 4 * i, 4);
        for (int64_t i = whole; i < k; ++i) {
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

// Panel p: [units of C][NR hidden columns] of x times the token's scale.
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

// Vocabulary rows [v, v + n) as the lanes of the d-hidden product: panel j is
// [units of n][NR hidden columns].
void pack_weight(const Head& head, int64_t v, int64_t n, float* out) {
  const int64_t k = units(head, n);
  const int64_t panels = round_up(head.D, NR) / NR;
  for (int64_t i = 0; i < k; ++i) {
    const int64_t first = use_pairs(head) ? 2 * i : i;
    const char* row = at(head.weight, head.type, (v + first) * head.D);
    const bool none = first >= n, lone = first + 1 >= n;
    for (int64_t j = 0; j < panels; ++j) {
      for (int64_t lane = 0; lane < NR; lane += L) {
        const int64_t d = j * NR + lane;
        float* to = out + (j * k + i) * NR + lane;
        if (none || d >= head.D) {
          store(to, F{});
        } else if (!use_pairs(head)) {
          store(to, load_some(row + d * bytes(head.type), head.type, head.D - d));
        } else {
          const U low = as_bits(load_some(row + 2 * d, head.type, head.D - d)) >> 16;
          const U high =
              lone ? U{} : as_bits(load_some(row + 2 * (head.D + d), head.type, head.D - d));
          store(to, as_float(low | high));
        }
      }
    }
  }
}

// Rows [v, v + count) as broadcast rows: in place where their memory has the right form, else a copy
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

// --- scratch -------------------------------------------------------------------------------------

// Vocabulary rows worked on at a time. More rows amortise loading and storing the tiles of dX,
// fewer keep the packed weight and G in the second-level cache.
int64_t block_rows(const Head& head, int64_t C) {
  constexpr int64_t kBytes = 352 << 10;
  const int64_t longest = head.D > C / 2 ? head.D : C / 2;
  const int64_t rows = kBytes / (longest * (use_pairs(head) ? 2 : 4)) / kBlock * kBlock;
  return rows < kBlock ? kBlock : rows > 2 * kBlock ? 2 * kBlock : rows;
}

// Rows of dW that are summed over a chunk's tokens before they go to memory: a panel of tokens is
// read once per tile of them.
template <class Mul>
constexpr int kStrip = Mul::kInRegisters ? 4 * Mul::kRows : 2 * Mul::kRows;

// Of one worker, in floats. rows: those of W on the way in, kStrip of dW on the way out. sums:
// four of the tokens. weight: the packed block of W. g_rows, g_pairs: G of the block in both forms.
struct Layout {
  int64_t rows, sums, weight, g_rows, g_pairs, end;
};

Layout layout(const Head& head, int64_t C) {
  const int64_t width = round_up(head.D, NR);
  const int64_t ld = round_up(C, NR);
  const int64_t rows = block_rows(head, C);
  Layout at{};
  at.sums = at.rows + (use_pairs(head) ? kStrip<MulPairs> : kStrip<MulFloat>)*width;
  at.weight = at.sums + 4 * ld;
  at.g_rows = at.weight + units(head, rows) * width;
  at.g_pairs = at.g_rows + rows * ld + NR;
  at.end = at.g_pairs + (use_pairs(head) ? units(head, rows) * ld + NR : 0);
  return at;
}

int64_t scratch_floats(const Head& head, int64_t C) { return round_up(layout(head, C).end, 16); }

// --- G = dz / (a factor of the token) ------------------------------------------------------------

// dz from E where a token's row is not one factor times E: entropy bonus, soft cap. z - anchor is
// log E, so no logits are kept.
TF_INLINE F coefficient(const Head& head, const BackwardChunk& chunk, F e, int64_t n) {
  const F u = log_normal(at_least(e, 1e-37f));
  F factor = load(chunk.scales + n);
  if (chunk.slopes != nullptr) {
    factor += (u + load(chunk.bonuses + n)) * load(chunk.slopes + n);
  }
  if (head.capped) {
    const F t = (u + load(chunk.anchors + n)) * (1.0f / head.scale.high);
    factor *= 1.0f - t * t;
  }
  return e * factor;
}

// G of `n` vocabulary rows in the two forms that the products take:
// rows: [n][ld], broadcast along tokens; pairs: broadcast along the vocabulary, [units of n][ld] or,
// for tiles, [ld][units of n].
struct Gradient {
  const uint32_t* rows;
  const uint32_t* pairs;
};

// From E of these rows; `transform` null: G is E. out: [n][ld]. sums: [ld], added to.
Gradient prepare_float(const Head& head, const BackwardChunk* transform, const float* e, int64_t ld,
                       int64_t n, float* out, float* sums) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t t = 0; t < ld; t += L) {
      F g = load(e + i * ld + t);
      if (transform != nullptr) {
        g = coefficient(head, *transform, g, t);
        store(out + i * ld + t, g);
      }
      store(sums + t, load(sums + t) + g);
    }
  }
  const auto* g = reinterpret_cast<const uint32_t*>(transform != nullptr ? out : e);
  return {g, g};
}

// G in bf16 at e + i, from E if it is not E itself.
TF_INLINE H pair_half(const Head& head, const BackwardChunk* transform, const uint16_t* e,
                      uint16_t* g, int64_t i, int64_t t) {
  H bits = *reinterpret_cast<const Hu*>(e + i);
  if (transform != nullptr) {
    bits = narrow(coefficient(head, *transform, widen(bits, Type::kBFloat16), t));
    *reinterpret_cast<Hu*>(g + i) = bits;
  }
  return bits;
}

// The pair of rows i and i + 1 of G at the tokens from t on.
TF_INLINE U pair(const Head& head, const BackwardChunk* transform, const uint16_t* e, uint16_t* g,
                 int64_t ld, int64_t n, int64_t i, int64_t t) {
  if (i >= n) return U{};
  const U low = from_halves(pair_half(head, transform, e, g, i * ld + t, t));
  if (i + 1 >= n) return low;
  return low | (from_halves(pair_half(head, transform, e, g, (i + 1) * ld + t, t)) << 16);
}

TF_INLINE void add_pair(float* sums, U both) {
  store(sums, load(sums) + (as_float(both << 16) + as_float(both & 0xffff0000u)));
}

Gradient prepare_pairs(const Head& head, const BackwardChunk* transform, const uint16_t* e,
                       int64_t ld, int64_t n, float* rows, float* pairs, float* sums) {
  auto* g = reinterpret_cast<uint16_t*>(rows);
#if TURNFAST_AMX
  const int64_t k = units(head, n);
  for (int64_t unit = 0; unit < k; unit += L) {
    for (int64_t t = 0; t < ld; t += L) {
      U block[L];
      for (int64_t i = 0; i < L; ++i) {
        block[i] = pair(head, transform, e, g, ld, n, 2 * (unit + i), t);
        add_pair(sums + t, block[i]);
      }
      transpose(block);
      for (int64_t i = 0; i < L; ++i) store(pairs + (t + i) * k + unit, as_float(block[i]));
    }
  }
#else
  for (int64_t i = 0; i < n; i += 2) {
    for (int64_t t = 0; t < ld; t += L) {
      const U both = pair(head, transform, e, g, ld, n, i, t);
      store(pairs + i / 2 * ld + t, as_float(both));
      add_pair(sums + t, both);
    }
  }
#endif
  return {reinterpret_cast<const uint32_t*>(transform != nullptr ? g : e),
          reinterpret_cast<const uint32_t*>(pairs)};
}

Gradient prepare(const Head& head, const BackwardChunk* transform, const void* e, int64_t ld,
                 int64_t n, float* scratch, const Layout& at, float* sums) {
  if (!use_pairs(head)) {
    return prepare_float(head, transform, static_cast<const float*>(e), ld, n, scratch + at.g_rows,
                         sums);
  }
  return prepare_pairs(head, transform, static_cast<const uint16_t*>(e), ld, n,
                       scratch + at.g_rows, scratch + at.g_pairs, sums);
}

// --- G @ W ---------------------------------------------------------------------------------------

// d_x (+)= G @ W over vocabulary rows [v, v + n).
template <class Mul, bool kPairs>
void add_d_x(const Head& head, int64_t C, const Gradient& g, int64_t v, int64_t n, bool add,
             float* weight, float* d_x) {
  pack_weight(head, v, n, weight);
  const int64_t k = units(head, n), width = round_up(head.D, NR);
  const int64_t ld = Mul::kGAlongK ? k : round_up(C, NR);
  // G's few lines per tile stay in the first-level cache while the packed weight streams by.
  for (int64_t t = 0; t < C; t += Mul::kRows) {
    const uint32_t* rows = (kPairs ? g.pairs : g.rows) + t * (Mul::kGAlongK ? ld : 1);
    for (int64_t j = 0; j < width; j += NR) {
      tile<Mul, Mul::kGAlongK>(rows, ld, weight + j * k, k, d_x + t * width + j, width, add);
    }
  }
}

void clear_d_x(const Head& head, int64_t C, float* d_x) {
  const int64_t rows = use_pairs(head) ? MulPairs::kRows : MulFloat::kRows;
  const int64_t size = round_up(C, rows) * round_up(head.D, NR);
  for (int64_t i = 0; i < size; ++i) d_x[i] = 0.0f;
}

// Part `part` of `parts` of what the next tiles read: it arrives behind the products of these.
TF_INLINE void prefetch_part(const char* data, int64_t size, int64_t part, int64_t parts) {
  const int64_t stop = size * (part + 1) / parts;
  for (int64_t i = size * part / parts; i < stop; i += 64) __builtin_prefetch(data + i, 0, 2);
}

// --- forward -------------------------------------------------------------------------------------

// One tile of logits to exponentials in `e` (null: not kept), its sums added to the block's.
template <class Mul, bool kPairs>
__attribute__((noinline)) void forward_tile(const Head& head, const ForwardChunk& chunk,
                                            const uint32_t* a, int64_t lda, const float* b,
                                            int64_t k, int64_t v, int64_t rows, int64_t n,
                                            char* e_rows, float* sums) {
  F z[Mul::kRows][2];
  if constexpr (Mul::kInRegisters) {
    // Out of registers at once: indexing the accumulators by a loop variable would keep them in
    // memory during the product, too.
    F acc[Mul::kRows][2];
    multiply<Mul, true>(a, lda, b, k, acc);
#pragma GCC unroll 16
    for (int i = 0; i < Mul::kRows; ++i) {
      z[i][0] = acc[i][0];
      z[i][1] = acc[i][1];
    }
  } else {
    multiply<Mul, true>(a, lda, b, k, z);
  }
  for (int half = 0; half < 2; ++half) {
    const int64_t lane = n + half * L;
    const F anchor = load(chunk.anchors + lane);
    const I column = *reinterpret_cast<const Iu*>(chunk.columns + lane);
    F sum{}, dot{};
    F max = load(sums + 2 * chunk.ld + lane);
    for (int64_t i = 0; i < rows; ++i) {
      const F u = logits(head, z[i][half]) - anchor;
      const I target = column == static_cast<int32_t>(v + i);
      const F e = select(target, F{}, exp_anchored(u));
      max = select((u > max) & ~target, u, max);
      sum += e;
      dot += e * u;
      if (e_rows == nullptr) continue;
      if (kPairs) {
        *reinterpret_cast<Hu*>(e_rows + 2 * (i * chunk.ld + lane)) = narrow(e);
      } else {
        store(e_rows + 4 * (i * chunk.ld + lane), e);
      }
    }
    store(sums + lane, load(sums + lane) + sum);
    store(sums + chunk.ld + lane, load(sums + chunk.ld + lane) + dot);
    store(sums + 2 * chunk.ld + lane, max);
  }
}

template <class Mul, bool kPairs>
void forward_as(const Head& head, const ForwardChunk& chunk, int64_t begin, int64_t end,
                Scratch scratch, ForwardSums out, float* d_x) {
  constexpr int64_t kRows = Mul::kRows;
  [[maybe_unused]] const typename Mul::Shapes shapes;
  const Layout layout_of = layout(head, chunk.C);
  float* sums = scratch.base + layout_of.sums;
  const int64_t k = units(head, head.D), ld = chunk.ld, row_bytes = ld * (kPairs ? 2 : 4);
  const int64_t block_size = block_rows(head, chunk.C);
  for (int64_t n = 0; n < ld; ++n) {
    out.sum[n] = out.dot[n] = 0.0;
    if (d_x != nullptr) out.kept[n] = 0.0;
    sums[2 * ld + n] = -__builtin_inff();
  }
  if (d_x != nullptr && begin >= end) clear_d_x(head, chunk.C, d_x);
  for (int64_t block = begin; block < end; block += block_size) {
    const int64_t stop = block + block_size < end ? block + block_size : end;
    auto* e = static_cast<char*>(chunk.exps);
    if (e != nullptr) e += block * row_bytes;
    // E that nobody keeps lives in the block's own place.
    if (e == nullptr && d_x != nullptr) {
      e = reinterpret_cast<char*>(scratch.base + layout_of.g_rows);
    }
    // Float sums within a block, double across blocks: the error does not grow with V.
    for (int64_t n = 0; n < 2 * ld; ++n) sums[n] = 0.0f;
    for (int64_t v = block; v < stop; v += kRows) {
      int64_t lda;
      const uint32_t* a = broadcast_rows(head, v, kRows, stop, scratch.base, &lda);
      const int64_t rows = stop - v < kRows ? stop - v : kRows, behind = end - v - rows;
      const int64_t next = behind < kRows ? behind : kRows;
      for (int64_t n = 0; n < ld; n += NR) {
        prefetch_part(at(head.weight, head.type, (v + kRows) * head.D),
                      next * head.D * bytes(head.type), n / NR, ld / NR);
        const float* b = static_cast<const float*>(chunk.x_panels) + n * k;
        forward_tile<Mul, kPairs>(head, chunk, a, lda, b, k, v, rows, n,
                                  e == nullptr ? e : e + (v - block) * row_bytes, sums);
      }
    }
    for (int64_t n = 0; n < ld; ++n) {
      out.sum[n] += sums[n];
      out.dot[n] += sums[ld + n];
    }
    if (d_x == nullptr) continue;
    float* kept = sums + 3 * ld;
    for (int64_t n = 0; n < ld; ++n) kept[n] = 0.0f;
    const Gradient g = prepare(head, nullptr, e, ld, stop - block, scratch.base, layout_of, kept);
    for (int64_t n = 0; n < ld; ++n) out.kept[n] += kept[n];
    add_d_x<Mul, kPairs>(head, chunk.C, g, block, stop - block, block > begin,
                         scratch.base + layout_of.weight, d_x);
  }
  for (int64_t n = 0; n < ld; ++n) out.max[n] = sums[2 * ld + n];
}

void forward(const Head& head, const ForwardChunk& chunk, int64_t begin, int64_t end,
             Scratch scratch, ForwardSums out, float* d_x) {
  if (use_pairs(head)) {
    forward_as<MulPairs, true>(head, chunk, begin, end, scratch, out, d_x);
  } else {
    forward_as<MulFloat, false>(head, chunk, begin, end, scratch, out, d_x);
  }
}

// --- backward ------------------------------------------------------------------------------------

// What rows [begin, end) will be added to, hidden columns from j on, arrives behind the products.
void prefetch_gradient(const Head& head, const HeadGradient& g, int64_t begin, int64_t end,
                       int64_t j) {
  constexpr int64_t kLine = 16;
  const int64_t edge = j + NR < head.D ? j + NR : head.D;
  for (int64_t v = begin; v < end; ++v) {
    if (g.whole != nullptr) {
      for (int64_t d = j; d < edge; d += kLine) {
        __builtin_prefetch(g.whole + v * head.D + d, 1, 2);
      }
    } else {
      __builtin_prefetch(g.high + v * head.D + j, 1, 2);
      if (j % (4 * NR) == 0) __builtin_prefetch(g.low + v * g.low_row + j / 2, 1, 2);
    }
  }
}

// Rows [v, v + n) of the head's gradient from G [n][ldg] and the packed tokens. `ahead` rows of G
// follow in memory.
template <class Mul>
void make_d_head(const Head& head, const BackwardChunk& chunk, const uint32_t* g, int64_t ldg,
                 int64_t v, int64_t n, int64_t ahead, float* strip) {
  constexpr int64_t kStrip = turnfast::TURNFAST_ISA::kStrip<Mul>, kRows = Mul::kRows;
  const int64_t width = round_up(head.D, NR);
  const int64_t k = units(head, chunk.C);
  const auto* x = static_cast<const float*>(chunk.x_panels);
  const HeadGradient& to = chunk.d_head;
  for (int64_t top = 0; top < n; top += kStrip) {
    const int64_t stop = n - top < kStrip ? n : top + kStrip;
    const int64_t next = n + ahead - stop < kStrip ? n + ahead - stop : kStrip;
    for (int64_t j = 0; j < width; j += NR) {
      for (int64_t row = top; row < stop; row += kRows) {
        const int64_t end = row + kRows < stop ? row + kRows : stop;
        prefetch_part(reinterpret_cast<const char*>(g + stop * ldg), next * ldg * 4,
                      j / NR * (kStrip / kRows) + (row - top) / kRows, width / NR * (kStrip / kRows));
        if (!chunk.first) prefetch_gradient(head, chunk.d_head, v + row, v + end, j);
        tile<Mul, true>(g + row * ldg, ldg, x + j * k, k, strip + (row - top) * width + j, width,
                        false);
      }
    }
    for (int64_t row = top; row < stop; ++row) {
      const float* from = strip + (row - top) * width;
      for (int64_t d = 0; d < head.D; d += NR) {
        add_gradient(to, head.D, chunk.first, v + row, d, load(from + d), load(from + d + L));
      }
    }
  }
}

template <class Mul, bool kPairs>
void backward_as(const Head& head, const BackwardChunk& chunk, int64_t begin, int64_t end,
                 Scratch scratch, double* g_sums, float* d_x) {
  [[maybe_unused]] const typename Mul::Shapes shapes;
  const Layout layout_of = layout(head, chunk.C);
  float* sums = scratch.base + layout_of.sums;
  const bool plain = g_sums == nullptr;
  const int64_t row_bytes = chunk.ld * (kPairs ? 2 : 4);
  if (!plain) {
    for (int64_t t = 0; t < chunk.ld; ++t) g_sums[t] = 0.0;
  }
  if (d_x != nullptr && begin >= end) clear_d_x(head, chunk.C, d_x);
  const int64_t block_size = block_rows(head, chunk.C);
  for (int64_t v = begin; v < end; v += block_size) {
    const int64_t n = end - v < block_size ? end - v : block_size;
    const char* e = static_cast<const char*>(chunk.exps) + v * row_bytes;
    Gradient g{reinterpret_cast<const uint32_t*>(e), nullptr};
    if (!plain) {
      for (int64_t t = 0; t < chunk.ld; ++t) sums[t] = 0.0f;
      g = prepare(head, chunk.transform ? &chunk : nullptr, e, chunk.ld, n, scratch.base, layout_of,
                  sums);
      for (int64_t t = 0; t < chunk.ld; ++t) g_sums[t] += sums[t];
    }
    if (d_x != nullptr) {
      add_d_x<Mul, kPairs>(head, chunk.C, g, v, n, v > begin, scratch.base + layout_of.weight, d_x);
    }
    if (!chunk.d_head.wanted()) continue;
    const int64_t ahead = plain ? end - v - n : 0;
    make_d_head<Mul>(head, chunk, g.rows, chunk.ld / (kPairs ? 2 : 1), v, n, ahead, scratch.base);
  }
}

void backward(const Head& head, const BackwardChunk& chunk, int64_t begin, int64_t end,
              Scratch scratch, double* g_sums, float* d_x) {
  if (use_pairs(head)) {
    backward_as<MulPairs, true>(head, chunk, begin, end, scratch, g_sums, d_x);
  } else {
    backward_as<MulFloat, false>(head, chunk, begin, end, scratch, g_sums, d_x);
  }
}

// --- per token -----------------------------------------------------------------------------------

void pick(const Head& head, const void* x, const int32_t* columns, int64_t begin, int64_t end,
          float* z) {
  for (int64_t n = begin; n < end; ++n) {
    if (columns[n] < 0) {
      z[n] = 0.0f;
      continue;
    }
    const char* a = at(x, head.type, n * head.D);
    const char* b = at(head.weight, head.type, columns[n] * head.D);
    F sum{};
    for (int64_t d = 0; d < head.D; d += L) {
      const int64_t m = head.D - d;
      sum += load_some(a + d * bytes(head.type), head.type, m) *
             load_some(b + d * bytes(head.type), head.type, m);
    }
    float total = 0.0f;
    for (int i = 0; i < L; ++i) total += sum[i];
    z[n] = logits(head, splat(total))[0];
  }
}

void finish_d_x(const Head& head, const float* const* d_x, int64_t workers, const float* row_scales,
                int64_t begin, int64_t end, float* out) {
  const int64_t width = round_up(head.D, NR);
  for (int64_t n = begin; n < end; ++n) {
    for (int64_t d = 0; d < head.D; d += L) {
      F sum{};
      for (int64_t i = 0; i < workers; ++i) sum += load(d_x[i] + n * width + d);
      store_some(out + n * head.D + d, sum * row_scales[n], head.D - d);
    }
  }
}

void scatter_d_x(const Head& head, const float* const* d_x, int64_t workers,
                 const float* row_scales, const float* patches, const int32_t* columns,
                 const int64_t* rows, int64_t C, int64_t begin, int64_t end, float* out) {
  const int64_t width = round_up(head.D, NR);
  for (int64_t n = 0; n < C; ++n) {
    float* to = out + rows[n] * head.D;
    for (int64_t d = begin; d < end; d += L) {
      const int64_t m = end - d;
      F sum{};
      for (int64_t i = 0; i < workers; ++i) sum += load(d_x[i] + n * width + d);
      F target{};
      if (columns[n] >= 0) {
        target = load_some(at(head.weight, head.type, columns[n] * head.D + d), head.type, m);
      }
      const F add = sum * row_scales[n] + target * patches[n];
      store_some(to + d, load_some(to + d, Type::kFloat, m) + add, m);
    }
  }
}

void patch(const Head& head, const void* x, const int32_t* columns, const float* patches, int64_t C,
           int64_t begin, int64_t end, float* d_x, const HeadGradient& d_head) {
  const auto product = [&](const void* from, int64_t row, int64_t d, float factor) {
    if (d >= end) return F{};
    return load_some(at(from, head.type, row * head.D + d), head.type, end - d) * factor;
  };
  for (int64_t n = 0; n < C; ++n) {
    const int64_t v = columns[n];
    if (v < 0) continue;
    for (int64_t d = begin; d_x != nullptr && d < end; d += L) {
      const int64_t m = end - d;
      float* to = d_x + n * head.D + d;
      store_some(to, load_some(to, Type::kFloat, m) + product(head.weight, v, d, patches[n]), m);
    }
    for (int64_t d = begin; d_head.wanted() && d < end; d += NR) {
      add_gradient(d_head, head.D, false, v, d, product(x, n, d, patches[n]),
                   product(x, n, d + L, patches[n]));
    }
  }
}

void exp_all(const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += L) {
    const int64_t m = n - i;
    store_some(out + i, exp_anchored(load_some(x + i, Type::kFloat, m)), m);
  }
}

}  // namespace

// Constant, so that loading the library runs no instruction of this set.
constexpr Kernel table(const char* name, bool (*supported)()) {
  const int64_t bf16_bytes = TURNFAST_PAIRS ? 2 : 4;
  return {name,
          NR,
          {MR, MulPairs::kRows, MR},
          {4, bf16_bytes, 4},
          supported,
          scratch_floats,
          panel_bytes,
          pack_tokens,
          pack_scaled,
          pick,
          forward,
          backward,
          finish_d_x,
          scatter_d_x,
          patch,
          exp_all};
}

}  // namespace turnfast::TURNFAST_ISA
