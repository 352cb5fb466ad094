// Vectors of L floats: loads and stores, the element types of a head, exp, log and tanh, and logits
// from dot products.

#pragma once

namespace turnfast::TURNFAST_ISA {
namespace {

constexpr int L = TURNFAST_LANES;  // floats per vector
constexpr int NR = 2 * L;          // lanes of a register tile
constexpr int MR = TURNFAST_ROWS;  // broadcast rows of a register tile
static_assert(kBlock % MR == 0);

// float, int32, uint32, 16 bits (bf16 or half) and bytes, L of each.
typedef float F __attribute__((vector_size(4 * L)));
typedef int32_t I __attribute__((vector_size(4 * L)));
typedef uint32_t U __attribute__((vector_size(4 * L)));
typedef uint16_t H __attribute__((vector_size(2 * L)));
typedef int8_t B __attribute__((vector_size(L)));
// The same for loads and stores: any alignment, and they may alias any type.
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

#if !TURNFAST_AVX512
TF_INLINE U from_halves(H x) { return __builtin_convertvector(x, U); }
TF_INLINE U from_bytes(B x) { return reinterpret_cast<U>(__builtin_convertvector(x, I)); }
TF_INLINE H to_halves(U x) { return __builtin_convertvector(x, H); }
TF_INLINE B to_bytes(U x) { return __builtin_convertvector(reinterpret_cast<I>(x), B); }
#endif

TF_INLINE F widen(H bits, Type type) {
  const U x = from_halves(bits);
  if (type == Type::kBFloat16) return as_float(x << 16);
  // Half: shift the bits into the float fields, then correct the exponent bias by a product. The
  // product also converts subnormals.
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

// Loads min(n, L) elements as floats and fills the other lanes with zeros.
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

#if !TURNFAST_PAIRS
// Never called without products of pairs; defined so that both branches compile.
TF_INLINE H narrow(F) { return H{}; }
#endif

TF_INLINE bool use_pairs(const Head& head) {
  return TURNFAST_PAIRS && head.type == Type::kBFloat16;
}

// exp(r) for |r| <= log(2) / 2: a polynomial of degree 6, relative error 1e-8 before rounding.
TF_INLINE F exp_reduced(F r) {
  F p = r * 1.3814465e-3f + 8.3687808e-3f;
  p = p * r + 4.1668393e-2f;
  p = p * r + 1.66665196e-1f;
  p = p * r + 4.9999994e-1f;
  p = p * r + 1.0f;
  return p * r + 1.0f;
}

constexpr float kLog2E = 1.44269504f;
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds a float to an integer
// log(2) = kLog2High + kLog2Low. Products of kLog2High with small integers are exact.
constexpr float kLog2High = 0.693359375f, kLog2Low = -2.12194440e-4f;

// exp(x) for x in [-87, 88], clamped outside; relative error below 2e-7. NaN stays NaN, because the
// comparisons of the clamps are false and the power of two is a factor of the result.
TF_INLINE F exp_clamped(F x) {
  x = at_most(at_least(x, -87.0f), 88.0f);
  const F shifted = x * kLog2E + kRound;
  const F n = shifted - kRound;
  const F p = exp_reduced((x - n * kLog2High) - n * kLog2Low);
  return p * as_float((as_bits(shifted) << 23) + 0x3f800000u);
}

// exp(x) for |x| < 1e5, with the same error in [-87, 88]. Below -87 the result is in [0, 1.7e-38].
// Above 88 it is undefined: the caller repeats such sums with another anchor.
TF_INLINE F exp_anchored(F x) {
#if TURNFAST_AVX512
  const F n = (x * kLog2E + kRound) - kRound;
  return scale(exp_reduced((x - n * kLog2High) - n * kLog2Low), n);
#else
  return exp_clamped(x);
#endif
}

// log(x) for normal x > 0; absolute error below 2e-7 + 1e-7 |log x|.
TF_INLINE F log_normal(F x) {
  // m is the mantissa, in [sqrt(1/2), sqrt(2)).
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

}  // namespace
}  // namespace turnfast::TURNFAST_ISA
