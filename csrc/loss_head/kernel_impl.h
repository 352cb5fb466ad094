// The loops of one instruction set. The including file sets the compiler's target and defines
//   TURNFAST_ISA     namespace of this copy
//   TURNFAST_LANES   floats per vector
//   TURNFAST_ROWS    broadcast rows per register tile
//   TURNFAST_AVX512  1: avx512.h is included; it defines this and the two sizes above
//   TURNFAST_PAIRS   1: bf16 heads use products of bf16 pairs (`narrow` is defined)
//   TURNFAST_AMX     1: products of whole tiles (`TileShapes`, `multiply_tiles`, `transpose` are
//                    defined); 0: products of vectors (`dot_pairs` is defined)
//
// A "unit" is 4 bytes: one float, or a pair of bf16 that are adjacent along the summed index. The
// float and the bf16 products are the same loop over units.

#include "impl/backward.h"
#include "impl/forward.h"
#include "impl/tokens.h"

namespace turnfast::TURNFAST_ISA {

// constexpr, so that loading the library executes no instruction of this set.
constexpr Kernel table(const char* name, bool (*supported)()) {
  const int64_t bf16_bytes = TURNFAST_PAIRS ? 2 : 4;
  return {name,
          NR,
          {MR, MulPairs::kRows, MR},
          {4, bf16_bytes, 4},
          supported,
          scratch_floats,
          panel_bytes,
          pack_tokens,
          pack_scaled,
          target_logits,
          forward,
          backward,
          scatter_d_x,
          add_targets,
          exp_all};
}

}  // namespace turnfast::TURNFAST_ISA
