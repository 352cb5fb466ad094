// One head during one call: log-probs, entropies and gradients of a chunk of tokens.

#pragma once

#include <cstdlib>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

#include "operators.h"

namespace turnfast {

using at::Tensor;

// Tokens per chunk. A chunk of C tokens reads W and dW and writes dW, with 6 C flops per element:
// from kOverlapTokens on, arithmetic hides that memory traffic. E of a large head is limited so
// that all memory stays within a quarter of what PyTorch uses (bench/loss_head.py). Where E of
// more tokens fits into kSmallBytes, a core's cache, larger chunks reduce the overhead per pass.
constexpr int64_t kOverlapTokens = 384, kMaxTokens = 2304, kStep = 96;
constexpr int64_t kSmallBytes = 1 << 20;

constexpr int64_t large_bytes(Type type) {
  return (type == Type::kBFloat16 ? int64_t{128} : int64_t{96}) << 20;
}

// With a larger logit above the target, sums anchored at the target would overflow float32.
constexpr float kAnchorLimit = 60.0f;
// The anchor of padding tokens: their exponentials are 0.
constexpr float kPaddingAnchor = 1e4f;

struct Needs {
  bool hidden, head;
};

// Both gradients, summed over the whole call. d_hidden [T, D]: in the model's dtype where no two
// tokens have the same row, so that nothing is added to a rounded sum; otherwise float32. head: the
// head's gradient, in d_head and `low`, or in the caller's head_grad; d_head is empty then.
struct Gradients {
  Tensor d_hidden, d_head, low;
  HeadGradient head{};
};

// Memory that a thread reuses from call to call. It has huge pages, because the panels are streamed
// many times and a hardware prefetcher stops at the end of a page.
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

// The arguments of one call that a pass reads.
struct PassInputs {
  const Kernel& kernel;
  const Head& head;
  const Tensor& hidden;
  const int64_t *rows, *targets;
  double temperature;
  bool entropy;  // the rule has an entropy term
  Needs needs;
};

// One head during one call: log-probs and entropies of a chunk, then its gradients.
class HeadPass {
 public:
  HeadPass(const PassInputs& in, Gradients& sums)
      : in_(in),
        k_(in.kernel),
        head_(in.head),
        row_bytes_(in.head.D * static_cast<int64_t>(in.hidden.element_size())),
        transform_(in.entropy || in.head.capped),
        sums_(sums) {}

  bool wants_gradients() const { return in_.needs.hidden || in_.needs.head; }

  int64_t chunk_tokens() const {
    if (!stores_exps()) return kOverlapTokens;
    const int64_t step_bytes = exps_bytes(k_, head_.type, head_.V, kStep);
    const int64_t steps = std::max({int64_t{1}, kSmallBytes / step_bytes,
                                    std::min(kOverlapTokens / kStep,
                                             large_bytes(head_.type) / step_bytes)});
    return std::min(kMaxTokens, steps * kStep);
  }

