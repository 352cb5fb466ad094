// The whole policy loss in one call, and log-probs alone in another, for a head that is not cut
// over ranks: plan, log-probs, policy and gradients, chunk by chunk. The same mathematics and order
// as kernels/loss_head/driver.py with loss_head.cpp's operators, without what Python and a tensor
// per vector cost a small vocabulary, and with two things that need the whole at hand:
//   E @ W is taken while E is made, block by block, since its token's coefficient acts on the
//   D-wide side; E is kept for the head's gradient alone, and not at all for a frozen head.
//   The gradient of a bf16 head is summed in 20 bits (HeadGradient), less than half of what a
//   float32 sum and its conversion take.
// It takes what is plainly right. Everything else is answered with nothing, and the Python path
// says what is wrong.

#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "threads.h"
#include "policy_terms.h"

namespace turnfast {

namespace {

using at::Tensor;

// Tokens per chunk. A chunk reads W and dW and writes dW, 6 C flops for each of their elements:
// kHidingTokens hide that traffic. E of a large head is limited so that all memory stays within a
// quarter of what PyTorch takes (bench/loss_head.py); where more tokens fit into kSmallBytes, a
// core's cache, they make the steps in between few.
constexpr int64_t kHidingTokens = 384, kMaxTokens = 2304, kStep = 96;
constexpr int64_t kSmallBytes = 1 << 20;

constexpr int64_t large_bytes(Type type) {
  return (type == Type::kBFloat16 ? int64_t{128} : int64_t{96}) << 20;
}

// Above this, sums of exponentials anchored at the target come near the end of float32.
constexpr float kAnchorLimit = 60.0f;
// Tokens of the padding are anchored so high that their exponentials vanish.
constexpr float kVanish = 1e4f;

struct Needs {
  bool hidden, head;
};

// Both sums over the whole call. d_hidden [T, D]: float32, or in the model's dtype where no row
// comes twice and nothing is left to be added; the head's as HeadGradient. A sum of earlier calls is
// gone on with, in float32, and d_head is then empty.
struct Sums {
  Tensor d_hidden, d_head, low;
  HeadGradient head{};
};

Sums make_sums(const Kernel& k, const Tensor& hidden, const Tensor& weight, Needs needs,
               bool rows_differ, const std::optional<Tensor>& head_grad) {
  Sums sums;
  const std::vector<int64_t> none{0};
  sums.d_hidden = at::zeros(needs.hidden ? hidden.sizes() : none,
                            rows_differ ? hidden.scalar_type() : at::kFloat);
  const bool split = weight.scalar_type() == at::kBFloat16, own = needs.head && !head_grad;
  const at::IntArrayRef shape = own ? weight.sizes() : none;
  sums.d_head = at::empty(shape, split ? at::kBFloat16 : at::kFloat);
  if (needs.head && head_grad) sums.head = {head_grad->data_ptr<float>(), nullptr, nullptr, 0};
  if (!own) return sums;
  prefer_huge_pages(sums.d_head.data_ptr(), sums.d_head.nbytes());
  if (split) {
    const int64_t low_row = round_up(weight.size(1), k.lanes2) / 2;
    sums.low = at::empty({weight.size(0), low_row}, at::kChar);
    prefer_huge_pages(sums.low.data_ptr(), sums.low.nbytes());
    sums.head = {nullptr, static_cast<uint16_t*>(sums.d_head.data_ptr()),
                 sums.low.data_ptr<int8_t>(), low_row};
  } else {
    sums.head = {sums.d_head.data_ptr<float>(), nullptr, nullptr, 0};
  }
  return sums;
}

// Memory of one thread's calls, kept for its next one. Huge pages: the panels are streamed over and
// over, and a hardware prefetcher stops at the end of a page.
class Arena {
 public:
  char* reserve(int64_t bytes) {
    if (bytes <= size_) return data_;
    std::free(data_);
    size_ = round_up(bytes, kPage);
    data_ = static_cast<char*>(std::aligned_alloc(kPage, size_));
    if (data_ == nullptr) size_ = 0;
    TORCH_CHECK(data_ != nullptr, "out of memory: ", bytes, " bytes");
    prefer_huge_pages(data_, size_);
    return data_;
  }
  ~Arena() { std::free(data_); }

