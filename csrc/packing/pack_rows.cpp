// Assigns rows to micro-batches; see kernels/packing/first_fit.py.

#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace {

// The free tokens of each bin, in a tree whose nodes hold the maximum of their subtree. It finds
// the first bin with enough space in O(log S).
class Bins {
 public:
  Bins(int64_t bins, int64_t budget) {
    while (leaves_ < bins) leaves_ *= 2;
    free_.assign(2 * leaves_, budget);
  }

  // Adds a row to the first bin with enough space and returns the bin.
  int64_t place(int64_t length) {
    int64_t node = 1;
    while (node < leaves_) {
      node *= 2;
      if (free_[node] < length) ++node;
    }
    free_[node] -= length;
    for (int64_t up = node / 2; up >= 1; up /= 2) {
      free_[up] = std::max(free_[2 * up], free_[2 * up + 1]);
    }
    return node - leaves_;
  }

 private:
  int64_t leaves_ = 1;
  std::vector<int64_t> free_;
};

// First-fit decreasing: rows by decreasing length, equal lengths in their original order, each into
// the first bin with enough space. lengths: S row lengths in tokens, each in [0, budget] (checked
// by the Python function). Returns the bin of each row.
std::vector<int64_t> pack_rows(at::IntArrayRef lengths, int64_t budget) {
  const auto num_rows = static_cast<int64_t>(lengths.size());
  std::vector<int64_t> order(num_rows);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
  Bins bins(num_rows, budget);
  std::vector<int64_t> bin_of(num_rows);
  for (int64_t row : order) bin_of[row] = bins.place(lengths[row]);
  return bin_of;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(turnfast, m) {
  m.def("pack_rows(int[] lengths, int budget) -> int[]", &pack_rows);
}
