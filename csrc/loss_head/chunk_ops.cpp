// Operators of one chunk, for heads that are sharded over ranks (kernels/loss_head/cpp.py):
//   head_target_logits  the logit of each target, one dot product: the anchor of its exponentials
//   head_forward        E = exp(z - anchor) and its sums, over the vocabulary rows of this shard
//   head_backward       dX and dW from E and one coefficient per token, without the target's column
//   head_add_targets    the target's column
// Each worker owns a fixed range of vocabulary rows and partial sums are added in worker order, so
// results are bitwise reproducible for a given thread count.

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "operators.h"

namespace turnfast {

namespace {

using at::Tensor;

// Returns the data of a [C] vector after a check of its type and shape.
template <class T>
const T* vector_of(const char* name, const Tensor& values, int64_t C) {
  TORCH_CHECK_VALUE(values.dim() == 1 && values.size(0) == C && values.is_contiguous() &&
                        values.scalar_type() == c10::CppTypeToScalarType<T>::value,
                    name, ": expected a contiguous [", C, "] of ",
                    c10::CppTypeToScalarType<T>::value);
  return values.const_data_ptr<T>();
}

template <class T>
std::vector<T> padded(const T* values, int64_t C, int64_t to, T fill) {
  std::vector<T> out(values, values + C);
  out.resize(to, fill);
  return out;
}

// Returns padded columns. A column outside the head would read outside its memory.
std::vector<int32_t> checked_columns(const Tensor& columns, int64_t C, int64_t V, int64_t to) {
  std::vector<int32_t> out = padded<int32_t>(vector_of<int32_t>("columns", columns, C), C, to, -1);
  for (int64_t n = 0; n < C; ++n) {
    TORCH_CHECK_VALUE(out[n] >= -1 && out[n] < V, "columns: expected -1 <= column < ", V, ", got ",
                      out[n], " at index ", n);
  }
  return out;
}

void check_exps(const Kernel& k, const Head& head, const Tensor& exps, int64_t C) {
  const int64_t need = exps_bytes(k, head.type, head.V, C);
  TORCH_CHECK_VALUE(exps.scalar_type() == at::kByte && exps.is_contiguous() && exps.numel() >= need,
                    "exps: expected at least ", need, " contiguous bytes, got ", exps.numel(),
                    " of ", exps.scalar_type());
}

Tensor floats(int64_t n) { return at::empty({n}, at::kFloat); }

int64_t head_exps_bytes(const Tensor& weight, int64_t C, const std::string& kernel_name) {
  return exps_bytes(select_kernel(kernel_name), type_of(weight), weight.size(0), C);
}

std::vector<std::string> head_kernels() {
  std::vector<std::string> names;
  for (const Kernel* candidate : kKernels) {
    if (candidate->supported()) names.emplace_back(candidate->name);
  }
  return names;
}

Tensor head_target_logits(const Tensor& x, const Tensor& weight, const Tensor& columns,
                 double inv_temperature, double softcap, const std::string& kernel_name) {
  const Kernel& k = select_kernel(kernel_name);
  const Head head = make_head(x, weight, inv_temperature, softcap);
  const int64_t C = x.size(0);
  const std::vector<int32_t> column = checked_columns(columns, C, head.V, C);
  Tensor z = floats(C);
  at::parallel_for(0, C, grain(head.D), [&](int64_t begin, int64_t end) {
    k.target_logits(head, x.const_data_ptr(), column.data(), begin, end,
                    z.mutable_data_ptr<float>());
  });
  return z;
}

std::tuple<Tensor, Tensor, Tensor> head_forward(const Tensor& x, const Tensor& weight,
                                                const Tensor& columns, const Tensor& anchors,
                                                double inv_temperature, double softcap,
                                                const std::optional<Tensor>& exps,
                                                const std::string& kernel_name) {
  const Kernel& k = select_kernel(kernel_name);
  const Head head = make_head(x, weight, inv_temperature, softcap);
  const int64_t C = x.size(0), ld = round_up(C, k.tile_lanes), panels = ld / k.tile_lanes;
  if (exps) {
    check_exps(k, head, *exps, C);
    prefer_huge_pages(exps->data_ptr(), exps->nbytes());
  }
  const std::vector<int32_t> column = checked_columns(columns, C, head.V, ld);
  // The anchor of padding tokens makes their exponentials 0.
  const std::vector<float> anchor =
      padded<float>(vector_of<float>("anchors", anchors, C), C, ld, 1e4f);
  Tensor packed = at::empty({k.panel_bytes(head, C, false)}, at::kByte);
  at::parallel_for(0, panels, grain(head.D * k.tile_lanes), [&](int64_t begin, int64_t end) {
    k.pack_tokens(head, x.const_data_ptr(), C, begin, end, packed.data_ptr());
  });
  const ForwardChunk chunk{
      C, ld, packed.data_ptr(), column.data(), anchor.data(), exps ? exps->data_ptr() : nullptr};
  const int64_t workers = count_workers(k, head, C), scratch_floats = k.scratch_floats(head, C);
  Tensor scratch = floats(workers * scratch_floats);
  std::vector<double> sums(2 * workers * ld);
  std::vector<float> maxima(workers * ld);
  for_each_worker(workers, [&](int64_t w) {
    const auto [begin, end] = range_of(k, head, w, workers);
    k.forward(head, chunk, begin, end, {scratch.data_ptr<float>() + w * scratch_floats},
              {&sums[2 * w * ld], &sums[(2 * w + 1) * ld], &maxima[w * ld], nullptr}, nullptr);
  });
  Tensor sum = floats(C), dot = floats(C), max = floats(C);
  float *sum_C = sum.data_ptr<float>(), *dot_C = dot.data_ptr<float>(),
        *max_C = max.data_ptr<float>();
  for (int64_t n = 0; n < C; ++n) {
    double total = 0.0, total_dot = 0.0;
    float largest = -std::numeric_limits<float>::infinity();
    for (int64_t w = 0; w < workers; ++w) {
      total += sums[2 * w * ld + n];
      total_dot += sums[(2 * w + 1) * ld + n];
      largest = std::max(largest, maxima[w * ld + n]);
    }
    sum_C[n] = static_cast<float>(total);
    dot_C[n] = static_cast<float>(total_dot);
    max_C[n] = largest;
  }
  return {sum, dot, max};
}

std::tuple<Tensor, Tensor> head_backward(const Tensor& x, const Tensor& weight,
                                         const Tensor& anchors, double inv_temperature,
                                         double softcap, const Tensor& exps, const Tensor& scales,
                                         const std::optional<Tensor>& entropy_scales,
                                         const std::optional<Tensor>& entropy_offsets,
                                         const std::optional<Tensor>& d_head, bool overwrite,
                                         bool need_hidden, const std::string& kernel_name) {
  const Kernel& k = select_kernel(kernel_name);
  const Head head = make_head(x, weight, inv_temperature, softcap);
  const int64_t C = x.size(0), ld = round_up(C, k.tile_lanes);
  const int64_t width = round_up(head.D, k.tile_lanes);
  check_exps(k, head, exps, C);
  TORCH_CHECK_VALUE(entropy_scales.has_value() == entropy_offsets.has_value(),
                    "entropy_offsets: expected exactly when entropy_scales are given");
  if (d_head) check_floats("d_head", *d_head, weight.sizes());
  if (d_head && overwrite) prefer_huge_pages(d_head->data_ptr(), d_head->nbytes());
  const std::vector<float> anchor =
      padded<float>(vector_of<float>("anchors", anchors, C), C, ld, 0.0f);
  const float* scale_C = vector_of<float>("scales", scales, C);
  const std::vector<float> scale = padded<float>(scale_C, C, ld, 0.0f);
  std::vector<float> entropy_scale, entropy_offset;
  if (entropy_scales) {
    const float* scale_of = vector_of<float>("entropy_scales", *entropy_scales, C);
    const float* offset_of = vector_of<float>("entropy_offsets", *entropy_offsets, C);
    entropy_scale = padded<float>(scale_of, C, ld, 0.0f);
    entropy_offset = padded<float>(offset_of, C, ld, 0.0f);
  }
  // Where a token's dz is one factor times E, the factor is applied to its D-wide vector.
  const bool transform = entropy_scales.has_value() || head.capped;
  const std::vector<float> ones(C, 1.0f);
  const float* row_scales = transform ? ones.data() : scale_C;
  const void* x_data = x.const_data_ptr();
  Tensor packed = at::empty({d_head ? k.panel_bytes(head, C, true) : 0}, at::kByte);
  if (d_head) {
    const int64_t panels = width / k.tile_lanes;
    at::parallel_for(0, panels, grain(C * k.tile_lanes), [&](int64_t begin, int64_t end) {
      k.pack_scaled(head, x_data, row_scales, C, begin, end, packed.data_ptr());
    });
  }
  BackwardChunk chunk{};
  chunk.C = C;
  chunk.ld = ld;
  chunk.exps = exps.const_data_ptr();
  chunk.x_panels = packed.data_ptr();
  chunk.anchors = anchor.data();
  chunk.scales = scale.data();
  chunk.entropy_scales = entropy_scales ? entropy_scale.data() : nullptr;
  chunk.entropy_offsets = entropy_scales ? entropy_offset.data() : nullptr;
  chunk.transform = transform;
  chunk.d_head = {d_head ? d_head->data_ptr<float>() : nullptr, nullptr, nullptr, 0};
  chunk.overwrite = overwrite;
  const int64_t workers = count_workers(k, head, C), scratch_floats = k.scratch_floats(head, C);
  const int64_t d_x_floats = need_hidden ? round_up(C, k.rows_of(head.type)) * width : 0;
  Tensor scratch = floats(workers * scratch_floats);
  Tensor partial = floats(workers * d_x_floats);
  std::vector<float*> d_x(workers, nullptr);
  for (int64_t w = 0; w < workers && need_hidden; ++w) {
    d_x[w] = partial.data_ptr<float>() + w * d_x_floats;
  }
  std::vector<double> sums(workers * ld);
  for_each_worker(workers, [&](int64_t w) {
    const auto [begin, end] = range_of(k, head, w, workers);
    k.backward(head, chunk, begin, end, {scratch.data_ptr<float>() + w * scratch_floats},
               &sums[w * ld], d_x[w]);
  });
  Tensor g_sums = floats(C);
  for (int64_t n = 0; n < C; ++n) {
    double total = 0.0;
    for (int64_t w = 0; w < workers; ++w) total += sums[w * ld + n];
    g_sums.data_ptr<float>()[n] = static_cast<float>(total * row_scales[n]);
  }
  if (!need_hidden) return {floats(0), g_sums};
  Tensor out = at::empty({C, head.D}, at::kFloat);
  at::parallel_for(0, C, grain(head.D), [&](int64_t begin, int64_t end) {
    k.finish_d_x(head, {d_x.data(), workers, row_scales}, begin, end,
                 out.mutable_data_ptr<float>());
  });
  return {out, g_sums};
}

void head_add_targets(const Tensor& x, const Tensor& weight, const Tensor& columns,
                      const Tensor& dlogits, const std::optional<Tensor>& d_x,
                      const std::optional<Tensor>& d_head, const std::string& kernel_name) {
  const Kernel& k = select_kernel(kernel_name);
  const Head head = make_head(x, weight, 1.0, 0.0);
  const int64_t C = x.size(0);
  const std::vector<int32_t> column = checked_columns(columns, C, head.V, C);
  const TargetTerms targets{x.const_data_ptr(), column.data(),
                            vector_of<float>("dlogits", dlogits, C), C};
  const HeadGradient gradient{d_head ? d_head->data_ptr<float>() : nullptr, nullptr, nullptr, 0};
  if (d_x) check_floats("d_x", *d_x, x.sizes());
  if (d_head) check_floats("d_head", *d_head, weight.sizes());
  // Split along D: two tokens may have the same target.
  const int64_t panels = round_up(head.D, k.tile_lanes) / k.tile_lanes;
  at::parallel_for(0, panels, grain(C * k.tile_lanes), [&](int64_t begin, int64_t end) {
    k.add_targets(head, targets, begin * k.tile_lanes, std::min(end * k.tile_lanes, head.D),
                  d_x ? d_x->data_ptr<float>() : nullptr, gradient);
  });
}

Tensor exp_anchored(const Tensor& x, const std::string& kernel_name) {
  Tensor out = at::empty_like(x);
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat && x.is_contiguous(),
                    "x: expected contiguous float32");
  const Kernel& k = select_kernel(kernel_name);
  k.exp(x.const_data_ptr<float>(), x.numel(), out.mutable_data_ptr<float>());
  return out;
}

}  // namespace
}  // namespace turnfast

