// The loss head's inner loops: what the driver (loss_head.cpp) asks of them.
//
// C tokens of a chunk   V vocabulary   D hidden   E[v][n] = exp(z[v][n] - anchor[n])
//
// Everything is laid out with tokens along the vector lanes: E is stored vocabulary-major, so the
// softmax of a token is a lane-wise sum without horizontal steps, and all three products run
// through one register tile of `rows` broadcast rows by `lanes2` lanes:
//   forward   z[v][n]   = sum_d W[v][d] X[n][d]      rows = vocabulary, lanes = tokens
//   d hidden  dX[n][d] += sum_v G[v][n] W[v][d]      rows = tokens,     lanes = hidden
//   d head    dW[v][d] += sum_n G[v][n] X'[n][d]     rows = vocabulary, lanes = hidden
//
// One file per instruction set compiles the same source (loss_head_kernel_impl.h); loss_head.cpp
// picks a table at run time, so one binary runs on every machine. These files include no torch
// header: an inline function of torch compiled for AVX-512 could otherwise be the copy the linker
// keeps for everybody.

#pragma once

#include <cstdint>

namespace turnfast {

enum class Type { kFloat, kBFloat16, kHalf };

// Vocabulary rows are worked on in multiples of this, a multiple of every kernel's `rows`.
constexpr int64_t kBlock = 96;

// A factor in two floats. One float is off by up to 6e-8 in the same direction for all logits,
// which a difference of logits of 100 would show as 6e-6.
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

// Scratch of one worker. Sizes in floats: see Kernel::scratch_floats.
struct Scratch {
  float* base;
};

struct ForwardChunk {
  int64_t C;               // tokens
  int64_t ld;              // C rounded up to the kernel's lanes2; row length of E
  const void* x_panels;    // pack_tokens' output
  const int32_t* columns;  // [ld] column of the target in this shard, or -1
  const float* anchors;    // [ld]
  void* exps;              // E [V rounded up to kBlock][ld], target column 0; null: not kept
};

struct ForwardSums {  // of one worker, over its vocabulary rows without the target, [ld] each
  double* sum;        // of E
  double* dot;        // of E (z - anchor)
  float* max;         // of z - anchor
  double* kept;       // of E as it entered the products, rounding included; only with d_x
};

// The head's gradient [V, D], summed over chunks: float32, as every sum that goes on from call to
// call, or bf16 with the next 4 bits beside it. 20 bits lose 2^-13 per chunk, a sixteenth of what
// the rounding to bf16 loses in the end, and are cheaper to stream than 32; `high` alone is the sum
// rounded to bf16 at any time.
struct HeadGradient {
  float* whole;    // or null, then
  uint16_t* high;  // bf16, or null: not wanted
  int8_t* low;     // [V][low_row]: signed rests of the rounding in units of 2^-4, two in a byte
  int64_t low_row;  // bytes: half of D rounded up to lanes2
  bool wanted() const { return whole != nullptr || high != nullptr; }
};

struct BackwardChunk {
  int64_t C, ld;
  const void* exps;
  const void* x_panels;  // pack_scaled' output: tokens times their scale
  const float* anchors;  // [ld]
  const float* scales;   // [ld], only read where `transform`
  const float* slopes;   // [ld] or null: no entropy term
  const float* bonuses;  // [ld], with slopes
  bool transform;        // G = E f(E, token) instead of E
  HeadGradient d_head;
  bool first;  // d_head is written, not added to
};

struct Kernel {
  const char* name;
  int64_t lanes2;            // tokens or hidden columns per register tile
  int64_t rows[3];           // broadcast rows per register tile, by type of the head
  int64_t bytes_per_exp[3];  // of E, by type of the head
  bool (*supported)();

  // Floats of scratch that one worker needs for a chunk.
  int64_t (*scratch_floats)(const Head&, int64_t C);
  // Bytes of packed tokens, and packing the ones of panels [begin, end).
  int64_t (*panel_bytes)(const Head&, int64_t C, bool scaled);
  void (*pack_tokens)(const Head&, const void* x, int64_t C, int64_t begin, int64_t end, void* out);
  void (*pack_scaled)(const Head&, const void* x, const float* row_scales, int64_t C, int64_t begin,
                      int64_t end, void* out);
  // z of the target of tokens [begin, end); 0 where the target is not in this shard.
  void (*pick)(const Head&, const void* x, const int32_t* columns, int64_t begin, int64_t end,
               float* z);
  // Vocabulary rows [begin, end), begin a multiple of `rows`. d_x: E @ W over these rows, [C
  // rounded up to `rows`][D rounded up to lanes2], overwritten; null: not wanted. Taken here, block
  // by block, it finds E and W in the cache.
  void (*forward)(const Head&, const ForwardChunk&, int64_t begin, int64_t end, Scratch,
                  ForwardSums, float* d_x);
  // d_x: this worker's sum of G @ W as above. g_sums: [ld], sums over this worker's vocabulary rows
  // of G as it entered the products, rounding included; null where G is E and d_x is null: not
  // wanted.
  void (*backward)(const Head&, const BackwardChunk&, int64_t begin, int64_t end, Scratch,
                   double* g_sums, float* d_x);
  // out[n] = row_scales[n] * sum over workers of d_x, tokens [begin, end).
  void (*finish_d_x)(const Head&, const float* const* d_x, int64_t workers, const float* row_scales,
                     int64_t begin, int64_t end, float* out);
  // out[rows[n]] += row_scales[n] * sum over workers of d_x + patches[n] W[columns[n]] for all
  // tokens, hidden columns [begin, end), begin a multiple of lanes2. out: [.][D].
  void (*scatter_d_x)(const Head&, const float* const* d_x, int64_t workers,
                      const float* row_scales, const float* patches, const int32_t* columns,
                      const int64_t* rows, int64_t C, int64_t begin, int64_t end, float* out);
  // The targets' own columns, hidden columns [begin, end), begin a multiple of lanes2: d_x[n] +=
  // patches[n] W[columns[n]] and d_head[columns[n]] += patches[n] x[n], each if wanted.
  void (*patch)(const Head&, const void* x, const int32_t* columns, const float* patches, int64_t C,
                int64_t begin, int64_t end, float* d_x, const HeadGradient& d_head);
  void (*exp)(const float* x, int64_t n, float* out);

  int64_t rows_of(Type type) const { return rows[static_cast<int>(type)]; }
};

extern const Kernel kAmx, kAvx512Bf16, kAvx512, kAvx2, kPortable;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace turnfast
