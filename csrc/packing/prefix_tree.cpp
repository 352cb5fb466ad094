// Prefix trees: rows with a common prefix share its tokens, so each distinct token is stored once.

#include <torch/library.h>

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <unordered_map>
#include <vector>

namespace {

// A branch of the tree: after token depth - 1 of `row`, the next token is `token`.
struct Branch {
  int64_t row, depth, token;
  bool operator==(const Branch&) const = default;
};

struct BranchHash {
  size_t operator()(const Branch& b) const {
    uint64_t h = static_cast<uint64_t>(b.row) * 0x9E3779B97F4A7C15ull;
    h = (h ^ static_cast<uint64_t>(b.depth)) * 0xC2B2AE3D27D4EB4Full;
    h = (h ^ static_cast<uint64_t>(b.token)) * 0x165667B19E3779F9ull;
    return h ^ (h >> 29);
  }
};

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// tokens: int64, concatenated rows; lengths: S row lengths, each at least 1. The Python code in
// kernels/packing/tree.py is the specification and describes the results.
Outputs prefix_tree(const at::Tensor& tokens, at::IntArrayRef lengths) {
  const auto S = static_cast<int64_t>(lengths.size());
  const auto flat = tokens.contiguous();
  const int64_t* ids = flat.const_data_ptr<int64_t>();
  std::vector<int64_t> begin(S), parent(S, -1), shared(S, 0);
  for (int64_t r = 1; r < S; ++r) begin[r] = begin[r - 1] + lengths[r - 1];

  // Each row stores only the tokens that no earlier row has: those from depth shared[r] on.
  std::unordered_map<Branch, int64_t, BranchHash> branches;
  std::vector<std::vector<int64_t>> children(S);
  std::vector<int64_t> roots;
  for (int64_t r = 0; r < S; ++r) {
    const int64_t* row = ids + begin[r];
    Branch at{-1, 0, row[0]};
    for (auto found = branches.find(at); found != branches.end(); found = branches.find(at)) {
      const int64_t other = found->second;
      const int64_t* other_row = ids + begin[other];
      const int64_t limit = std::min(lengths[r], lengths[other]);
      const int64_t same =
          std::mismatch(row + at.depth, row + limit, other_row + at.depth).first - row;
      parent[r] = other;
      shared[r] = same;
      if (same == lengths[r]) break;
      at = {other, same, row[same]};
    }
    if (shared[r] < lengths[r]) branches.emplace(at, r);
    (parent[r] < 0 ? roots : children[parent[r]]).push_back(r);
  }

  int64_t T = 0;
  for (int64_t r = 0; r < S; ++r) T += lengths[r] - shared[r];
  const auto long_options = tokens.options().dtype(at::kLong);
  auto sources = at::empty({T}, long_options), positions = at::empty({T}, long_options);
  auto ends = at::empty({T}, tokens.options().dtype(at::kInt));
  auto places = at::empty({flat.numel()}, long_options);
  auto order = at::empty({S}, long_options), overlap = at::empty({S}, long_options);
  int64_t* source = sources.mutable_data_ptr<int64_t>();
  int64_t* position = positions.mutable_data_ptr<int64_t>();
  int32_t* end = ends.mutable_data_ptr<int32_t>();
  int64_t* place = places.mutable_data_ptr<int64_t>();

  // Depth first with an explicit stack: a row's tokens, then its branches, the deepest first.
  struct Frame {
    int64_t row;
    size_t next;
    int64_t closed;  // the ends of the tokens from this depth on are set
  };
  std::vector<Frame> stack;
  std::vector<int64_t> start(S);
  int64_t cursor = 0, emitted = 0;
  auto enter = [&](int64_t r) {
    start[r] = cursor;
    order.mutable_data_ptr<int64_t>()[emitted] = r;
    overlap.mutable_data_ptr<int64_t>()[emitted++] = shared[r];
    for (int64_t depth = shared[r]; depth < lengths[r]; ++depth, ++cursor) {
      source[cursor] = begin[r] + depth;
      position[cursor] = depth;
    }
    std::stable_sort(children[r].begin(), children[r].end(),
                     [&](int64_t a, int64_t b) { return shared[a] > shared[b]; });
    stack.push_back({r, 0, lengths[r]});
  };
  auto finish = [&](Frame& frame, int64_t depth) {
    int32_t* ends_of_row = end + start[frame.row] - shared[frame.row];
    std::fill(ends_of_row + depth, ends_of_row + frame.closed, static_cast<int32_t>(cursor));
    frame.closed = depth;
  };
  for (int64_t root : roots) {
    enter(root);
    while (!stack.empty()) {
      Frame& frame = stack.back();
      const auto& below = children[frame.row];
      if (frame.next == below.size()) {
        finish(frame, shared[frame.row]);
        stack.pop_back();
        continue;
      }
      const int64_t child = below[frame.next++];
      finish(frame, shared[child]);
      enter(child);
    }
  }

  for (int64_t r = 0; r < S; ++r) {
    int64_t* place_of = place + begin[r];
    if (parent[r] >= 0) std::copy_n(place + begin[parent[r]], shared[r], place_of);
    for (int64_t depth = shared[r]; depth < lengths[r]; ++depth) {
      place_of[depth] = start[r] + depth - shared[r];
    }
  }
  return {sources, positions, ends, places, order, overlap};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(turnfast, m) {
  m.def(
      "prefix_tree(Tensor tokens, int[] lengths) -> (Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor)",
      &prefix_tree);
}
