// Row packing: which micro-batch each row goes to.

#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace {

// First-fit decreasing: rows by falling length (equal lengths in their given order), each into the
// first bin that still has room. The tree holds the largest room left below each node, so the first
// bin that fits is found in O(log S) instead of a walk over all bins.
class Rooms {
 public:
  Rooms(int64_t bins, int64_t budget) {
    while (leaves_ < bins) leaves_ *= 2;
    room_.assign(2 * leaves_, budget);
  }

  int64_t place(int64_t length) {
    int64_t node = 1;
    while (node < leaves_) {
      node *= 2;
      if (room_[node] < length) ++node;
    }
    room_[node] -= length;
    for (int64_t up = node / 2; up >= 1; up /= 2) {
      room_[up] = std::max(room_[2 * up], room_[2 * up + 1]);
    }
    return node - leaves_;
  }

 private:
  int64_t leaves_ = 1;
  std::vector<int64_t> room_;
};

// lengths: S row lengths in tokens, each in [0, budget] (the Python door checks); returns S bins.
std::vector<int64_t> pack_rows(at::IntArrayRef lengths, int64_t budget) {
  const auto num_rows = static_cast<int64_t>(lengths.size());
  std::vector<int64_t> order(num_rows);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
  Rooms rooms(num_rows, budget);
  std::vector<int64_t> bins(num_rows);
  for (int64_t row : order) bins[row] = rooms.place(lengths[row]);
  return bins;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(turnfast, m) {
  m.def("pack_rows(int[] lengths, int budget) -> int[]", &pack_rows);
}
