// The head's gradient, and dX where G is not E.

#pragma once

#include "forward.h"
#include "head_gradient.h"

namespace turnfast::TURNFAST_ISA {
namespace {

// Prefetches the gradient of rows [begin, end), hidden columns from j on, during the products.
void prefetch_gradient(const Head& head, const HeadGradient& g, int64_t begin, int64_t end,
                       int64_t j) {
  constexpr int64_t kLine = 16;
  const int64_t edge = j + NR < head.D ? j + NR : head.D;
  for (int64_t v = begin; v < end; ++v) {
    if (g.full != nullptr) {
      for (int64_t d = j; d < edge; d += kLine) {
        __builtin_prefetch(g.full + v * head.D + d, 1, 2);
      }
    } else {
      __builtin_prefetch(g.high + v * head.D + j, 1, 2);
      if (j % (4 * NR) == 0) __builtin_prefetch(g.low + v * g.low_row + j / 2, 1, 2);
    }
  }
}

// The head's gradient of the rows of G, from G [n][ldg] and the packed tokens. `rows_after` more
// rows of G follow in memory.
template <class Mul>
void make_d_head(const Head& head, const BackwardChunk& chunk, const Gradient& g, int64_t ldg,
                 int64_t rows_after, float* strip) {
  constexpr int64_t kStrip = turnfast::TURNFAST_ISA::kStrip<Mul>, kRows = Mul::kRows;
  const int64_t width = round_up(head.D, NR);
  const int64_t k = units(head, chunk.C);
  const auto* x = static_cast<const float*>(chunk.x_panels);
  const HeadGradient& to = chunk.d_head;
  for (int64_t top = 0; top < g.n; top += kStrip) {
    const int64_t stop = g.n - top < kStrip ? g.n : top + kStrip;
    const int64_t left = g.n + rows_after - stop, next = left < kStrip ? left : kStrip;
    for (int64_t j = 0; j < width; j += NR) {
      for (int64_t row = top; row < stop; row += kRows) {
        const int64_t end = row + kRows < stop ? row + kRows : stop;
        const int64_t tiles = kStrip / kRows, part = j / NR * tiles + (row - top) / kRows;
        prefetch_part(reinterpret_cast<const char*>(g.rows + stop * ldg), next * ldg * 4, part,
                      width / NR * tiles);
        if (!chunk.overwrite) prefetch_gradient(head, to, g.v + row, g.v + end, j);
        tile<Mul, true>(g.rows + row * ldg, ldg, x + j * k, k, strip + (row - top) * width + j,
                        width, false);
      }
    }
    for (int64_t row = top; row < stop; ++row) {
      const float* from = strip + (row - top) * width;
      for (int64_t d = 0; d < head.D; d += NR) {
        add_gradient(to, head.D, chunk.overwrite, g.v + row, d, load(from + d), load(from + d + L));
      }
    }
  }
}

template <class Mul, bool kPairs>
void backward_as(const Head& head, const BackwardChunk& chunk, int64_t begin, int64_t end,
                 float* scratch, double* g_sums, float* d_x) {
  [[maybe_unused]] const typename Mul::Shapes shapes;
  const Layout layout_of = layout(head, chunk.C);
  float* sums = scratch + layout_of.sums;
  const bool g_is_e = g_sums == nullptr;
  const int64_t row_bytes = chunk.ld * (kPairs ? 2 : 4);
  if (!g_is_e) {
    for (int64_t t = 0; t < chunk.ld; ++t) g_sums[t] = 0.0;
  }
  if (d_x != nullptr && begin >= end) clear_d_x(head, chunk.C, d_x);
  const int64_t block_size = block_rows(head, chunk.C);
  for (int64_t v = begin; v < end; v += block_size) {
    const int64_t n = end - v < block_size ? end - v : block_size;
    const char* e = static_cast<const char*>(chunk.exps) + v * row_bytes;
    Gradient g{reinterpret_cast<const uint32_t*>(e), nullptr, v, n};
    if (!g_is_e) {
      for (int64_t t = 0; t < chunk.ld; ++t) sums[t] = 0.0f;
      const ExpBlock block{e, chunk.ld, n, chunk.transform ? &chunk : nullptr};
      g = make_g(head, block, v, scratch, sums, layout_of);
      for (int64_t t = 0; t < chunk.ld; ++t) g_sums[t] += sums[t];
    }
    if (d_x != nullptr) {
      add_d_x<Mul, kPairs>(head, chunk.C, g, v > begin, scratch + layout_of.weight, d_x);
    }
    if (!chunk.d_head.wanted()) continue;
    const int64_t rows_after = g_is_e ? end - v - n : 0;
    make_d_head<Mul>(head, chunk, g, chunk.ld / (kPairs ? 2 : 1), rows_after, scratch);
  }
}

void backward(const Head& head, const BackwardChunk& chunk, int64_t begin, int64_t end,
              float* scratch, double* g_sums, float* d_x) {
  if (use_pairs(head)) {
    backward_as<MulPairs, true>(head, chunk, begin, end, scratch, g_sums, d_x);
  } else {
    backward_as<MulFloat, false>(head, chunk, begin, end, scratch, g_sums, d_x);
  }
}

}  // namespace
}  // namespace turnfast::TURNFAST_ISA
