// The policy loss in one operator, and log-probs alone in another, for a head that is not sharded:
// plan, log-probs, policy and gradients, chunk by chunk, with the steps of
// kernels/loss_head/driver.py. Two optimisations:
//   E @ W is computed while E is made, block by block, because the token's coefficient is applied
//   to its D-wide vector. E is stored only for the head's gradient, not at all for a frozen head.
//   The gradient of a bf16 head is summed in 20 bits (HeadGradient), which needs less than half the
//   memory traffic of a float32 sum and its conversion.
// Each worker owns a fixed range of vocabulary rows and partial sums are added in worker order, so
// results are bitwise reproducible for a given thread count.

#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "head_pass.h"
#include "operators.h"
#include "plan.h"
#include "policy_terms.h"

namespace turnfast {

namespace {

// Log-probs, entropies and their gradients of the active tokens, in the order of the plan.
struct TokenValues {
  std::vector<double> logprobs, entropies, d_logprobs, d_entropies;
};

void check_finite(double logprob, int64_t token) {
  TORCH_CHECK_VALUE(std::isfinite(logprob),
                    "head_weight: expected finite logits, got none at index ", token, " of rows");
}

inline Gradients make_gradients(const Kernel& k, const Tensor& hidden, const Tensor& weight,
                                Needs needs, bool distinct_rows,
                                const std::optional<Tensor>& head_grad) {
  Gradients sums;
  const std::vector<int64_t> none{0};
  sums.d_hidden = at::zeros(needs.hidden ? hidden.sizes() : none,
                            distinct_rows ? hidden.scalar_type() : at::kFloat);
  const bool bf16 = weight.scalar_type() == at::kBFloat16, allocate = needs.head && !head_grad;
  const at::IntArrayRef shape = allocate ? weight.sizes() : none;
  sums.d_head = at::empty(shape, bf16 ? at::kBFloat16 : at::kFloat);
  if (needs.head && head_grad) sums.head = {head_grad->data_ptr<float>(), nullptr, nullptr, 0};
  if (!allocate) return sums;
  prefer_huge_pages(sums.d_head.data_ptr(), sums.d_head.nbytes());
  if (bf16) {
    const int64_t low_row = round_up(weight.size(1), k.tile_lanes) / 2;
    sums.low = at::empty({weight.size(0), low_row}, at::kChar);
    prefer_huge_pages(sums.low.data_ptr(), sums.low.nbytes());
    sums.head = {nullptr, static_cast<uint16_t*>(sums.d_head.data_ptr()),
                 sums.low.data_ptr<int8_t>(), low_row};
  } else {
    sums.head = {sums.d_head.data_ptr<float>(), nullptr, nullptr, 0};
  }
  return sums;
}

// Returns the sequence of each token, numbered from 0: the ids may be any integers.
std::vector<int64_t> number_sequences(const int64_t* sequences, int64_t K, const int64_t* turns,
                                      int64_t N) {
  std::vector<int64_t> ids(sequences, sequences + K), numbers(N);
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  for (int64_t n = 0; n < N; ++n) {
    const auto place = std::lower_bound(ids.begin(), ids.end(), sequences[turns[n]]);
    numbers[n] = place - ids.begin();
  }
  return numbers;
}

// Computes a plan chunk by chunk and returns the sums of the policy terms.
PolicySums run_plan(const Plan& plan, int64_t size, HeadPass& pass, const PolicyInputs& in,
                    const Rule& rule, bool overwrite, TokenValues& values) {
  const bool entropy = rule.entropy_coef != 0.0, gradients = pass.wants_gradients();
  auto& [logprobs, entropies, d_logprobs, d_entropies] = values;
  PolicySums total;
  for (const Chunk& chunk : plan.chunks) {
    // The coefficients of a segment longer than a chunk are known only after its last token.
    const bool recompute = chunk.stop - chunk.start > size;
    for (int64_t i = chunk.start; i < chunk.stop; i += size) {
      const int64_t C = std::min(size, chunk.stop - i);
      pass.forward(&plan.order[i], C, gradients && !recompute, &logprobs[i], &entropies[i]);
    }
    for (int64_t i = chunk.start; i < chunk.stop; ++i) check_finite(logprobs[i], plan.order[i]);
    for (int64_t s = chunk.first_segment; s < chunk.stop_segment; ++s) {
      const int64_t i = plan.edges[s];
      double* d_entropy = entropy ? &d_entropies[i] : nullptr;
      const Segment segment{&plan.order[i], plan.edges[s + 1] - i, &logprobs[i],
                            &entropies[i],  &d_logprobs[i],        d_entropy};
      segment_terms(rule, in, segment, total);
    }
    for (int64_t i = chunk.start; gradients && i < chunk.stop; i += size) {
      const int64_t C = std::min(size, chunk.stop - i);
      if (recompute) pass.forward(&plan.order[i], C, true, &logprobs[i], &entropies[i]);
      pass.backward(&d_logprobs[i], entropy ? &d_entropies[i] : nullptr, overwrite);
      overwrite = false;
    }
  }
  return total;
}

// The statistics in the order of PolicyStats.
Tensor stats_tensor(const Plan& plan, PolicySums total) {
  const auto active = static_cast<int64_t>(plan.order.size());
  if (active == 0) total.ratio_min = total.ratio_max = 1.0;
  const double count = static_cast<double>(std::max<int64_t>(active, 1));
  Tensor stats = at::empty({11}, at::kDouble);
  const double values[] = {static_cast<double>(active),
                           static_cast<double>(plan.masked),
                           static_cast<double>(plan.skipped),
                           total.clip_low / count,
                           total.clip_high / count,
                           total.clip_dual / count,
                           total.kl / count,
                           total.ref_kl / count,
                           total.ratio_min,
                           total.ratio_max,
                           total.entropy / count};
  std::copy(std::begin(values), std::end(values), stats.data_ptr<double>());
  return stats;
}

// Returns loss, logprobs, entropies, turn_logprobs, stats, d_hidden and d_head; nothing for values
// that are not valid. With head_grad the head's gradient is added to that, and d_head is empty.
std::vector<Tensor> policy_loss(
    const Tensor& hidden, const Tensor& weight, const Tensor& rows, const Tensor& targets,
    const Tensor& turns, const std::optional<Tensor>& sequences, const Tensor& advantages,
    const Tensor& weights, const std::optional<Tensor>& old, const std::optional<Tensor>& ref,
    const std::optional<Tensor>& sampler, c10::string_view ratio, c10::string_view kind,
    double clip_low, double clip_high, std::optional<double> dual_clip, double kl_coef,
    double entropy_coef, std::optional<double> is_cap, double temperature, double softcap,
    int64_t chunk_tokens, bool need_hidden, bool need_head, const std::optional<Tensor>& head_grad,
    c10::string_view kernel_name) {
  const Kernel& kernel = select_kernel(std::string(kernel_name));
  const Head head = make_head(hidden, weight, 1.0 / temperature, softcap);
  if (head_grad) check_floats("head_grad", *head_grad, weight.sizes());
  const int64_t N = rows.numel(), K = advantages.numel();
  for (const Tensor& index : {rows, targets, turns}) check_indices(index, N);
  for (const std::optional<Tensor>& values : {std::optional(weights), old, ref, sampler}) {
    if (values) check_floats("weights and log-probs", *values, {N});
  }
  check_floats("advantages", advantages, {K});
  TORCH_CHECK_VALUE(!sequences || (sequences->scalar_type() == at::kLong &&
                                   sequences->is_contiguous() && sequences->numel() == K),
                    "sequences: expected contiguous int64 [", K, "]");
  TORCH_CHECK_VALUE(!is_cap || sampler, "sampler_logprobs: expected with is_cap");
  const PolicyInputs in{turns.const_data_ptr<int64_t>(), advantages.const_data_ptr<float>(),
                        weights.const_data_ptr<float>(), data_of<float>(old), data_of<float>(ref),
                        data_of<float>(sampler)};
  const int64_t* sequence_of = data_of<int64_t>(sequences);
  if (!valid_values({hidden, weight, rows, targets}, turns, in, K, sequence_of)) return {};
  const Rule rule{clip_low, clip_high, kind == "cispo", dual_clip, is_cap, kl_coef, entropy_coef};
  const bool entropy = entropy_coef != 0.0;
  std::vector<int64_t> segments;
  if (ratio == "sequence") {
    TORCH_CHECK_VALUE(sequences, "sequences: expected with ratio 'sequence'");
    segments = number_sequences(sequence_of, K, in.turns, N);
  }
  const int64_t* segment_of = ratio == "turn"       ? in.turns
                              : ratio == "sequence" ? segments.data()
                                                    : nullptr;
  const Needs needs{need_hidden, need_head};
  const int64_t* row = rows.const_data_ptr<int64_t>();
  Gradients sums;
  HeadPass pass({kernel, head, hidden, row, targets.const_data_ptr<int64_t>(), temperature, entropy,
                 needs},
                sums);
  const int64_t size = chunk_tokens > 0 ? chunk_tokens : pass.chunk_tokens();
  const Plan plan = make_plan(in, N, segment_of, kl_coef != 0.0 || entropy, size);
  const auto active = static_cast<int64_t>(plan.order.size());
  const bool distinct_rows = rows_are_distinct(plan.order, row, hidden.size(0));
  sums = make_gradients(kernel, hidden, weight, needs, distinct_rows, head_grad);
  if (active == 0) sums.d_head.zero_();
  int64_t longest = 0;
  for (const Chunk& chunk : plan.chunks) {
    longest = std::max(longest, std::min(size, chunk.stop - chunk.start));
  }
  pass.reserve(longest);
  const auto vector = [&](bool wanted) { return std::vector<double>(wanted ? active : 0); };
  TokenValues values{vector(true), vector(true), vector(true), vector(entropy)};
  const PolicySums total = run_plan(plan, size, pass, in, rule, !head_grad, values);
  Tensor logprobs = at::full({N}, std::numeric_limits<float>::quiet_NaN(), at::kFloat);
  Tensor entropies = logprobs.clone();
  Tensor turn_logprobs = at::zeros({K}, at::kFloat);
  std::vector<double> of_turns(K);
  float *logprobs_N = logprobs.data_ptr<float>(), *entropies_N = entropies.data_ptr<float>();
  for (int64_t i = 0; i < active; ++i) {
    const int64_t n = plan.order[i];
    logprobs_N[n] = static_cast<float>(values.logprobs[i]);
    entropies_N[n] = static_cast<float>(values.entropies[i]);
    of_turns[in.turns[n]] += values.logprobs[i];
  }
  std::copy(of_turns.begin(), of_turns.end(), turn_logprobs.data_ptr<float>());
  Tensor loss = at::empty({}, at::kFloat);
  *loss.data_ptr<float>() = static_cast<float>(total.loss);
  return {loss,          logprobs,      entropies, turn_logprobs, stats_tensor(plan, total),
          sums.d_hidden, sums.d_head};
}

// Returns logprobs and entropies, [N] float32.
std::tuple<Tensor, Tensor> linear_logprobs(const Tensor& hidden, const Tensor& weight,
                                           const Tensor& rows, const Tensor& targets,
                                           double temperature, double softcap,
                                           int64_t chunk_tokens, c10::string_view kernel_name) {
  const Kernel& kernel = select_kernel(std::string(kernel_name));
  const Head head = make_head(hidden, weight, 1.0 / temperature, softcap);
  const int64_t N = rows.numel();
  for (const Tensor& index : {rows, targets}) check_indices(index, N);
  TORCH_CHECK_VALUE(valid_rows({hidden, weight, rows, targets}),
                    "rows, targets, hidden: expected valid indices and finite values");
  Gradients none;
  HeadPass pass({kernel, head, hidden, rows.const_data_ptr<int64_t>(),
                 targets.const_data_ptr<int64_t>(), temperature, false, {false, false}},
                none);
  const int64_t size = chunk_tokens > 0 ? chunk_tokens : pass.chunk_tokens();
  pass.reserve(std::min(size, N));
  std::vector<int64_t> order(N);
  std::iota(order.begin(), order.end(), 0);
  std::vector<double> logprob(N), entropy(N);
  Tensor logprobs = at::empty({N}, at::kFloat), entropies = at::empty({N}, at::kFloat);
  float *logprobs_N = logprobs.data_ptr<float>(), *entropies_N = entropies.data_ptr<float>();
  for (int64_t i = 0; i < N; i += size) {
    pass.forward(&order[i], std::min(size, N - i), false, &logprob[i], &entropy[i]);
  }
  for (int64_t n = 0; n < N; ++n) {
    check_finite(logprob[n], n);
    logprobs_N[n] = static_cast<float>(logprob[n]);
    entropies_N[n] = static_cast<float>(entropy[n]);
  }
  return {logprobs, entropies};
}

// Returns the kernels that this machine supports, the fastest first.
std::vector<std::string> head_kernels() {
  std::vector<std::string> names;
  for (const Kernel* candidate : kKernels) {
    if (candidate->supported()) names.emplace_back(candidate->name);
  }
  return names;
}

Tensor exp_anchored(const Tensor& x, c10::string_view kernel_name) {
  check_floats("x", x, x.sizes());
  Tensor out = at::empty_like(x);
  select_kernel(std::string(kernel_name))
      .exp(x.const_data_ptr<float>(), x.numel(), out.mutable_data_ptr<float>());
  return out;
}

}  // namespace
}  // namespace turnfast