TORCH_LIBRARY_FRAGMENT(turnfast, m) {
  // Kernels that this machine supports, the fastest first. An empty name means the first.
  m.def("head_kernels() -> str[]", &turnfast::head_kernels);
  m.def("head_exps_bytes(Tensor head_weight, int tokens, str kernel=\"\") -> int");
  m.def(
      "head_target_logits(Tensor x, Tensor head_weight, Tensor columns, float inv_temperature, "
      "float softcap, str kernel=\"\") -> Tensor");
  m.def(
      "head_forward(Tensor x, Tensor head_weight, Tensor columns, Tensor anchors, "
      "float inv_temperature, float softcap, Tensor(a!)? exps, str kernel=\"\") "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "head_backward(Tensor x, Tensor head_weight, Tensor anchors, float inv_temperature, "
      "float softcap, Tensor exps, Tensor scales, Tensor? entropy_scales, Tensor? entropy_offsets, "
      "Tensor(a!)? d_head, bool overwrite, bool need_hidden, str kernel=\"\") -> (Tensor, Tensor)");
  m.def(
      "head_add_targets(Tensor x, Tensor head_weight, Tensor columns, Tensor dlogits, "
      "Tensor(a!)? d_x, Tensor(b!)? d_head, str kernel=\"\") -> ()");
  m.def("exp_anchored(Tensor x, str kernel=\"\") -> Tensor");
}

TORCH_LIBRARY_IMPL(turnfast, CPU, m) {
  m.impl("head_exps_bytes", &turnfast::head_exps_bytes);
  m.impl("head_target_logits", &turnfast::head_target_logits);
  m.impl("head_forward", &turnfast::head_forward);
  m.impl("head_backward", &turnfast::head_backward);
  m.impl("head_add_targets", &turnfast::head_add_targets);
  m.impl("exp_anchored", &turnfast::exp_anchored);
}
