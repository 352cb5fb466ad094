// Checks of the operators' arguments.

#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "policy_terms.h"

namespace turnfast {

using at::Tensor;

// The arguments whose values have to be valid before any of them is used as an index.
struct CheckedInputs {
  const Tensor &hidden, &weight, &rows, &targets;
};

inline void check_indices(const Tensor& index, int64_t N) {
  TORCH_CHECK_VALUE(index.scalar_type() == at::kLong && index.is_contiguous() && index.dim() == 1 &&
                        index.numel() == N,
                    "rows, targets, turns: expected contiguous int64 of one size");
}

inline void check_floats(const char* name, const Tensor& values, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(values.scalar_type() == at::kFloat && values.is_contiguous() &&
                        values.device().is_cpu() && values.sizes() == sizes,
                    name, ": expected a contiguous float32 ", sizes, " on the CPU");
}

template <class T>
const T* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

inline bool in_range(const Tensor& index, int64_t end) {
  const int64_t* values = index.const_data_ptr<int64_t>();
  int64_t signs = 0;  // negative once a value or its distance to the end is negative
  for (int64_t n = 0; n < index.numel(); ++n) signs |= values[n] | (end - 1 - values[n]);
  return signs >= 0;
}

inline bool finite(const float* values, int64_t n) {
  float zero = 0.0f;  // NaN from the first value that is not finite on
  for (int64_t i = 0; i < n; ++i) zero += values[i] - values[i];
  return zero == 0.0f;
}

// A 16-bit float is finite unless its exponent bits are all ones.
inline bool finite_halves(const uint16_t* values, int64_t n, uint16_t exponent) {
  uint16_t bad = 0;
  for (int64_t i = 0; i < n; ++i) bad |= (values[i] & exponent) == exponent;
  return bad == 0;
}

inline bool finite_rows(const Tensor& hidden, const Tensor& rows) {
  const int64_t D = hidden.size(1), *row = rows.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < rows.numel(); ++n) {
    if (hidden.scalar_type() == at::kFloat) {
      if (!finite(hidden.const_data_ptr<float>() + row[n] * D, D)) return false;
      continue;
    }
    const uint16_t exponent = hidden.scalar_type() == at::kBFloat16 ? 0x7f80 : 0x7c00;
    const auto* data = static_cast<const uint16_t*>(hidden.const_data_ptr());
    if (!finite_halves(data + row[n] * D, D, exponent)) return false;
  }
  return true;
}

// True if the tokens of each turn are contiguous.
inline bool contiguous_turns(const int64_t* turns, int64_t N, int64_t K) {
  std::vector<char> seen(K);
  for (int64_t n = 0; n < N; ++n) {
    if (n > 0 && turns[n] == turns[n - 1]) continue;
    if (seen[turns[n]]) return false;
    seen[turns[n]] = 1;
  }
  return true;
}

inline bool valid_rows(const CheckedInputs& of) {
  return in_range(of.rows, of.hidden.size(0)) && in_range(of.targets, of.weight.size(0)) &&
         finite_rows(of.hidden, of.rows);
}

// Returns whether all values are valid. If not, the Python caller finds the bad value and raises
// the error.
inline bool valid_values(const CheckedInputs& of, const Tensor& turns, const PolicyInputs& in,
                         int64_t K, const int64_t* sequences) {
  const int64_t N = of.rows.numel();
  if (!in_range(turns, K) || !valid_rows(of)) return false;
  if (!finite(in.advantages, K) || !finite(in.weights, N)) return false;
  for (int64_t n = 0; n < N; ++n) {
    if (in.weights[n] < 0.0f) return false;
  }
  for (const float* values : {in.old, in.ref, in.sampler}) {
    // The log-prob of a masked token is never read, so it may be any value.
    float zero = 0.0f;
    for (int64_t n = 0; values != nullptr && n < N; ++n) {
      zero += in.weights[n] != 0.0f ? values[n] - values[n] : 0.0f;
    }
    if (zero != 0.0f) return false;
  }
  for (int64_t k = 0; sequences != nullptr && k < K; ++k) {
    if (sequences[k] < 0) return false;
  }
  return contiguous_turns(in.turns, N, K);
}

}  // namespace turnfast