TORCH_LIBRARY_FRAGMENT(turnfast, m) {
  m.def(
      "policy_loss(Tensor hidden, Tensor head_weight, Tensor rows, Tensor targets, Tensor turns, "
      "Tensor? sequences, Tensor advantages, Tensor weights, Tensor? old_logprobs, "
      "Tensor? ref_logprobs, Tensor? sampler_logprobs, str ratio, str kind, float clip_low, "
      "float clip_high, float? dual_clip, float kl_coef, float entropy_coef, float? is_cap, "
      "float temperature, float softcap, int chunk_tokens, bool need_hidden, bool need_head, "
      "Tensor(a!)? head_grad=None, str kernel=\"\") -> Tensor[]");
  m.def(
      "logprobs(Tensor hidden, Tensor head_weight, Tensor rows, Tensor targets, "
      "float temperature, float softcap, int chunk_tokens, str kernel=\"\") -> (Tensor, Tensor)");
  // For tests.
  m.def("head_kernels() -> str[]", &turnfast::head_kernels);
  m.def("exp_anchored(Tensor x, str kernel) -> Tensor");
}

TORCH_LIBRARY_IMPL(turnfast, CPU, m) {
  m.impl("policy_loss", &turnfast::policy_loss);
  m.impl("logprobs", &turnfast::linear_logprobs);
  m.impl("exp_anchored", &turnfast::exp_anchored);
}
