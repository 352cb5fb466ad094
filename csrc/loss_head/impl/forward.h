// Logits, their exponentials and sums, and E @ W where it is wanted.

#pragma once

#include "dlogits.h"

namespace turnfast::TURNFAST_ISA {
namespace {

// d_x = or += G @ W over the vocabulary rows of G. weight: scratch for the packed rows.
template <class Mul, bool kPairs>
void add_d_x(const Head& head, int64_t C, const Gradient& g, bool add, float* weight, float* d_x) {
  pack_weight(head, g.v, g.n, weight);
  const int64_t k = units(head, g.n), width = round_up(head.D, NR);
  const int64_t ld = Mul::kGAlongK ? k : round_up(C, NR);
  // The tile's rows of G stay in the first-level cache while the packed weight streams.
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

// Prefetches part `part` of `parts` of what the next tiles read, during the products of this one.
TF_INLINE void prefetch_part(const char* data, int64_t size, int64_t part, int64_t parts) {
  const int64_t stop = size * (part + 1) / parts;
  for (int64_t i = size * part / parts; i < stop; i += 64) __builtin_prefetch(data + i, 0, 2);
}

// One tile of logits: vocabulary rows [v, v + rows), tokens [n, n + NR).
struct LogitTile {
  const uint32_t* a;  // broadcast rows of W, `lda` units apart
  int64_t lda;
  const float* b;  // packed tokens, `k` units
  int64_t k;
  int64_t v, rows, n;
};

// Turns one tile of logits into exponentials at e_rows (null: not stored), and adds their sums to
// those of the block: sum, dot and maximum, [ld] each.
template <class Mul, bool kPairs>
__attribute__((noinline)) void forward_tile(const Head& head, const ForwardChunk& chunk,
                                            LogitTile at, char* e_rows, float* sums) {
  F z[Mul::kRows][2];
  if constexpr (Mul::kInRegisters) {
    // Copied to z at once: indexing the sums by a loop variable would keep them in memory during
    // the product.
    F acc[Mul::kRows][2];
    multiply<Mul, true>(at.a, at.lda, at.b, at.k, acc);
#pragma GCC unroll 16
    for (int i = 0; i < Mul::kRows; ++i) {
      z[i][0] = acc[i][0];
      z[i][1] = acc[i][1];
    }
  } else {
    multiply<Mul, true>(at.a, at.lda, at.b, at.k, z);
  }
  for (int half = 0; half < 2; ++half) {
    const int64_t lane = at.n + half * L;
    const F anchor = load(chunk.anchors + lane);
    const I column = *reinterpret_cast<const Iu*>(chunk.columns + lane);
    F sum{}, dot{};
    F max = load(sums + 2 * chunk.ld + lane);
    for (int64_t i = 0; i < at.rows; ++i) {
      const F u = logits(head, z[i][half]) - anchor;
      const I target = column == static_cast<int32_t>(at.v + i);
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
                float* scratch, ForwardSums out, float* d_x) {
  constexpr int64_t kRows = Mul::kRows;
  [[maybe_unused]] const typename Mul::Shapes shapes;
  const Layout layout_of = layout(head, chunk.C);
  float* sums = scratch + layout_of.sums;
  const int64_t k = units(head, head.D), ld = chunk.ld, row_bytes = ld * (kPairs ? 2 : 4);
  const int64_t block_size = block_rows(head, chunk.C);
  for (int64_t n = 0; n < ld; ++n) {
    out.sum[n] = out.dot[n] = 0.0;
    if (d_x != nullptr) out.rounded_sum[n] = 0.0;
    sums[2 * ld + n] = -__builtin_inff();
  }
  if (d_x != nullptr && begin >= end) clear_d_x(head, chunk.C, d_x);
  for (int64_t block = begin; block < end; block += block_size) {
    const int64_t stop = block + block_size < end ? block + block_size : end;
    auto* e = static_cast<char*>(chunk.exps);
    if (e != nullptr) e += block * row_bytes;
    // Where E is not stored, the block's part of it is still needed for E @ W.
    if (e == nullptr && d_x != nullptr) {
      e = reinterpret_cast<char*>(scratch + layout_of.g_rows);
    }
    // Float sums within a block, double across blocks: the error does not grow with V.
    for (int64_t n = 0; n < 2 * ld; ++n) sums[n] = 0.0f;
    for (int64_t v = block; v < stop; v += kRows) {
      int64_t lda;
      const uint32_t* a = broadcast_rows(head, v, kRows, stop, scratch, &lda);
      const int64_t rows = stop - v < kRows ? stop - v : kRows, rows_after = end - v - rows;
      const int64_t next = rows_after < kRows ? rows_after : kRows;
      for (int64_t n = 0; n < ld; n += NR) {
        prefetch_part(at(head.weight, head.type, (v + kRows) * head.D),
                      next * head.D * bytes(head.type), n / NR, ld / NR);
        const float* b = static_cast<const float*>(chunk.x_panels) + n * k;
        forward_tile<Mul, kPairs>(head, chunk, {a, lda, b, k, v, rows, n},
                                  e == nullptr ? e : e + (v - block) * row_bytes, sums);
      }
    }
    for (int64_t n = 0; n < ld; ++n) {
      out.sum[n] += sums[n];
      out.dot[n] += sums[ld + n];
    }
    if (d_x == nullptr) continue;
    float* rounded_sum = sums + 3 * ld;
    for (int64_t n = 0; n < ld; ++n) rounded_sum[n] = 0.0f;
    const ExpBlock exps{e, ld, stop - block, nullptr};
    const Gradient g = make_g(head, exps, block, scratch, rounded_sum, layout_of);
    for (int64_t n = 0; n < ld; ++n) out.rounded_sum[n] += rounded_sum[n];
    add_d_x<Mul, kPairs>(head, chunk.C, g, block > begin, scratch + layout_of.weight, d_x);
  }
  for (int64_t n = 0; n < ld; ++n) out.max[n] = sums[2 * ld + n];
}

void forward(const Head& head, const ForwardChunk& chunk, int64_t begin, int64_t end,
             float* scratch, ForwardSums out, float* d_x) {
  if (use_pairs(head)) {
    forward_as<MulPairs, true>(head, chunk, begin, end, scratch, out, d_x);
  } else {
    forward_as<MulFloat, false>(head, chunk, begin, end, scratch, out, d_x);
  }
}

}  // namespace
}  // namespace turnfast::TURNFAST_ISA
