// exp, log and tanh of a vector, and logits from dot products.

#pragma once

#include "vector.h"

namespace turnfast::TURNFAST_ISA {
namespace {

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