  // Allocates buffers for chunks of up to `tokens`.
  void reserve(int64_t tokens) {
    const int64_t ld = round_up(tokens, k_.tile_lanes), width = round_up(head_.D, k_.tile_lanes);
    const int64_t rows = round_up(tokens, k_.rows_of(head_.type)), threads = at::get_num_threads();
    partial_sums_.resize(3 * threads * ld);
    partial_max_.resize(threads * ld);
    const int64_t exps = stores_exps() ? exps_bytes(k_, head_.type, head_.V, tokens) : 0;
    const bool small = exps <= kSmallBytes;
    const std::pair<char**, int64_t> places[] = {
        {&x_, tokens * row_bytes_},
        {&panels_, k_.panel_bytes(head_, tokens, false)},
        {&scaled_, in_.needs.head ? k_.panel_bytes(head_, tokens, true) : 0},
        {&scratch_, 4 * threads * k_.scratch_floats(head_, tokens)},
        {&d_x_, in_.needs.hidden ? 4 * threads * rows * width : 0},
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

  // Computes log-probs and entropies of tokens[0..C). With keep, `backward` may follow.
  void forward(const int64_t* tokens, int64_t C, bool keep, double* logprobs, double* entropies) {
    tokens_ = tokens, C_ = C, ld_ = round_up(C, k_.tile_lanes);
    workers_ = count_workers(k_, head_, C);
    const auto* hidden = static_cast<const char*>(in_.hidden.const_data_ptr());
    columns_.assign(ld_, -1);
    for (int64_t i = 0; i < C; ++i) {
      std::memcpy(x_ + i * row_bytes_, hidden + in_.rows[tokens[i]] * row_bytes_, row_bytes_);
      columns_[i] = static_cast<int32_t>(in_.targets[tokens[i]]);
    }
    target_logits_.assign(ld_, kPaddingAnchor);
    at::parallel_for(0, C, grain(head_.D), [&](int64_t begin, int64_t end) {
      k_.target_logits(head_, x_, columns_.data(), begin, end, target_logits_.data());
    });
    at::parallel_for(0, ld_ / k_.tile_lanes, grain(head_.D * k_.tile_lanes),
                     [&](int64_t begin, int64_t end) {
                       k_.pack_tokens(head_, x_, C, begin, end, panels_);
                     });
    anchors_ = target_logits_;
    run_forward(keep);
    if (anchor_at_maxima()) run_forward(keep);
    finish_logprobs(logprobs, entropies);
  }

  // Adds the gradients of the last forward, from dloss/dlogprob and, with an entropy term,
  // dloss/dentropy. overwrite: the head's gradient is written instead.
  void backward(const double* d_logprobs, const double* d_entropies, bool overwrite) {
    coefficients(d_logprobs, d_entropies);
    BackwardChunk chunk{};
    chunk.C = C_;
    chunk.ld = ld_;
    chunk.exps = exps_;
    chunk.anchors = anchors_.data();
    chunk.scales = scales_.data();
    chunk.entropy_scales = d_entropies ? entropy_scales_.data() : nullptr;
    chunk.entropy_offsets = d_entropies ? entropy_offsets_.data() : nullptr;
    chunk.transform = transform_;
    chunk.d_head = sums_.head;
    chunk.overwrite = overwrite;
    // Where a token's dz is one factor times E, the factor is applied to its D-wide vector.
    const std::vector<float>& row_scales = transform_ ? ones_ : scales_;
    ones_.assign(ld_, 1.0f);
    if (in_.needs.head) {
      const int64_t panels = round_up(head_.D, k_.tile_lanes) / k_.tile_lanes;
      at::parallel_for(0, panels, grain(C_ * k_.tile_lanes), [&](int64_t begin, int64_t end) {
        k_.pack_scaled(head_, x_, row_scales.data(), C_, begin, end, scaled_);
      });
      chunk.x_panels = scaled_;
    }
    if (in_.needs.head || !fused()) {
      for_each_worker(workers_, [&](int64_t w) {
        const auto [begin, end] = range_of(k_, head_, w, workers_);
        k_.backward(head_, chunk, begin, end, scratch(w), fused() ? nullptr : rounded_sum(w),
                    fused() ? nullptr : d_x(w));
      });
    }
    compute_target_dlogits(row_scales);
    add_gradients(row_scales);
  }

 private:
  // E @ W needs no coefficient, so the forward pass computes it.
  bool fused() const { return in_.needs.hidden && !transform_; }
  bool stores_exps() const { return in_.needs.head || (in_.needs.hidden && transform_); }

  float* scratch(int64_t w) const {
    return reinterpret_cast<float*>(scratch_) + w * k_.scratch_floats(head_, C_);
  }
  float* d_x(int64_t w) const {
    if (!in_.needs.hidden) return nullptr;
    const int64_t floats = round_up(C_, k_.rows_of(head_.type)) * round_up(head_.D, k_.tile_lanes);
    return reinterpret_cast<float*>(d_x_) + w * floats;
  }
  double* sum(int64_t w) { return &partial_sums_[3 * w * ld_]; }
  double* dot(int64_t w) { return &partial_sums_[(3 * w + 1) * ld_]; }
  double* rounded_sum(int64_t w) { return &partial_sums_[(3 * w + 2) * ld_]; }

  void run_forward(bool keep) {
    const bool stored = keep && stores_exps(), product = keep && fused();
    const ForwardChunk chunk{
        C_, ld_, panels_, columns_.data(), anchors_.data(), stored ? exps_ : nullptr};
    for_each_worker(workers_, [&](int64_t w) {
      const auto [begin, end] = range_of(k_, head_, w, workers_);
      k_.forward(head_, chunk, begin, end, scratch(w),
                 {sum(w), dot(w), &partial_max_[w * ld_], product ? rounded_sum(w) : nullptr},
                 product ? d_x(w) : nullptr);
    });
  }

  // Moves the anchor of tokens whose largest logit is far above the target's. True if it moved any.
  bool anchor_at_maxima() {
    bool moved = false;
    for (int64_t i = 0; i < C_; ++i) {
      float excess = partial_max_[i];
      for (int64_t w = 1; w < workers_; ++w) excess = std::max(excess, partial_max_[w * ld_ + i]);
      if (!(excess > kAnchorLimit)) continue;
      anchors_[i] += excess;
      moved = true;
    }
    return moved;
  }

  void finish_logprobs(double* logprobs, double* entropies) {
    S_.resize(C_), E_y_.resize(C_), Z_.resize(C_), log_Z_.resize(C_), entropies_.resize(C_);
    for (int64_t i = 0; i < C_; ++i) {
      double S = 0.0, Eu = 0.0;
      for (int64_t w = 0; w < workers_; ++w) S += sum(w)[i], Eu += dot(w)[i];
      const double u_y = static_cast<double>(target_logits_[i]) - anchors_[i];
      const double E_y = u_y == 0.0 ? 1.0 : std::exp(u_y);
      const double Z = S + E_y;
      logprobs[i] = u_y == 0.0 ? -std::log1p(S) : u_y - std::log(Z);
      log_Z_[i] = u_y - logprobs[i];
      entropies[i] = entropies_[i] = log_Z_[i] - (Eu + E_y * u_y) / Z;
      S_[i] = S, E_y_[i] = E_y, Z_[i] = Z;
    }
  }

  void coefficients(const double* d_logprobs, const double* d_entropies) {
    scales_.assign(ld_, 0.0f);
    entropy_scales_.assign(ld_, 0.0f);
    entropy_offsets_.assign(ld_, 0.0f);
    for (int64_t i = 0; i < C_; ++i) {
      scales_[i] = static_cast<float>(-d_logprobs[i] / (Z_[i] * in_.temperature));
      if (!d_entropies) continue;
      entropy_scales_[i] = static_cast<float>(-d_entropies[i] / (Z_[i] * in_.temperature));
      entropy_offsets_[i] = static_cast<float>(entropies_[i] - log_Z_[i]);
    }
  }

  // dz of the targets themselves. A softmax is shift invariant, so its dz sum to 0. The target's is
  // minus the sum of the others as rounded: a part common to all rows of W still cancels in dX.
  // With a soft cap dz do not sum to 0.
  void compute_target_dlogits(const std::vector<float>& row_scales) {
    target_dlogits_.resize(C_);
    for (int64_t i = 0; i < C_; ++i) {
      if (!head_.capped) {
        double total = 0.0;
        for (int64_t w = 0; w < workers_; ++w) total += rounded_sum(w)[i];
        target_dlogits_[i] = static_cast<float>(-total * row_scales[i]);
        continue;
      }
      const double u_y = static_cast<double>(target_logits_[i]) - anchors_[i];
      const double cap = static_cast<double>(head_.scale.high) + head_.scale.low;
      const double t = target_logits_[i] / cap;
      const double entropy_term = entropy_scales_[i] * (u_y + entropy_offsets_[i]) * E_y_[i];
      target_dlogits_[i] =
          static_cast<float>((entropy_term - scales_[i] * S_[i]) * (1.0 - t * t));
    }
  }

  // Adds dX to its rows of the hidden gradient, and the targets' terms to both gradients.
  void add_gradients(const std::vector<float>& row_scales) {
    std::vector<const float*> partial(workers_);
    for (int64_t w = 0; w < workers_; ++w) partial[w] = d_x(w);
    const HiddenSums hidden{partial.data(), workers_, row_scales.data()};
    const TargetTerms targets{x_, columns_.data(), target_dlogits_.data(), C_};
    token_rows_.resize(C_);
    for (int64_t i = 0; i < C_; ++i) token_rows_[i] = in_.rows[tokens_[i]];
    const bool in_place = sums_.d_hidden.scalar_type() == at::kFloat;
    if (in_.needs.hidden && !in_place) {
      d_rows_ = at::zeros({C_, head_.D}, at::kFloat);
      own_rows_.resize(C_);
      std::iota(own_rows_.begin(), own_rows_.end(), 0);
    }
    Tensor& d_hidden = in_place ? sums_.d_hidden : d_rows_;
    const int64_t* rows = in_place ? token_rows_.data() : own_rows_.data();
    const int64_t panels = round_up(head_.D, k_.tile_lanes) / k_.tile_lanes;
    // Split along D: tokens may share a row of hidden or a target.
    at::parallel_for(0, panels, grain(C_ * k_.tile_lanes), [&](int64_t begin, int64_t end) {
      const int64_t from = begin * k_.tile_lanes, to = std::min(end * k_.tile_lanes, head_.D);
      if (in_.needs.hidden) {
        k_.scatter_d_x(head_, hidden, targets, rows, from, to, d_hidden.data_ptr<float>());
      }
      if (in_.needs.head) k_.add_targets(head_, targets, from, to, sums_.head);
    });
    if (in_.needs.hidden && !in_place) {
      const Tensor index = at::from_blob(token_rows_.data(), {C_}, at::kLong);
      sums_.d_hidden.index_copy_(0, index, d_rows_.to(sums_.d_hidden.scalar_type()));
    }
  }

  const PassInputs in_;
  const Kernel& k_;
  const Head& head_;
  const int64_t row_bytes_;
  const bool transform_;
  Gradients& sums_;

  char *x_ = nullptr, *panels_ = nullptr, *scaled_ = nullptr, *scratch_ = nullptr, *d_x_ = nullptr,
       *exps_ = nullptr;
  Tensor large_exps_, d_rows_;
  std::vector<double> partial_sums_, S_, E_y_, Z_, log_Z_, entropies_;
  std::vector<float> partial_max_, target_logits_, anchors_, scales_, entropy_scales_,
      entropy_offsets_, ones_, target_dlogits_;
  std::vector<int32_t> columns_;
  std::vector<int64_t> token_rows_, own_rows_;

  // Of the last forward.
  const int64_t* tokens_ = nullptr;
  int64_t C_ = 0, ld_ = 0, workers_ = 0;
};

}  // namespace turnfast
