// A worker's scratch memory, and G, the gradient of the logits of one block of vocabulary rows.

#pragma once

#include "product.h"

namespace turnfast::TURNFAST_ISA {
namespace {

// Vocabulary rows per block. More rows amortise loading and storing the tiles of dX; fewer keep the
// packed weight and G in the second-level cache.
int64_t block_rows(const Head& head, int64_t C) {
  constexpr int64_t kBytes = 352 << 10;
  const int64_t longest = head.D > C / 2 ? head.D : C / 2;
  const int64_t rows = kBytes / (longest * (use_pairs(head) ? 2 : 4)) / kBlock * kBlock;
  return rows < kBlock ? kBlock : rows > 2 * kBlock ? 2 * kBlock : rows;
}

// Rows of dW that are summed over a chunk's tokens before they are written: each panel of tokens is
// read once per strip.
template <class Mul>
constexpr int kStrip = Mul::kInRegisters ? 4 * Mul::kRows : 2 * Mul::kRows;

// Offsets into a worker's scratch memory, in floats.
struct Layout {
  int64_t rows;     // forward: broadcast rows of W; backward: kStrip rows of dW
  int64_t sums;     // four vectors of the chunk's tokens
  int64_t weight;   // the packed block of W
  int64_t g_rows;   // G of the block, by vocabulary row
  int64_t g_pairs;  // G of the block in bf16 pairs
  int64_t end;
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

// E of `n` vocabulary rows, [n][ld]. G is E where `transform` is null.
struct ExpBlock {
  const void* e;
  int64_t ld, n;
  const BackwardChunk* transform;
};

// G of vocabulary rows [v, v + n) in the two layouts that the products read.
struct Gradient {
  const uint32_t* rows;  // [n][ld], broadcast along tokens
  // Broadcast along the vocabulary, [units of n][ld]; for AMX tiles [ld][units of n].
  const uint32_t* pairs;
  int64_t v, n;
};

// G from E where a token's gradient is not one factor times E: entropy bonus, soft cap. z - anchor
// is log E, so the logits need not be stored.
TF_INLINE F dlogits(const Head& head, const BackwardChunk& chunk, F e, int64_t n) {
  const F u = log_normal(at_least(e, 1e-37f));
  F factor = load(chunk.scales + n);
  if (chunk.entropy_scales != nullptr) {
    factor += (u + load(chunk.entropy_offsets + n)) * load(chunk.entropy_scales + n);
  }
  if (head.capped) {
    const F t = (u + load(chunk.anchors + n)) * (1.0f / head.scale.high);
    factor *= 1.0f - t * t;
  }
  return e * factor;
}

// Writes G to `out`, [n][ld], if it is not E, and adds its columns to sums [ld].
Gradient make_g_float(const Head& head, ExpBlock block, float* out, float* sums) {
  const auto* e = static_cast<const float*>(block.e);
  for (int64_t i = 0; i < block.n; ++i) {
    for (int64_t t = 0; t < block.ld; t += L) {
      F g = load(e + i * block.ld + t);
      if (block.transform != nullptr) {
        g = dlogits(head, *block.transform, g, t);
        store(out + i * block.ld + t, g);
      }
      store(sums + t, load(sums + t) + g);
    }
  }
  const auto* g = reinterpret_cast<const uint32_t*>(block.transform != nullptr ? out : e);
  return {g, g, 0, block.n};
}

// Returns G in bf16 at row i, tokens [t, t + L), and writes it to `g` if it is not E.
TF_INLINE H g_halves(const Head& head, ExpBlock block, uint16_t* g, int64_t i, int64_t t) {
  const int64_t at = i * block.ld + t;
  H bits = *reinterpret_cast<const Hu*>(static_cast<const uint16_t*>(block.e) + at);
  if (block.transform != nullptr) {
    bits = narrow(dlogits(head, *block.transform, widen(bits, Type::kBFloat16), t));
    *reinterpret_cast<Hu*>(g + at) = bits;
  }
  return bits;
}

// Returns rows i and i + 1 of G as bf16 pairs, tokens [t, t + L); zeros past the last row.
TF_INLINE U g_pair(const Head& head, ExpBlock block, uint16_t* g, int64_t i, int64_t t) {
  if (i >= block.n) return U{};
  const U low = from_halves(g_halves(head, block, g, i, t));
  if (i + 1 >= block.n) return low;
  return low | (from_halves(g_halves(head, block, g, i + 1, t)) << 16);
}

TF_INLINE void add_pair(float* sums, U both) {
  store(sums, load(sums) + (as_float(both << 16) + as_float(both & 0xffff0000u)));
}

Gradient make_g_pairs(const Head& head, ExpBlock block, float* rows, float* pairs, float* sums) {
  auto* g = reinterpret_cast<uint16_t*>(rows);
#if TURNFAST_AMX
  const int64_t k = units(head, block.n);
  for (int64_t unit = 0; unit < k; unit += L) {
    for (int64_t t = 0; t < block.ld; t += L) {
      U columns[L];
      for (int64_t i = 0; i < L; ++i) {
        columns[i] = g_pair(head, block, g, 2 * (unit + i), t);
        add_pair(sums + t, columns[i]);
      }
      transpose(columns);
      for (int64_t i = 0; i < L; ++i) store(pairs + (t + i) * k + unit, as_float(columns[i]));
    }
  }
#else
  for (int64_t i = 0; i < block.n; i += 2) {
    for (int64_t t = 0; t < block.ld; t += L) {
      const U both = g_pair(head, block, g, i, t);
      store(pairs + i / 2 * block.ld + t, as_float(both));
      add_pair(sums + t, both);
    }
  }
#endif
  const void* by_row = block.transform != nullptr ? static_cast<const void*>(g) : block.e;
  return {static_cast<const uint32_t*>(by_row), reinterpret_cast<const uint32_t*>(pairs), 0,
          block.n};
}

// Makes G of a block that starts at vocabulary row v, and adds its columns to sums [ld].
Gradient make_g(const Head& head, ExpBlock block, int64_t v, float* scratch, float* sums,
                const Layout& at) {
  Gradient g = use_pairs(head)
                   ? make_g_pairs(head, block, scratch + at.g_rows, scratch + at.g_pairs, sums)
                   : make_g_float(head, block, scratch + at.g_rows, sums);
  g.v = v;
  return g;
}

}  // namespace
}  // namespace turnfast::TURNFAST_ISA