 private:
  static constexpr int64_t kPage = 2 << 20;
  char* data_ = nullptr;
  int64_t size_ = 0;
};

// One head during one call: log-probs and entropies of a chunk, then its gradients.
class Pass {
 public:
  Pass(const Kernel& kernel, const Head& head, const Tensor& hidden, const int64_t* rows,
       const int64_t* targets, double temperature, bool entropy, Needs needs, Sums& sums)
      : k_(kernel),
        head_(head),
        hidden_(static_cast<const char*>(hidden.const_data_ptr())),
        row_bytes_(head.D * static_cast<int64_t>(hidden.element_size())),
        rows_(rows),
        targets_(targets),
        temperature_(temperature),
        transform_(entropy || head.capped),
        needs_(needs),
        sums_(sums) {}

  int64_t chunk_tokens() const {
    if (!keeps_exps()) return kHidingTokens;
    const int64_t step_bytes = exps_bytes(k_, head_.type, head_.V, kStep);
    const int64_t hiding = std::min(kHidingTokens / kStep, large_bytes(head_.type) / step_bytes);
    const int64_t steps = std::max({int64_t{1}, hiding, kSmallBytes / step_bytes});
    return std::min(kMaxTokens, steps * kStep);
  }

  // Buffers for chunks of up to `tokens`.
  void reserve(int64_t tokens) {
    const int64_t ld = round_up(tokens, k_.lanes2), width = round_up(head_.D, k_.lanes2);
    const int64_t threads = at::get_num_threads();
    partial_sums_.resize(3 * threads * ld);
    partial_max_.resize(threads * ld);
    const int64_t exps = keeps_exps() ? exps_bytes(k_, head_.type, head_.V, tokens) : 0;
    const bool small = exps <= kSmallBytes;
    const std::pair<char**, int64_t> places[] = {
        {&x_, tokens * row_bytes_},
        {&panels_, k_.panel_bytes(head_, tokens, false)},
        {&scaled_, needs_.head ? k_.panel_bytes(head_, tokens, true) : 0},
        {&scratch_, 4 * threads * k_.scratch_floats(head_, tokens)},
        {&d_x_, needs_.hidden ? 4 * threads * round_up(tokens, k_.rows_of(head_.type)) * width : 0},
        {&exps_, small ? exps : 0}};
    int64_t total = 0;
    for (const auto& [place, bytes] : places) total += round_up(bytes, 64);
    thread_local Arena arena;
    char* next = arena.reserve(total);
    for (const auto& [place, bytes] : places) {
      *place = next;
      next += round_up(bytes, 64);
    }
    if (small) return;
    large_exps_ = at::empty({exps}, at::kByte);
    prefer_huge_pages(large_exps_.data_ptr(), large_exps_.nbytes());
    exps_ = static_cast<char*>(large_exps_.data_ptr());
  }

  // log-probs and entropies of tokens[0..C). With keep, `backward` may follow.
  void forward(const int64_t* tokens, int64_t C, bool keep, double* logprobs, double* entropies) {
    tokens_ = tokens, C_ = C, ld_ = round_up(C, k_.lanes2);
    workers_ = count_workers(k_, head_, C);
    for (int64_t i = 0; i < C; ++i) {
      std::memcpy(x_ + i * row_bytes_, hidden_ + rows_[tokens[i]] * row_bytes_, row_bytes_);
    }
    columns_.assign(ld_, -1);
    for (int64_t i = 0; i < C; ++i) columns_[i] = static_cast<int32_t>(targets_[tokens[i]]);
    picked_.assign(ld_, kVanish);
    at::parallel_for(0, C, grain(head_.D), [&](int64_t begin, int64_t end) {
      k_.pick(head_, x_, columns_.data(), begin, end, picked_.data());
    });
    at::parallel_for(0, ld_ / k_.lanes2, grain(head_.D * k_.lanes2),
                     [&](int64_t begin, int64_t end) {
                       k_.pack_tokens(head_, x_, C, begin, end, panels_);
                     });
    anchors_ = picked_;
    run_forward(keep);
    if (anchor_at_maxima()) run_forward(keep);
    settle(logprobs, entropies);
  }

