// Eight floats at a time.
#pragma once

#include <immintrin.h>

#include "kernels/simd_portable.h"

namespace kvswap {
namespace {
namespace avx2 {

struct Simd {
  using Reg = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kVectors = 4;
  static constexpr int kRows = 2;

  static Reg zero() { return _mm256_setzero_ps(); }
  static Reg set1(float x) { return _mm256_set1_ps(x); }
  static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static Reg load(const Bf16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static Reg load(const F16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Reg load(const int8_t* p) {
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
  }
  static void load(const Nibbles* p, Reg* low, Reg* high) {
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const __m256i wide = _mm256_cvtepu8_epi32(codes);
    *low = levels(wide);
    *high = levels(_mm256_srli_epi32(wide, 4));
  }
  // Of an index only the lowest three bits count; the fourth says in which half it is.
  static Reg levels(__m256i codes) {
    const Reg below = _mm256_permutevar8x32_ps(_mm256_loadu_ps(kLevels), codes);
    const Reg above = _mm256_permutevar8x32_ps(_mm256_loadu_ps(kLevels + 8), codes);
    return _mm256_blendv_ps(below, above, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
  }
  static void store(float* p, Reg x) { _mm256_storeu_ps(p, x); }
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static Reg min(Reg a, Reg b) { return _mm256_min_ps(a, b); }
  static Reg round(Reg x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static float sum(Reg x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
  }
  static Reg reaches(Reg x, Reg least) {  // 1 or 0
    return _mm256_and_ps(_mm256_cmp_ps(x, least, _CMP_GE_OQ), set1(1));
  }
  static int num_from(Reg x, Reg least) {
    return __builtin_popcount(_mm256_movemask_ps(_mm256_cmp_ps(x, least, _CMP_GE_OQ)));
  }
  static float largest(Reg x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
  }

  // As on the wider set; what would be subnormal is zero. Of a maximum with what is no number
  // the second is taken, which is what is no number here.
  static Reg exp(Reg x) {
    const Reg tiny = _mm256_cmp_ps(x, set1(-87.0f), _CMP_LT_OQ);
    x = _mm256_max_ps(set1(-87.0f), x);
    const Reg whole = _mm256_round_ps(_mm256_mul_ps(x, set1(1.44269504088896341f)),
                                      _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    Reg rest = _mm256_fmadd_ps(whole, set1(-0.693359375f), x);
    rest = _mm256_fmadd_ps(whole, set1(2.12194440e-4f), rest);
    Reg y = set1(1.0f / 720);
    y = _mm256_fmadd_ps(y, rest, set1(1.0f / 120));
    y = _mm256_fmadd_ps(y, rest, set1(1.0f / 24));
    y = _mm256_fmadd_ps(y, rest, set1(1.0f / 6));
    y = _mm256_fmadd_ps(y, rest, set1(0.5f));
    y = _mm256_fmadd_ps(y, rest, set1(1.0f));
    y = _mm256_fmadd_ps(y, rest, set1(1.0f));
    const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
    const __m256i scaled = _mm256_add_epi32(_mm256_castps_si256(y), power);
    return _mm256_andnot_ps(tiny, _mm256_castsi256_ps(scaled));
  }
};

// One lane a token, two registers a tile.
struct Tile {
  static constexpr int kParts = 2;
  static constexpr int kQuads = 1;
  using Codes = __m256i;
  using Sum = __m256i;

  static Sum start(int32_t at) { return _mm256_set1_epi32(at); }
  static Codes load(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  // What comes over from the byte above is masked out.
  template <int kBits, int kPlane>
  static Codes plane(Codes codes) {
    return _mm256_and_si256(_mm256_srli_epi16(codes, kBits * kPlane),
                            _mm256_set1_epi8((1 << kBits) - 1));
  }
  static Codes spread(uint32_t query) { return _mm256_set1_epi32(static_cast<int>(query)); }

  // The sum of two products saturates at sixteen bits: nibbles stay far below that.
  static Sum pairs(Codes nibbles, Codes query, int16_t weight) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(nibbles, query), _mm256_set1_epi16(weight));
  }
  static Sum dot_small(Sum sum, Codes codes, Codes query) {
    return _mm256_add_epi32(sum, pairs(codes, query, 1));
  }
  static Sum dot(Sum sum, Codes codes, Codes query) {
    sum = _mm256_add_epi32(sum, pairs(plane<4, 0>(codes), query, 1));
    return _mm256_add_epi32(sum, pairs(plane<4, 1>(codes), query, 16));
  }
  static __m256 to_float(Sum sum) { return _mm256_cvtepi32_ps(sum); }

  static __m256 dot_bf16(__m256 sum, Codes codes, Codes query) {
    const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    const auto odd = [&](Codes x) { return _mm256_castsi256_ps(_mm256_and_si256(x, high)); };
    const auto even = [](Codes x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); };
    return _mm256_fmadd_ps(odd(codes), odd(query), _mm256_fmadd_ps(even(codes), even(query), sum));
  }

  template <int kGroup>
  static void store_groups(const __m256 (*scores)[4], float* out) {
    __m128 whole = _mm_set1_ps(-__builtin_inff());
    for (int part = 0; part < kParts; ++part) {
      const __m256* x = scores[part];
      if constexpr (kGroup == 1) {
        for (int q = 0; q < 4; ++q) {
          float each[8];
          _mm256_storeu_ps(each, x[q]);
          for (int t = 0; t < 8; ++t) out[4 * (8 * part + t) + q] = each[t];
        }
        continue;
      }
      // Neighbours meet, then pairs; each half of a register is four tokens throughout.
      const auto pair = [](__m256 a, __m256 b) {
        return _mm256_max_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
      };
      const __m256 a = pair(x[0], x[1]), b = pair(x[2], x[3]);
      if constexpr (kGroup == 2) {
        const __m256 even = _mm256_shuffle_ps(a, b, 0x88), odd = _mm256_shuffle_ps(a, b, 0xdd);
        _mm256_storeu_ps(out + 16 * part, _mm256_permute2f128_ps(even, odd, 0x20));
        _mm256_storeu_ps(out + 16 * part + 8, _mm256_permute2f128_ps(even, odd, 0x31));
        continue;
      }
      const __m256 best = pair(a, b);
      if constexpr (kGroup == 4) _mm256_storeu_ps(out + 8 * part, best);
      const __m128 both = _mm_max_ps(_mm256_castps256_ps128(best), _mm256_extractf128_ps(best, 1));
      if constexpr (kGroup == 8) _mm_storeu_ps(out + 4 * part, both);
      whole = _mm_max_ps(whole, both);
    }
    if constexpr (kGroup == 16) _mm_storeu_ps(out, whole);
  }
};

}  // namespace avx2
}  // namespace
}  // namespace kvswap
