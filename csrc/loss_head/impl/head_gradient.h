// Adds to the head's gradient: float32, or bf16 with 4 more bits (HeadGradient).

#pragma once

#include "vector.h"

namespace turnfast::TURNFAST_ISA {
namespace {

// A float rounded to 20 bits: 16 bits rounded to nearest, and the signed 4-bit remainder.
struct Rounded20 {
  U high, remainder;
};

TF_INLINE Rounded20 round_to_20_bits(F value) {
  // A carry out of the mantissa increments the exponent, as rounding requires.
  const U bits = (as_bits(value) + 0x800u) >> 12;
  const U high = (bits + 8u) >> 4;
  return {high, bits - (high << 4)};
}

// Adds (a, b) to hidden columns [d, d + NR) of row v, or overwrites them. d is a multiple of NR;
// columns past D are skipped. The remainders of columns i and i + L share a byte.
TF_INLINE void add_gradient(const HeadGradient& g, int64_t D, bool overwrite, int64_t v, int64_t d,
                            F a, F b) {
  const int64_t n = D - d;
  if (g.full != nullptr) {
    float* to = g.full + v * D + d;
    store_some(to, overwrite ? a : load_some(to, Type::kFloat, n) + a, n);
    if (n > L) {
      store_some(to + L, overwrite ? b : load_some(to + L, Type::kFloat, n - L) + b, n - L);
    }
    return;
  }
  uint16_t* high = g.high + v * D + d;
  auto* remainders = reinterpret_cast<Bu*>(g.low + v * g.low_row + d / 2);
  if (!overwrite) {
    const U both = from_bytes(*remainders);
    const U remainder_a = reinterpret_cast<U>(reinterpret_cast<I>(both << 28) >> 16);
    const U remainder_b = (both & ~15u) << 8;
    a += as_float((from_halves(load_halves(high, n)) << 16) + remainder_a);
    b += as_float((from_halves(load_halves(high + L, n - L)) << 16) + remainder_b);
  }
  const Rounded20 x = round_to_20_bits(a), y = round_to_20_bits(b);
  store_halves(high, to_halves(x.high), n);
  store_halves(high + L, to_halves(y.high), n - L);
  *remainders = to_bytes((x.remainder & 15u) | (y.remainder << 4));
}

}  // namespace
}  // namespace turnfast::TURNFAST_ISA