  // Gradients of the last forward, from dloss/dlogprob and, with an entropy term, dloss/dentropy.
  void backward(const double* d_logprobs, const double* d_entropies, bool first) {
    coefficients(d_logprobs, d_entropies);
    BackwardChunk chunk{};
    chunk.C = C_;
    chunk.ld = ld_;
    chunk.exps = exps_;
    chunk.anchors = anchors_.data();
    chunk.scales = scales_.data();
    chunk.slopes = d_entropies ? slopes_.data() : nullptr;
    chunk.bonuses = d_entropies ? bonuses_.data() : nullptr;
    chunk.transform = transform_;
    chunk.d_head = sums_.head;
    chunk.first = first;
    // Where a token's row of dz is one factor times E, the factor acts on the D-wide side.
    const std::vector<float>& row_scales = transform_ ? ones_ : scales_;
    ones_.assign(ld_, 1.0f);
    if (needs_.head) {
      const int64_t panels = round_up(head_.D, k_.lanes2) / k_.lanes2;
      at::parallel_for(0, panels, grain(C_ * k_.lanes2), [&](int64_t begin, int64_t end) {
        k_.pack_scaled(head_, x_, row_scales.data(), C_, begin, end, scaled_);
      });
      chunk.x_panels = scaled_;
    }
    const bool with_sums = !fused();
    if (needs_.head || with_sums) {
      for_each_worker(workers_, [&](int64_t w) {
        const auto [begin, end] = range_of(k_, head_, w, workers_);
        k_.backward(head_, chunk, begin, end, scratch(w), with_sums ? kept(w) : nullptr,
                    with_sums ? d_x(w) : nullptr);
      });
    }
    patches(row_scales);
    const int64_t panels = round_up(head_.D, k_.lanes2) / k_.lanes2;
    std::vector<const float*> partial(workers_);
    for (int64_t w = 0; w < workers_; ++w) partial[w] = d_x(w);
    gathered_.resize(C_);
    for (int64_t i = 0; i < C_; ++i) gathered_[i] = rows_[tokens_[i]];
    const bool direct = sums_.d_hidden.scalar_type() == at::kFloat;
    if (needs_.hidden && !direct) {
      d_rows_ = at::zeros({C_, head_.D}, at::kFloat);
      row_of_.resize(C_);
      std::iota(row_of_.begin(), row_of_.end(), 0);
    }
    Tensor& d_hidden = direct ? sums_.d_hidden : d_rows_;
    const int64_t* row_of = direct ? gathered_.data() : row_of_.data();
    // Cut along D: tokens may share a row of hidden or a target.
    at::parallel_for(0, panels, grain(C_ * k_.lanes2), [&](int64_t begin, int64_t end) {
      const int64_t from = begin * k_.lanes2, to = std::min(end * k_.lanes2, head_.D);
      if (needs_.hidden) {
        k_.scatter_d_x(head_, partial.data(), workers_, row_scales.data(), patches_.data(),
                       columns_.data(), row_of, C_, from, to, d_hidden.data_ptr<float>());
      }
      if (needs_.head) {
        k_.patch(head_, x_, columns_.data(), patches_.data(), C_, from, to, nullptr, sums_.head);
      }
    });
    if (needs_.hidden && !direct) {
      const Tensor index = at::from_blob(gathered_.data(), {C_}, at::kLong);
      sums_.d_hidden.index_copy_(0, index, d_rows_.to(sums_.d_hidden.scalar_type()));
    }
  }

