// Loops over tokens: target logits, dX summed over workers, the target columns.

#pragma once

#include "head_gradient.h"

namespace turnfast::TURNFAST_ISA {
namespace {

void target_logits(const Head& head, const void* x, const int32_t* columns, int64_t begin,
                   int64_t end, float* z) {
  for (int64_t n = begin; n < end; ++n) {
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

TF_INLINE F sum_workers(const HiddenSums& sums, int64_t index) {
  F sum{};
  for (int64_t i = 0; i < sums.workers; ++i) sum += load(sums.d_x[i] + index);
  return sum;
}

void scatter_d_x(const Head& head, const HiddenSums& sums, const TargetTerms& targets,
                 const int64_t* rows, int64_t begin, int64_t end, float* out) {
  const int64_t width = round_up(head.D, NR);
  for (int64_t n = 0; n < targets.C; ++n) {
    const int64_t v = targets.columns[n];
    float* to = out + rows[n] * head.D;
    for (int64_t d = begin; d < end; d += L) {
      const int64_t m = end - d;
      const F sum = sum_workers(sums, n * width + d);
      const F weight = load_some(at(head.weight, head.type, v * head.D + d), head.type, m);
      const F add = sum * sums.row_scales[n] + weight * targets.dlogits[n];
      store_some(to + d, load_some(to + d, Type::kFloat, m) + add, m);
    }
  }
}

void add_targets(const Head& head, const TargetTerms& targets, int64_t begin, int64_t end,
                 const HeadGradient& d_head) {
  const auto product = [&](int64_t n, int64_t d) {
    if (d >= end) return F{};
    const char* x = at(targets.x, head.type, n * head.D + d);
    return load_some(x, head.type, end - d) * targets.dlogits[n];
  };
  for (int64_t n = 0; n < targets.C; ++n) {
    for (int64_t d = begin; d < end; d += NR) {
      add_gradient(d_head, head.D, false, targets.columns[n], d, product(n, d), product(n, d + L));
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
}  // namespace turnfast::TURNFAST_ISA
