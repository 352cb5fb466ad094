// The policy loss of whole ratio segments and its derivatives by log-prob and entropy, in double;
// the formulas of kernels/loss_head/policy.py per token.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>

namespace turnfast {

struct Rule {
  double clip_low, clip_high;
  bool cispo;
  std::optional<double> dual_clip, is_cap;
  double kl_coef, entropy_coef;
};

// Indexed by token, advantages by turn; null where a call has none.
struct PolicyInputs {
  const int64_t* turns;
  const float *advantages, *weights, *old, *ref, *sampler;
};

// Sums over tokens and extremes of the ratio; see Terms.sums in kernels/loss_head/policy.py.
struct PolicySums {
  double loss = 0, clip_low = 0, clip_high = 0, clip_dual = 0, kl = 0, ref_kl = 0, entropy = 0;
  double ratio_min = std::numeric_limits<double>::infinity(), ratio_max = -ratio_min;
};

// The `count` tokens of one segment. d_logprobs is written; d_entropies too, if the rule has an
// entropy term.
struct Segment {
  const int64_t* tokens;
  int64_t count;
  const double *logprobs, *entropies;
  double *d_logprobs, *d_entropies;
};

inline void segment_terms(const Rule& rule, const PolicyInputs& in, const Segment& segment,
                          PolicySums& sums) {
  const int64_t *tokens = segment.tokens, count = segment.count;
  const double *logprobs = segment.logprobs, *entropies = segment.entropies;
  double *d_logprobs = segment.d_logprobs, *d_entropies = segment.d_entropies;
  const auto log_ratio_of = [&](int64_t i) {
    return in.old ? logprobs[i] - in.old[tokens[i]] : 0.0;
  };
  double log_ratio = 0.0;
  for (int64_t i = 0; i < count; ++i) log_ratio += log_ratio_of(i);
  const double ratio = std::exp(log_ratio / static_cast<double>(count));
  sums.ratio_min = std::min(sums.ratio_min, ratio);
  sums.ratio_max = std::max(sums.ratio_max, ratio);
  double shared = 0.0;  // the derivative by the ratio, which all tokens of the segment share
  for (int64_t i = 0; i < count; ++i) {
    const int64_t n = tokens[i];
    const double A = in.advantages[in.turns[n]], weight = in.weights[n];
    const double old = in.old ? in.old[n] : logprobs[i];
    double scale = weight;
    if (rule.is_cap) scale *= std::min(std::exp(old - in.sampler[n]), *rule.is_cap);
    double own = 0.0;  // the derivative by this token's log-prob alone
    if (rule.cispo) {
      const double coefficient = -std::min(ratio, 1.0 + rule.clip_high) * A;
      sums.clip_high += ratio > 1.0 + rule.clip_high;
      sums.loss += coefficient * logprobs[i] * scale;
      own = coefficient * scale;
    } else {
      const bool high = ratio > 1.0 + rule.clip_high && A > 0.0;
      const bool low = ratio < 1.0 - rule.clip_low && A < 0.0;
      const bool dual = rule.dual_clip && ratio > *rule.dual_clip && A < 0.0;
      const double bounded = dual   ? *rule.dual_clip
                             : low  ? 1.0 - rule.clip_low
                             : high ? 1.0 + rule.clip_high
                                    : ratio;
      sums.clip_high += high;
      sums.clip_low += low;
      sums.clip_dual += dual;
      sums.loss += -bounded * A * scale;
      if (!high && !low && !dual) shared += -ratio * A * scale;
    }
    if (in.ref) {
      const double gap = in.ref[n] - logprobs[i], grown = std::expm1(gap), k3 = grown - gap;
      sums.ref_kl += k3;
      sums.loss += rule.kl_coef * weight * k3;
      own -= rule.kl_coef * weight * grown;
    }
    if (rule.entropy_coef != 0.0) {
      sums.loss -= rule.entropy_coef * weight * entropies[i];
      d_entropies[i] = -rule.entropy_coef * weight;
    }
    const double own_log_ratio = log_ratio_of(i);
    sums.kl += own_log_ratio == 0.0 ? 0.0 : std::expm1(-own_log_ratio) + own_log_ratio;
    sums.entropy += entropies[i];
    d_logprobs[i] = own;
  }
  shared /= static_cast<double>(count);
  for (int64_t i = 0; i < count; ++i) d_logprobs[i] += shared;
}

}  // namespace turnfast