 private:
  // E @ W needs no coefficient, so it is taken in the forward pass.
  bool fused() const { return needs_.hidden && !transform_; }
  bool keeps_exps() const { return needs_.head || (needs_.hidden && transform_); }

  Scratch scratch(int64_t w) const {
    return {reinterpret_cast<float*>(scratch_) + w * k_.scratch_floats(head_, C_)};
  }
  float* d_x(int64_t w) const {
    if (!needs_.hidden) return nullptr;
    const int64_t floats = round_up(C_, k_.rows_of(head_.type)) * round_up(head_.D, k_.lanes2);
    return reinterpret_cast<float*>(d_x_) + w * floats;
  }
  double* sum(int64_t w) { return &partial_sums_[3 * w * ld_]; }
  double* dot(int64_t w) { return &partial_sums_[(3 * w + 1) * ld_]; }
  double* kept(int64_t w) { return &partial_sums_[(3 * w + 2) * ld_]; }

  void run_forward(bool keep) {
    const bool stored = keep && keeps_exps(), product = keep && fused();
    const ForwardChunk chunk{C_,
                             ld_,
                             panels_,
                             columns_.data(),
                             anchors_.data(),
                             stored ? exps_ : nullptr};
    for_each_worker(workers_, [&](int64_t w) {
      const auto [begin, end] = range_of(k_, head_, w, workers_);
      k_.forward(head_, chunk, begin, end, scratch(w),
                 {sum(w), dot(w), &partial_max_[w * ld_], product ? kept(w) : nullptr},
                 product ? d_x(w) : nullptr);
    });
  }

  // Moves the anchor of tokens whose largest logit is far above their target's; true if any is.
  bool anchor_at_maxima() {
    bool moved = false;
    for (int64_t i = 0; i < C_; ++i) {
      float over = partial_max_[i];
      for (int64_t w = 1; w < workers_; ++w) over = std::max(over, partial_max_[w * ld_ + i]);
      if (!(over > kAnchorLimit)) continue;
      anchors_[i] += over;
      moved = true;
    }
    return moved;
  }

  void settle(double* logprobs, double* entropies) {
    S_.resize(C_), E_y_.resize(C_), Z_.resize(C_), log_Z_.resize(C_), entropies_.resize(C_);
    for (int64_t i = 0; i < C_; ++i) {
      double S = 0.0, Eu = 0.0;
      for (int64_t w = 0; w < workers_; ++w) S += sum(w)[i], Eu += dot(w)[i];
      const double u_y = static_cast<double>(picked_[i]) - anchors_[i];
      const double E_y = u_y == 0.0 ? 1.0 : std::exp(u_y);
      const double Z = S + E_y;
      logprobs[i] = u_y == 0.0 ? -std::log1p(S) : u_y - std::log(Z);
      log_Z_[i] = u_y - logprobs[i];
      entropies[i] = entropies_[i] = log_Z_[i] - (Eu + E_y * u_y) / Z;
      S_[i] = S, E_y_[i] = E_y, Z_[i] = Z;
    }
  }

  void coefficients(const double* d_logprobs, const double* d_entropies) {
    scales_.assign(ld_, 0.0f), slopes_.assign(ld_, 0.0f), bonuses_.assign(ld_, 0.0f);
    for (int64_t i = 0; i < C_; ++i) {
      scales_[i] = static_cast<float>(-d_logprobs[i] / (Z_[i] * temperature_));
      if (!d_entropies) continue;
      slopes_[i] = static_cast<float>(-d_entropies[i] / (Z_[i] * temperature_));
      bonuses_[i] = static_cast<float>(entropies_[i] - log_Z_[i]);
    }
  }

