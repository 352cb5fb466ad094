// The tokens that enter the products, their order, and the chunks; see kernels/loss_head/plan.py.

#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "policy_terms.h"

namespace turnfast {

// Whole segments: tokens [start, stop) of the order, segments [first_segment, stop_segment).
struct Chunk {
  int64_t start, stop, first_segment, stop_segment;
};

// The active tokens, ordered so that each ratio segment is contiguous: segment s holds tokens
// edges[s] to edges[s + 1].
struct Plan {
  std::vector<int64_t> order, edges;
  std::vector<Chunk> chunks;
  int64_t masked = 0, skipped = 0;
};

// Cuts tokens, each its own segment, into equal chunks: a short last chunk would read as much of
// the head as a full one.
inline void cut_tokens(Plan& plan, int64_t chunk) {
  const auto total = static_cast<int64_t>(plan.order.size());
  plan.edges.resize(total + 1);
  std::iota(plan.edges.begin(), plan.edges.end(), 0);
  const int64_t parts = std::max<int64_t>(1, (total + chunk - 1) / chunk);
  const int64_t size = (total + parts - 1) / parts;
  for (int64_t start = 0; start < total; start += size) {
    const int64_t stop = std::min(start + size, total);
    plan.chunks.push_back({start, stop, start, stop});
  }
}

// Sorts tokens by segment and cuts chunks at segment boundaries.
inline void cut_segments(Plan& plan, const int64_t* segment_of, int64_t chunk) {
  const auto total = static_cast<int64_t>(plan.order.size());
  std::stable_sort(plan.order.begin(), plan.order.end(),
                   [&](int64_t a, int64_t b) { return segment_of[a] < segment_of[b]; });
  for (int64_t i = 0; i < total; ++i) {
    if (i == 0 || segment_of[plan.order[i]] != segment_of[plan.order[i - 1]]) {
      plan.edges.push_back(i);
    }
  }
  plan.edges.push_back(total);
  int64_t start = 0, stop = 0, first = 0;
  const auto segments = static_cast<int64_t>(plan.edges.size()) - 1;
  for (int64_t s = 0; s < segments; ++s) {
    if (stop > start && plan.edges[s + 1] - start > chunk) {
      plan.chunks.push_back({start, stop, first, s});
      start = stop, first = s;
    }
    stop = plan.edges[s + 1];
  }
  if (stop > start) plan.chunks.push_back({start, stop, first, segments});
}

// segment_of: the segment of each token, or null where every token is its own. all_weighted: tokens
// of segments without an advantage are trained too.
inline Plan make_plan(const PolicyInputs& in, int64_t N, const int64_t* segment_of,
                      bool all_weighted, int64_t chunk) {
  const auto has_signal = [&](int64_t n) {
    return in.weights[n] != 0.0f && in.advantages[in.turns[n]] != 0.0f;
  };
  // By segment: a token without advantage still changes the ratio of a segment that has one.
  std::vector<char> signal;
  if (segment_of != nullptr && N > 0) {
    signal.resize(*std::max_element(segment_of, segment_of + N) + 1);
    for (int64_t n = 0; n < N; ++n) signal[segment_of[n]] |= has_signal(n);
  }
  Plan plan;
  plan.order.reserve(N);
  for (int64_t n = 0; n < N; ++n) {
    const bool trained = segment_of == nullptr ? has_signal(n) : signal[segment_of[n]] != 0;
    if (in.weights[n] == 0.0f) {
      ++plan.masked;
    } else if (all_weighted || trained) {
      plan.order.push_back(n);
    } else {
      ++plan.skipped;
    }
  }
  if (segment_of == nullptr) {
    cut_tokens(plan, chunk);
  } else {
    cut_segments(plan, segment_of, chunk);
  }
  return plan;
}

// True if no two tokens have the same row.
inline bool rows_are_distinct(const std::vector<int64_t>& tokens, const int64_t* rows,
                              int64_t num_rows) {
  std::vector<char> seen(num_rows);
  for (const int64_t n : tokens) {
    if (seen[rows[n]]) return false;
    seen[rows[n]] = 1;
  }
  return true;
}

}  // namespace turnfast
