// Vectors of L floats, their loads and stores, and the element types of a head.

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

}  // namespace
}  // namespace turnfast::TURNFAST_ISA