  // dz of the targets themselves. A softmax is shift invariant: its dz sum to 0. Taking the
  // target's from the sum of the others as they were rounded keeps that, so a part common to all
  // rows of W still cancels in dx. A soft cap has no such sum.
  void patches(const std::vector<float>& row_scales) {
    patches_.resize(C_);
    for (int64_t i = 0; i < C_; ++i) {
      if (!head_.capped) {
        double total = 0.0;
        for (int64_t w = 0; w < workers_; ++w) total += kept(w)[i];
        patches_[i] = static_cast<float>(-total * row_scales[i]);
        continue;
      }
      const double u_y = static_cast<double>(picked_[i]) - anchors_[i];
      const double cap = static_cast<double>(head_.scale.high) + head_.scale.low;
      const double t = picked_[i] / cap;
      const double own = -scales_[i] * S_[i] + slopes_[i] * (u_y + bonuses_[i]) * E_y_[i];
      patches_[i] = static_cast<float>(own * (1.0 - t * t));
    }
  }

  const Kernel& k_;
  const Head& head_;
  const char* hidden_;
  const int64_t row_bytes_;
  const int64_t *rows_, *targets_;
  const double temperature_;
  const bool transform_;
  const Needs needs_;
  Sums& sums_;

  char *x_ = nullptr, *panels_ = nullptr, *scaled_ = nullptr, *scratch_ = nullptr, *d_x_ = nullptr,
       *exps_ = nullptr;
  Tensor large_exps_, d_rows_;
  std::vector<double> partial_sums_, S_, E_y_, Z_, log_Z_, entropies_;
  std::vector<float> partial_max_, picked_, anchors_, scales_, slopes_, bonuses_, ones_, patches_;
  std::vector<int32_t> columns_;
  std::vector<int64_t> gathered_, row_of_;

