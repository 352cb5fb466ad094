// AVX-512 with matrix tiles of bf16 (AMX: Sapphire Rapids and later). Only products of bf16 heads
// use tiles; everything else is as in avx512_bf16.cpp.

#include "kernel.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__has_include)
#if __has_include(<amxbf16intrin.h>)
#define TURNFAST_HAS_AMX 1
#endif
#endif

#if defined(TURNFAST_HAS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,amx-tile,amx-bf16")

#define TURNFAST_ISA amx
#define TURNFAST_PAIRS 1
#define TURNFAST_AMX 1

#include "avx512.h"

namespace turnfast::amx {
namespace {

// Configures the tile registers, 16 rows of 64 bytes each, for the lifetime of the object.
class TileShapes {
 public:
  TileShapes() {
    alignas(64) Config config{};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
  }
  ~TileShapes() { _tile_release(); }
  TileShapes(const TileShapes&) = delete;

 private:
  struct Config {
    uint8_t palette, start_row, unused[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
};

// c[32][32] = a b over k units, a multiple of 16: a is [32][ld] units, b [k][32].
inline __attribute__((always_inline)) void multiply_tiles(const uint32_t* a, int64_t ld,
                                                          const float* b, int64_t k, void* c) {
  constexpr int64_t kRow = 128;  // bytes of b and c
  const int64_t a_row = 4 * ld;
  const uint32_t* below = a + 16 * ld;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < k; step += 16) {
    _tile_loadd(6, b, kRow);
    _tile_loadd(4, a + step, a_row);
    _tile_loadd(7, b + 16, kRow);
    _tile_loadd(5, below + step, a_row);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    b += 16 * 32;
  }
  auto* to = static_cast<char*>(c);
  _tile_stored(0, to, kRow);
  _tile_stored(1, to + 64, kRow);
  _tile_stored(2, to + 16 * kRow, kRow);
  _tile_stored(3, to + 16 * kRow + 64, kRow);
}

// Transposes a 16 x 16 block of words.
inline __attribute__((always_inline)) void transpose(WordLanes (&x)[16]) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = reinterpret_cast<__m512i>(x[i]);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_maskz_unpacklo_epi32(0xffff, a[i], a[i + 1]);
    b[i + 1] = _mm512_maskz_unpackhi_epi32(0xffff, a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_maskz_unpacklo_epi64(0xff, b[i], b[i + 2]);
    a[i + 1] = _mm512_maskz_unpackhi_epi64(0xff, b[i], b[i + 2]);
    a[i + 2] = _mm512_maskz_unpacklo_epi64(0xff, b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_maskz_unpackhi_epi64(0xff, b[i + 1], b[i + 3]);
  }
  // a[4 q + c] holds columns c, c + 4, c + 8 and c + 12 of rows 4 q to 4 q + 3, one per quarter.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i low = _mm512_maskz_shuffle_i32x4(0xffff, a[c], a[4 + c], 0x88);
    const __m512i high = _mm512_maskz_shuffle_i32x4(0xffff, a[c], a[4 + c], 0xdd);
    const __m512i low2 = _mm512_maskz_shuffle_i32x4(0xffff, a[8 + c], a[12 + c], 0x88);
    const __m512i high2 = _mm512_maskz_shuffle_i32x4(0xffff, a[8 + c], a[12 + c], 0xdd);
    x[c] = reinterpret_cast<WordLanes>(_mm512_maskz_shuffle_i32x4(0xffff, low, low2, 0x88));
    x[c + 4] = reinterpret_cast<WordLanes>(_mm512_maskz_shuffle_i32x4(0xffff, high, high2, 0x88));
    x[c + 8] = reinterpret_cast<WordLanes>(_mm512_maskz_shuffle_i32x4(0xffff, low, low2, 0xdd));
    x[c + 12] = reinterpret_cast<WordLanes>(_mm512_maskz_shuffle_i32x4(0xffff, high, high2, 0xdd));
  }
}

}  // namespace
}  // namespace turnfast::amx

#include "kernel_impl.h"

#pragma GCC pop_options

namespace turnfast {
namespace {

// True if the CPU has bf16 tiles and Linux grants this process their registers.
bool request_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16) == 0 || (d & kTiles) == 0) {
    return false;
  }
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

extern constinit const Kernel kAmx = amx::table("amx", [] {
  static const bool granted = kAvx512Bf16.supported() && request_tiles();
  return granted;
});

}  // namespace turnfast
#else

namespace turnfast {

// The compiler or the system does not support tiles.
constexpr Kernel unsupported(const char* name) {
  Kernel kernel{};
  kernel.name = name;
  kernel.supported = [] { return false; };
  return kernel;
}

extern constinit const Kernel kAmx = unsupported("amx");

}  // namespace turnfast
#endif
