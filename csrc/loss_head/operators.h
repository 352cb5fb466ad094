// Kernel selection, the description of a head, and the vocabulary ranges of the threads.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>

#include "kernel.h"

namespace turnfast {

inline const Kernel* const kKernels[] = {
#if defined(__x86_64__)
    &kAmx, &kAvx512Bf16, &kAvx512, &kAvx2,
#endif
    &kPortable};

// Returns the kernel of a name, or the fastest one that this machine supports.
inline const Kernel& select_kernel(const std::string& name) {
  for (const Kernel* candidate : kKernels) {
    if ((name.empty() || name == candidate->name) && candidate->supported()) return *candidate;
  }
  TORCH_CHECK_VALUE(false, "kernel: ", name, " is not available on this machine");
}

inline Type type_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Type::kFloat;
    case at::kBFloat16:
      return Type::kBFloat16;
    case at::kHalf:
      return Type::kHalf;
    default:
      TORCH_CHECK_VALUE(false, "head_weight: expected float32, bfloat16 or float16, got ",
                        tensor.scalar_type());
  }
}

inline Head make_head(const at::Tensor& x, const at::Tensor& weight, double inv_temperature,
                      double softcap) {
  TORCH_CHECK_VALUE(x.dim() == 2 && x.is_contiguous() && x.device().is_cpu(),
                    "x: expected a contiguous [C, D] on the CPU");
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.is_contiguous() && weight.device().is_cpu() &&
                        weight.size(1) == x.size(1) && weight.scalar_type() == x.scalar_type(),
                    "head_weight: expected a contiguous [V, ", x.size(1), "] of dtype ",
                    x.scalar_type(), " on the CPU");
  TORCH_CHECK_VALUE(weight.size(0) < std::numeric_limits<int32_t>::max(),
                    "head_weight: expected fewer than 2^31 rows, got ", weight.size(0));
  Head head{weight.data_ptr(), type_of(weight), weight.size(0), weight.size(1), {}, {}, false};
  head.capped = softcap != 0.0;
  head.scale = split(head.capped ? softcap * inv_temperature : inv_temperature);
  head.into_cap = split(head.capped ? 1.0 / softcap : 1.0);
  return head;
}

inline int64_t exps_bytes(const Kernel& k, Type type, int64_t V, int64_t C) {
  // A tile of the d-hidden product may read up to `rows` tokens past the last row of E.
  const int64_t elements = round_up(V, kBlock) * round_up(C, k.tile_lanes) + k.rows_of(type);
  return elements * k.bytes_per_exp[static_cast<int>(type)];
}

// Requests huge pages for hundreds of MB that are written once per call: faults of 4 KB pages would
// take several percent of the time.
inline void prefer_huge_pages(void* data, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHuge * kHuge;
  // A failure is harmless: ordinary pages work too.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// The vocabulary range of a worker: whole register tiles, so that workers never share a tile.
struct Range {
  int64_t begin, end;
};

// Fewer workers for little work: waking a thread costs as much as about 100,000 products. Depends
// on sizes and the thread count only, so the order of sums is reproducible.
inline int64_t count_workers(const Kernel& k, const Head& head, int64_t C) {
  const int64_t by_work = C * head.V * head.D >> 18;
  const int64_t most = std::min(head.V / k.rows_of(head.type), by_work);
  return std::clamp<int64_t>(most, 1, at::get_num_threads());
}

// The least number of items per thread, for loops over items of `elements` elements.
inline int64_t grain(int64_t elements) { return std::max<int64_t>(1, (1 << 15) / elements); }

inline Range range_of(const Kernel& k, const Head& head, int64_t worker, int64_t workers) {
  const int64_t rows = k.rows_of(head.type), tiles = round_up(head.V, rows) / rows;
  const auto edge = [&](int64_t w) { return std::min(head.V, tiles * w / workers * rows); };
  return {edge(worker), edge(worker + 1)};
}

template <class Body>
void for_each_worker(int64_t workers, const Body& body) {
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) body(w);
  });
}

}  // namespace turnfast