  // Of the last forward.
  const int64_t* tokens_ = nullptr;
  int64_t C_ = 0, ld_ = 0, workers_ = 0;
};

// Whole segments: tokens [start, stop) of the order, segments [first, last).
struct Chunk {
  int64_t start, stop, first, last;
};

// The active tokens, ordered so that each ratio segment is contiguous: tokens edges[s] to
// edges[s + 1] are segment s. See plan.py.
struct Plan {
  std::vector<int64_t> order, edges;
  std::vector<Chunk> chunks;
  int64_t masked = 0, skipped = 0;
};

// segment_of: of each token, or null where every token is its own.
Plan make_plan(const PolicyInputs& in, int64_t N, const int64_t* segment_of, bool always,
               int64_t chunk) {
  const auto lit = [&](int64_t n) {
    return in.weights[n] != 0.0f && in.advantages[in.turns[n]] != 0.0f;
  };
  std::vector<char> signal;  // by segment: a token without advantage still moves its ratio
  if (segment_of != nullptr && N > 0) {
    signal.resize(*std::max_element(segment_of, segment_of + N) + 1);
    for (int64_t n = 0; n < N; ++n) signal[segment_of[n]] |= lit(n);
  }
  Plan plan;
  plan.order.reserve(N);
  for (int64_t n = 0; n < N; ++n) {
    const bool weighted = in.weights[n] != 0.0f;
    const bool lights = segment_of == nullptr ? lit(n) : signal[segment_of[n]] != 0;
    plan.masked += !weighted;
    if (weighted && (always || lights)) plan.order.push_back(n);
    if (weighted && !always && !lights) ++plan.skipped;
  }
  const auto total = static_cast<int64_t>(plan.order.size());
  if (segment_of == nullptr) {
    plan.edges.resize(total + 1);
    std::iota(plan.edges.begin(), plan.edges.end(), 0);
    // Equal parts: a short last chunk would cost as much weight traffic as a full one.
    const int64_t parts = std::max<int64_t>(1, (total + chunk - 1) / chunk);
    const int64_t size = (total + parts - 1) / parts;
    for (int64_t start = 0; start < total; start += size) {
      const int64_t stop = std::min(start + size, total);
      plan.chunks.push_back({start, stop, start, stop});
    }
    return plan;
  }
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
  return plan;
}

bool all_differ(const std::vector<int64_t>& tokens, const int64_t* rows, int64_t num_rows) {
  std::vector<char> seen(num_rows);
  for (const int64_t n : tokens) {
    if (seen[rows[n]]) return false;
    seen[rows[n]] = 1;
  }
  return true;
}

void check_indices(const Tensor& a, const Tensor& b, int64_t N) {
  for (const Tensor& index : {a, b}) {
    TORCH_CHECK_VALUE(index.scalar_type() == at::kLong && index.is_contiguous() &&
                          index.dim() == 1 && index.numel() == N,
                      "rows, targets, turns: expected contiguous int64 of one size");
  }
}

void check_tokens(const char* name, const Tensor& values, int64_t N) {
  TORCH_CHECK_VALUE(values.scalar_type() == at::kFloat && values.is_contiguous() &&
                        values.dim() == 1 && values.numel() == N,
                    name, ": expected contiguous float32 [", N, "]");
}

template <class T>
const T* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

bool within(const Tensor& index, int64_t end) {
  const int64_t* values = index.const_data_ptr<int64_t>();
  int64_t wrong = 0;
  for (int64_t n = 0; n < index.numel(); ++n) wrong |= values[n] | (end - 1 - values[n]);
  return wrong >= 0;
}

bool finite(const float* values, int64_t n) {
  float zero = 0.0f;  // NaN from the first value that is not finite on
  for (int64_t i = 0; i < n; ++i) zero += values[i] - values[i];
  return zero == 0.0f;
}

// Rows of 16-bit floats: no exponent is all ones.
bool finite_halves(const uint16_t* values, int64_t n, uint16_t exponent) {
  uint16_t bad = 0;
  for (int64_t i = 0; i < n; ++i) bad |= (values[i] & exponent) == exponent;
  return bad == 0;
}

bool finite_rows(const Tensor& hidden, const Tensor& rows) {
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

// The tokens of a turn are contiguous.
bool contiguous_turns(const int64_t* turns, int64_t N, int64_t K) {
  std::vector<char> seen(K);
  for (int64_t n = 0; n < N; ++n) {
    if (n > 0 && turns[n] == turns[n - 1]) continue;
    if (seen[turns[n]]) return false;
    seen[turns[n]] = 1;
  }
  return true;
}

bool plainly_right(const Tensor& hidden, const Tensor& weight, const Tensor& rows,
                   const Tensor& targets, const Tensor& turns, const PolicyInputs& in, int64_t K,
                   const int64_t* sequences) {
  const int64_t N = rows.numel();
  if (!within(rows, hidden.size(0)) || !within(targets, weight.size(0)) || !within(turns, K)) {
    return false;
  }
  if (!finite_rows(hidden, rows) || !finite(in.advantages, K) || !finite(in.weights, N)) {
    return false;
  }
  for (int64_t n = 0; n < N; ++n) {
    if (in.weights[n] < 0.0f) return false;
  }
  for (const float* values : {in.old, in.ref, in.sampler}) {
    // A masked token may carry anything: its log-prob is never read.
    float zero = 0.0f;
    for (int64_t n = 0; values != nullptr && n < N; ++n) {
      zero += in.weights[n] != 0.0f ? values[n] - values[n] : 0.0f;
    }
    if (zero != 0.0f) return false;
  }
  for (int64_t k = 0; sequences != nullptr && k < K; ++k) {
    // Ids so large that a table of them would hurt are left to the Python path, too.
    if (sequences[k] < 0 || sequences[k] > (int64_t{1} << 24)) return false;
  }
  return contiguous_turns(in.turns, N, K);
}

// loss, logprobs, entropies, turn_logprobs, stats, d_hidden, d_head; or nothing, see above. With
// head_grad the head's gradient is added to that, and d_head is empty.
std::vector<Tensor> policy_loss(
    const Tensor& hidden, const Tensor& weight, const Tensor& rows, const Tensor& targets,
    const Tensor& turns, const std::optional<Tensor>& sequences, const Tensor& advantages,
    const Tensor& weights, const std::optional<Tensor>& old, const std::optional<Tensor>& ref,
    const std::optional<Tensor>& sampler, c10::string_view ratio, c10::string_view kind,
    double clip_low, double clip_high, std::optional<double> dual_clip, double kl_coef,
    double entropy_coef, std::optional<double> is_cap, double temperature, double softcap,
    int64_t chunk_tokens, bool need_hidden, bool need_head, const std::optional<Tensor>& head_grad,
    c10::string_view kernel_name) {
  const Kernel& kernel = chosen(std::string(kernel_name));
  const Head head = make_head(hidden, weight, 1.0 / temperature, softcap);
  if (head_grad) check_floats("head_grad", *head_grad, weight.sizes());
  const int64_t N = rows.numel(), K = advantages.numel();
  check_indices(rows, targets, N);
  check_indices(rows, turns, N);
  for (const std::optional<Tensor>& values : {std::optional(weights), old, ref, sampler}) {
    if (values) check_tokens("weights and log-probs", *values, N);
  }
  check_tokens("advantages", advantages, K);
  TORCH_CHECK_VALUE(!sequences || (sequences->scalar_type() == at::kLong &&
                                   sequences->is_contiguous() && sequences->numel() == K),
                    "sequences: expected contiguous int64 [", K, "]");
  TORCH_CHECK_VALUE(!is_cap || sampler, "sampler_logprobs: expected with is_cap");
  const PolicyInputs in{turns.const_data_ptr<int64_t>(), advantages.const_data_ptr<float>(),
                        weights.const_data_ptr<float>(), data_of<float>(old), data_of<float>(ref),
                        data_of<float>(sampler)};
  const int64_t* sequence_of = data_of<int64_t>(sequences);
  if (!plainly_right(hidden, weight, rows, targets, turns, in, K, sequence_of)) return {};
  const Rule rule{clip_low, clip_high, kind == "cispo", dual_clip, is_cap, kl_coef, entropy_coef};
  const bool entropy = entropy_coef != 0.0;
  std::vector<int64_t> segments;
  if (ratio == "sequence") {
    TORCH_CHECK_VALUE(sequences, "sequences: expected with ratio 'sequence'");
    for (int64_t n = 0; n < N; ++n) segments.push_back(sequence_of[in.turns[n]]);
  }
  const int64_t* segment_of = ratio == "turn"       ? in.turns
                              : ratio == "sequence" ? segments.data()
                                                    : nullptr;
  const Needs needs{need_hidden, need_head};
  const bool gradients = need_hidden || need_head;
  Sums sums;
  Pass pass(kernel, head, hidden, rows.const_data_ptr<int64_t>(),
            targets.const_data_ptr<int64_t>(), temperature, entropy, needs, sums);
  const int64_t size = chunk_tokens > 0 ? chunk_tokens : pass.chunk_tokens();
  const Plan plan = make_plan(in, N, segment_of, kl_coef != 0.0 || entropy, size);
  const auto active = static_cast<int64_t>(plan.order.size());
  const int64_t* row = rows.const_data_ptr<int64_t>();
  const bool rows_differ = all_differ(plan.order, row, hidden.size(0));
  sums = make_sums(kernel, hidden, weight, needs, rows_differ, head_grad);
  if (active == 0) sums.d_head.zero_();
  int64_t longest = 0;
  for (const Chunk& chunk : plan.chunks) {
    longest = std::max(longest, std::min(size, chunk.stop - chunk.start));
  }
  pass.reserve(longest);
  Tensor logprobs = at::full({N}, std::numeric_limits<float>::quiet_NaN(), at::kFloat);
  Tensor entropies = logprobs.clone();
  Tensor turn_logprobs = at::zeros({K}, at::kFloat);
  std::vector<double> of_turns(K), lp(active), H(active), d_lp(active), d_H(entropy ? active : 0);
  PolicySums total;
  bool first = !head_grad;
  for (const Chunk& chunk : plan.chunks) {
    // The coefficients of a segment longer than a chunk are known only after its last token.
    const bool again = chunk.stop - chunk.start > size;
    for (int64_t i = chunk.start; i < chunk.stop; i += size) {
      const int64_t C = std::min(size, chunk.stop - i);
      pass.forward(&plan.order[i], C, gradients && !again, &lp[i], &H[i]);
    }
    for (int64_t i = chunk.start; i < chunk.stop; ++i) {
      TORCH_CHECK_VALUE(std::isfinite(lp[i]),
                        "head_weight: expected finite logits, got none at index ", plan.order[i],
                        " of rows");
    }
    for (int64_t s = chunk.first; s < chunk.last; ++s) {
      const int64_t i = plan.edges[s], count = plan.edges[s + 1] - i;
      segment_terms(rule, in, &plan.order[i], count, &lp[i], &H[i], &d_lp[i],
                    entropy ? &d_H[i] : nullptr, total);
    }
    for (int64_t i = chunk.start; gradients && i < chunk.stop; i += size) {
      const int64_t C = std::min(size, chunk.stop - i);
      if (again) pass.forward(&plan.order[i], C, true, &lp[i], &H[i]);
      pass.backward(&d_lp[i], entropy ? &d_H[i] : nullptr, first);
      first = false;
    }
  }
  float *logprobs_N = logprobs.data_ptr<float>(), *entropies_N = entropies.data_ptr<float>();
  for (int64_t i = 0; i < active; ++i) {
    const int64_t n = plan.order[i];
    logprobs_N[n] = static_cast<float>(lp[i]);
    entropies_N[n] = static_cast<float>(H[i]);
    of_turns[in.turns[n]] += lp[i];
  }
  std::copy(of_turns.begin(), of_turns.end(), turn_logprobs.data_ptr<float>());
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
  Tensor loss = at::empty({}, at::kFloat);
  *loss.data_ptr<float>() = static_cast<float>(total.loss);
  return {loss, logprobs, entropies, turn_logprobs, stats, sums.d_hidden, sums.d_head};
}

// logprobs, entropies [N] float32, nothing kept; or nothing, as above.
std::vector<Tensor> linear_logprobs(const Tensor& hidden, const Tensor& weight, const Tensor& rows,
                                    const Tensor& targets, double temperature, double softcap,
                                    int64_t chunk_tokens, c10::string_view kernel_name) {
  const Kernel& kernel = chosen(std::string(kernel_name));
  const Head head = make_head(hidden, weight, 1.0 / temperature, softcap);
  const int64_t N = rows.numel();
  check_indices(rows, targets, N);
  if (!within(rows, hidden.size(0)) || !within(targets, weight.size(0)) ||
      !finite_rows(hidden, rows)) {
    return {};
  }
  Sums none;
  Pass pass(kernel, head, hidden, rows.const_data_ptr<int64_t>(),
            targets.const_data_ptr<int64_t>(), temperature, false, {false, false}, none);
  const int64_t size = chunk_tokens > 0 ? chunk_tokens : pass.chunk_tokens();
  pass.reserve(std::min(size, N));
  std::vector<int64_t> order(N);
  std::iota(order.begin(), order.end(), 0);
  std::vector<double> lp(N), H(N);
  Tensor logprobs = at::empty({N}, at::kFloat), entropies = at::empty({N}, at::kFloat);
  float *logprobs_N = logprobs.data_ptr<float>(), *entropies_N = entropies.data_ptr<float>();
  for (int64_t i = 0; i < N; i += size) {
    pass.forward(&order[i], std::min(size, N - i), false, &lp[i], &H[i]);
  }
  for (int64_t n = 0; n < N; ++n) {
    if (!std::isfinite(lp[n])) return {};
    logprobs_N[n] = static_cast<float>(lp[n]);
    entropies_N[n] = static_cast<float>(H[n]);
  }
  return {logprobs, entropies};
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
      "float temperature, float softcap, int chunk_tokens, str kernel=\"\") -> Tensor[]");
}

TORCH_LIBRARY_IMPL(turnfast, CPU, m) {
  m.impl("policy_loss", &turnfast::policy_loss);
  m.impl("logprobs", &turnfast::linear_logprobs);
}
