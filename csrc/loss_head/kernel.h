// The interface between the operators and the loops of one instruction set.
//
// C tokens of a chunk   V vocabulary   D hidden   E[v][n] = exp(z[v][n] - anchor[n])
//
// Tokens lie along the vector lanes. E is stored vocabulary-major, so the softmax of a token is a
// lane-wise sum. All three products use one register tile of `rows` broadcast rows by `tile_lanes`
// lanes:
//   forward   z[v][n]   = sum_d W[v][d] X[n][d]      rows = vocabulary, lanes = tokens
//   d hidden  dX[n][d] += sum_v G[v][n] W[v][d]      rows = tokens,     lanes = hidden
//   d head    dW[v][d] += sum_n G[v][n] X'[n][d]     rows = vocabulary, lanes = hidden
//
// One file per instruction set compiles the same source (kernel_impl.h), and select_kernel picks a
// table at run time, so one binary runs on every machine. These files include no torch header: an
// inline function of torch that is compiled for AVX-512 could become the copy that the linker keeps
// for all callers.

#pragma once

#include <cstdint>

namespace turnfast {

enum class Type { kFloat, kBFloat16, kHalf };

// Vocabulary rows are processed in multiples of this, a multiple of every kernel's `rows`.
constexpr int64_t kBlock = 96;

// A factor as the sum of two floats. One float is off by up to 6e-8 in the same direction for all
// logits; in a difference of logits of 100 that is an error of 6e-6.
struct Factor {
  float high, low;
};

constexpr Factor split(double x) {
  const float high = static_cast<float>(x);
  return {high, static_cast<float>(x - high)};
}

struct Head {
  const void* weight;  // [V, D], contiguous
  Type type;
  int64_t V, D;
  // z = scale (x . w), or scale tanh(into_cap (x . w)) with `capped`.
  Factor scale, into_cap;
  bool capped;
};

struct ForwardChunk {
  int64_t C;               // tokens
  int64_t ld;              // C rounded up to tile_lanes; row length of E
  const void* x_panels;    // output of pack_tokens
  const int32_t* columns;  // [ld] column of the target, -1 for padding
  const float* anchors;    // [ld]
  void* exps;              // E [V rounded up to kBlock][ld], target column 0; null: not stored
};

// Sums of one worker over its vocabulary rows without the target, [ld] each.
struct ForwardSums {
  double* sum;          // of E
  double* dot;          // of E (z - anchor)
  float* max;           // of z - anchor
  double* rounded_sum;  // of E as rounded for the products; only with d_x
};

// The head's gradient [V, D], summed over chunks: float32, or bf16 and 4 more bits.
// float32 is required where a sum continues over several calls. 20 bits lose 2^-13 per chunk, a
// sixteenth of the final rounding to bf16, and take less memory traffic than 32. `high` is always
// the sum rounded to bf16.
struct HeadGradient {
  float* full;      // float32, or null: use high and low
  uint16_t* high;   // bf16, or null: no gradient is wanted
  int8_t* low;      // [V][low_row]: signed remainders in units of 2^-4, two per byte
  int64_t low_row;  // bytes: half of D rounded up to tile_lanes
  bool wanted() const { return full != nullptr || high != nullptr; }
};

struct BackwardChunk {
  int64_t C, ld;
  const void* exps;
  const void* x_panels;          // output of pack_scaled: tokens times their scale
  const float* anchors;          // [ld]
  const float* scales;           // [ld], only read with `transform`
  const float* entropy_scales;   // [ld], or null: no entropy term
  const float* entropy_offsets;  // [ld], with entropy_scales
  bool transform;                // G = E (scale + entropy term) (1 - tanh^2), otherwise G = E
  HeadGradient d_head;
  bool overwrite;  // d_head is overwritten, not added to
};

// dX of a chunk: row_scales[n] times the sum of d_x[worker] over the workers.
struct HiddenSums {
  const float* const* d_x;
  int64_t workers;
  const float* row_scales;
};

// The targets' terms of both gradients: dlogits[n] W[columns[n]] and dlogits[n] x[n].
struct TargetTerms {
  const void* x;
  const int32_t* columns;
  const float* dlogits;
  int64_t C;
};

struct Kernel {
  const char* name;
  int64_t tile_lanes;        // tokens or hidden columns per register tile
  int64_t rows[3];           // broadcast rows per register tile, by type of the head
  int64_t bytes_per_exp[3];  // of E, by type of the head
  bool (*supported)();

  // Floats of scratch memory that one worker needs for a chunk.
  int64_t (*scratch_floats)(const Head&, int64_t C);
  // Bytes of packed tokens; scaled: of pack_scaled, otherwise of pack_tokens.
  int64_t (*panel_bytes)(const Head&, int64_t C, bool scaled);
  // Pack panels [begin, end).
  void (*pack_tokens)(const Head&, const void* x, int64_t C, int64_t begin, int64_t end, void* out);
  void (*pack_scaled)(const Head&, const void* x, const float* row_scales, int64_t C, int64_t begin,
                      int64_t end, void* out);
  // z of the targets of tokens [begin, end).
  void (*target_logits)(const Head&, const void* x, const int32_t* columns, int64_t begin,
                        int64_t end, float* z);
  // Vocabulary rows [begin, end), begin a multiple of `rows`. d_x: E @ W over these rows, [C
  // rounded up to `rows`][D rounded up to tile_lanes], overwritten; null: not wanted. Computed per
  // block, while E and W are in the cache.
  void (*forward)(const Head&, const ForwardChunk&, int64_t begin, int64_t end,
                  float* scratch, ForwardSums, float* d_x);
  // d_x: G @ W as above. g_sums: [ld], sums over this worker's vocabulary rows of G as rounded for
  // the products; null if G is E and d_x is null.
  void (*backward)(const Head&, const BackwardChunk&, int64_t begin, int64_t end,
                   float* scratch, double* g_sums, float* d_x);
  // out[rows[n]] += dX[n] + the target's term for all tokens; out: [.][D]. Hidden columns
  // [begin, end), begin a multiple of tile_lanes.
  void (*scatter_d_x)(const Head&, const HiddenSums&, const TargetTerms&, const int64_t* rows,
                      int64_t begin, int64_t end, float* out);
  // Adds the targets' terms to d_head, for the same range of columns.
  void (*add_targets)(const Head&, const TargetTerms&, int64_t begin, int64_t end,
                      const HeadGradient& d_head);
  void (*exp)(const float* x, int64_t n, float* out);

  int64_t rows_of(Type type) const { return rows[static_cast<int>(type)]; }
};

extern const Kernel kAmx, kAvx512Bf16, kAvx512, kAvx2, kPortable;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace turnfast
