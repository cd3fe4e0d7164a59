// Sixteen floats at a time.
#pragma once

#include <immintrin.h>

#include "kernels/simd_portable.h"

namespace kvswap {
namespace {
namespace avx512 {

struct Simd {
  using Reg = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kVectors = 4;
  static constexpr int kRows = 4;

  static Reg zero() { return _mm512_setzero_ps(); }
  static Reg set1(float x) { return _mm512_set1_ps(x); }
  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static Reg load(const Bf16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static Reg load(const F16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Reg load(const int8_t* p) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
  }
  // Levels are looked up; of an index only the lowest four bits count.
  static void load(const Nibbles* p, Reg* low, Reg* high) {
    const Reg levels = _mm512_loadu_ps(kLevels);
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m512i wide = _mm512_cvtepu8_epi32(codes);
    *low = _mm512_permutexvar_ps(wide, levels);
    *high = _mm512_permutexvar_ps(_mm512_srli_epi32(wide, 4), levels);
  }
  static void store(float* p, Reg x) { _mm512_storeu_ps(p, x); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static Reg min(Reg a, Reg b) { return _mm512_min_ps(a, b); }
  static Reg round(Reg x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static float sum(Reg x) { return _mm512_reduce_add_ps(x); }
  static Reg reaches(Reg x, Reg least) {  // 1 or 0
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, least, _CMP_GE_OQ), set1(1));
  }
  static int num_from(Reg x, Reg least) {
    return __builtin_popcount(_mm512_cmp_ps_mask(x, least, _CMP_GE_OQ));
  }
  static float largest(Reg x) { return _mm512_reduce_max_ps(x); }

  // 2^n * 2^f with f in [-0.5, 0.5]; 2^f by its Taylor series, whose error is below 2e-7. Of a
  // maximum with what is no number the second is taken, which is what is no number here.
  static Reg exp(Reg x) {
    x = _mm512_max_ps(set1(-104.0f), x);
    const Reg scaled = _mm512_mul_ps(x, set1(1.44269504088896341f));
    const Reg whole = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    Reg rest = _mm512_fmadd_ps(whole, set1(-0.693359375f), x);
    rest = _mm512_fmadd_ps(whole, set1(2.12194440e-4f), rest);
    Reg y = set1(1.0f / 720);
    y = _mm512_fmadd_ps(y, rest, set1(1.0f / 120));
    y = _mm512_fmadd_ps(y, rest, set1(1.0f / 24));
    y = _mm512_fmadd_ps(y, rest, set1(1.0f / 6));
    y = _mm512_fmadd_ps(y, rest, set1(0.5f));
    y = _mm512_fmadd_ps(y, rest, set1(1.0f));
    y = _mm512_fmadd_ps(y, rest, set1(1.0f));
    return _mm512_scalef_ps(y, whole);
  }
};

// One lane a token.
struct Tile {
  static constexpr int kParts = 1;  // registers of a tile
  static constexpr int kQuads = 4;  // worked on together
  using Codes = __m512i;
  using Sum = __m512i;

  static Sum start(int32_t at) { return _mm512_set1_epi32(at); }
  static Codes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  // What comes over from the byte above is masked out.
  template <int kBits, int kPlane>
  static Codes plane(Codes codes) {
    return _mm512_and_si512(_mm512_srli_epi16(codes, kBits * kPlane),
                            _mm512_set1_epi8((1 << kBits) - 1));
  }
  static Codes spread(uint32_t query) { return _mm512_set1_epi32(static_cast<int>(query)); }
  static Sum dot_small(Sum sum, Codes codes, Codes query) {
    return _mm512_dpbusd_epi32(sum, codes, query);
  }
  static Sum dot(Sum sum, Codes codes, Codes query) {
    return _mm512_dpbusd_epi32(sum, codes, query);
  }
  static __m512 to_float(Sum sum) { return _mm512_cvtepi32_ps(sum); }

  // Two bfloat16 of each token with two of the query.
  static __m512 dot_bf16(__m512 sum, Codes codes, Codes query) {
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    const auto odd = [&](Codes x) { return _mm512_castsi512_ps(_mm512_and_si512(x, high)); };
    const auto even = [](Codes x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); };
    return _mm512_fmadd_ps(odd(codes), odd(query), _mm512_fmadd_ps(even(codes), even(query), sum));
  }

  // The best token of each group, of four queries: [groups][4].
  template <int kGroup>
  static void store_groups(const __m512 (*scores)[4], float* out) {
    const __m512* x = scores[0];
    if constexpr (kGroup == 1) {
      for (int q = 0; q < 4; ++q) {
        float each[16];
        _mm512_storeu_ps(each, x[q]);
        for (int t = 0; t < 16; ++t) out[4 * t + q] = each[t];
      }
      return;
    }
    // Neighbours meet, then pairs; each quarter of a register is four tokens throughout.
    const auto pair = [](__m512 a, __m512 b) {
      return _mm512_max_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
    };
    const __m512 a = pair(x[0], x[1]), b = pair(x[2], x[3]);
    if constexpr (kGroup == 2) {
      float even[16], odd[16];
      _mm512_storeu_ps(even, _mm512_shuffle_ps(a, b, 0x88));
      _mm512_storeu_ps(odd, _mm512_shuffle_ps(a, b, 0xdd));
      for (int i = 0; i < 16; ++i) {
        out[8 * (i / 4) + i % 4] = even[i];
        out[8 * (i / 4) + 4 + i % 4] = odd[i];
      }
      return;
    }
    __m512 best = pair(a, b);
    if constexpr (kGroup == 4) _mm512_storeu_ps(out, best);
    if constexpr (kGroup == 8) {
      best = _mm512_max_ps(best, _mm512_shuffle_f32x4(best, best, 0b10110001));
      _mm_storeu_ps(out, _mm512_castps512_ps128(best));
      _mm_storeu_ps(out + 4, _mm512_extractf32x4_ps(best, 2));
    }
    if constexpr (kGroup == 16) {
      best = _mm512_max_ps(best, _mm512_shuffle_f32x4(best, best, 0b10110001));
      best = _mm512_max_ps(best, _mm512_shuffle_f32x4(best, best, 0b01001110));
      _mm_storeu_ps(out, _mm512_castps512_ps128(best));
    }
  }
};

}  // namespace avx512
}  // namespace
}  // namespace kvswap
