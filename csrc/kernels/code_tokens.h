// Tokens of one head into codes and back: src/kvswap/kernels/codecs.py defines both.
//
// Included by the isa_*.cc files alone, each with its own `Simd`.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "kernels/attend_head.h"
#include "kernels/elements.h"
#include "kernels/half.h"
#include "kernels/rotation.h"
#include "kernels/scales.h"
#include "kernels/simd_portable.h"

namespace kvswap {
namespace {

// Codes are whole numbers from `least` to `most`, each of which stands for a level, times the
// scale.
template <class T>
struct Grid {
  static constexpr float least = -128, most = 127;
  static constexpr int first = -1, last = 1;  // scales tried, counted from the smallest that fits
  // What would serve best by what is known beforehand: the largest size, and the mean of
  // squares relative to it.
  static float scale(float top, float) { return top / 127; }
  static float level(float code) { return code; }
  // The codes nearest to numbers in scales, and their levels.
  template <class S>
  static typename S::Reg nearest(typename S::Reg x, typename S::Reg* levels) {
    *levels = S::min(S::max(S::round(x), S::set1(least)), S::set1(most));
    return *levels;
  }
};
template <>
struct Grid<Nibbles> {
  static constexpr float least = -8, most = 7;
  static constexpr int first = -3, last = 1;
  static float scale(float top, float mean) { return std::sqrt(mean) * top; }
  static float level(float code) { return kLevels[static_cast<int>(code) + 8]; }
  template <class S>
  static typename S::Reg nearest(typename S::Reg x, typename S::Reg* levels) {
    const auto size = S::max(x, S::sub(S::zero(), x));
    auto steps = S::set1(0.5f), level = S::set1(kLevels[8]);
    for (int i = 1; i < 8; ++i) {
      const float below = kLevels[7 + i], above = kLevels[8 + i];
      const auto reached = S::reaches(size, S::set1((below + above) / 2));
      steps = S::add(steps, reached);
      level = S::fma(reached, S::set1(above - below), level);
    }
    const auto sign = S::fma(S::reaches(x, S::zero()), S::set1(2), S::set1(-1));
    *levels = S::mul(level, sign);
    return S::fma(steps, sign, S::set1(-0.5f));
  }
};

// The codes that are nearest to numbers at some scale; returns the squared error in scales.
template <class S, class T>
float round_to(const float* x, int64_t head_dim, int scale, float* codes) {
  const float inverse = 1 / kScales[static_cast<size_t>(scale)];
  auto errors = S::zero();
  int64_t i = 0;
  for (; i + S::kLanes <= head_dim; i += S::kLanes) {
    const auto wanted = S::mul(S::load(x + i), S::set1(inverse));
    typename S::Reg levels;
    S::store(codes + i, Grid<T>::template nearest<S>(wanted, &levels));
    const auto miss = S::sub(levels, wanted);
    errors = S::fma(miss, miss, errors);
  }
  float error = S::sum(errors);
  for (; i < head_dim; ++i) {
    float level;
    codes[i] = Grid<T>::template nearest<portable::Simd>(x[i] * inverse, &level);
    error += (level - x[i] * inverse) * (level - x[i] * inverse);
  }
  return error;
}

// Spells the scale: of each column that says another bit, the code moves by one whose other
// neighbour is the nearest. Columns are looked at side by side.
template <class S, class T>
void spell(const float* x, int64_t head_dim, int scale, float* codes) {
  constexpr int kParts = Elements<S, T>::kParts;
  const float inverse = 1 / kScales[static_cast<size_t>(scale)];
  const int64_t part = head_dim / kParts, words = spelling_words(part);
  float least[8], moved[8];
  int32_t at[8] = {}, sums[8] = {};
  std::fill(least, least + 8, std::numeric_limits<float>::infinity());
  for (int64_t word = 0; word < words * kParts; ++word) {
    const int64_t first = word % words * 8 + word / words * part;
    for (int i = 0; i < 8; ++i) {
      const float code = codes[first + i], wanted = x[first + i] * inverse;
      const float miss = wanted - Grid<T>::level(code), near = miss > 0 ? 1.0f : -1.0f;
      const bool is_beyond = code + near < Grid<T>::least || code + near > Grid<T>::most;
      const float next = is_beyond ? code - near : code + near;
      const float missed = wanted - Grid<T>::level(next);
      const float cost = missed * missed - miss * miss;
      const bool is_less = cost < least[i];
      least[i] = is_less ? cost : least[i];
      moved[i] = is_less ? next : moved[i];
      at[i] = is_less ? static_cast<int32_t>(first) + i : at[i];
      sums[i] += static_cast<int32_t>(code);
    }
  }
  for (int i = 0; i < 8; ++i) {
    if ((sums[i] ^ scale >> i) & 1) codes[at[i]] = moved[i];
  }
}

// The number of the smallest scale of at least so much; from 255 on there is none.
inline int scale_from(float least) {
  const int64_t above = std::bit_cast<int32_t>(least) - (int64_t{kScaleBase} << 23);
  return static_cast<int>(std::max<int64_t>(1, (above + (1 << 20) - 1) >> 20));
}

// The loops are written out: what the library makes of a function is shared by all files.
inline void put_row(const float* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = x[i];
}
inline void put_row(const float* x, int64_t count, Bf16* out) {
  for (int64_t i = 0; i < count; ++i) out[i].bits = to_bf16(x[i]);
}
inline void put_row(const float* x, int64_t count, F16* out) {
  for (int64_t i = 0; i < count; ++i) out[i].bits = to_f16(x[i]);
}

template <class S>
float largest_size(const float* x, int64_t head_dim) {
  auto tops = S::zero();
  int64_t i = 0;
  for (; i + S::kLanes <= head_dim; i += S::kLanes) {
    const auto each = S::load(x + i);
    tops = S::max(tops, S::max(each, S::sub(S::zero(), each)));
  }
  float top = S::largest(tops);
  for (; i < head_dim; ++i) top = std::max(top, std::fabs(x[i]));
  return top;
}

template <class S>
float sum_squares(const float* x, int64_t head_dim, float factor) {
  auto sums = S::zero();
  int64_t i = 0;
  for (; i + S::kLanes <= head_dim; i += S::kLanes) {
    const auto each = S::mul(S::load(x + i), S::set1(factor));
    sums = S::fma(each, each, sums);
  }
  float sum = S::sum(sums);
  for (; i < head_dim; ++i) sum += x[i] * factor * (x[i] * factor);
  return sum;
}

// Codes of turned numbers, in float32, with the scale whose error is least.
template <class S, class T>
void round_best(const float* x, int64_t head_dim, float* codes) {
  const float top = largest_size<S>(x, head_dim);
  const float inverse = top > 1e-30f ? 1 / top : 0;
  const float mean = sum_squares<S>(x, head_dim, inverse) / static_cast<float>(head_dim);
  const float wanted = Grid<T>::scale(top, mean);
  const bool is_number = x[0] * 0 == 0;  // turned: what is none in one element is in all
  const int fits = scale_from(wanted);
  int best = !is_number || fits >= 255 ? 255 : 0;
  if (best || !(wanted >= kScales[1] / 2)) {  // no number, too large, or next to nothing
    std::fill(codes, codes + head_dim, 0.0f);
    for (int i = 0; i < 8; ++i) codes[i] = static_cast<float>(best >> i & 1);
    return;
  }
  float least = std::numeric_limits<float>::infinity();
  for (int shift = Grid<T>::first; shift <= Grid<T>::last; ++shift) {
    const int scale = std::clamp(fits + shift, 1, 254);
    const float unit = kScales[static_cast<size_t>(scale)] / wanted;
    const float error = round_to<S, T>(x, head_dim, scale, codes) * unit * unit;
    if (error < least) {
      least = error;
      best = scale;
    }
  }
  round_to<S, T>(x, head_dim, best, codes);
  spell<S, T>(x, head_dim, best, codes);
}

inline void put_codes(const float* codes, int64_t head_dim, int8_t* out) {
  for (int64_t i = 0; i < head_dim; ++i) out[i] = static_cast<int8_t>(codes[i]);
}
inline void put_codes(const float* codes, int64_t head_dim, Nibbles* out) {
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const int low = static_cast<int>(codes[i]) + 8, high = static_cast<int>(codes[half + i]) + 8;
    out[i].both = static_cast<uint8_t>(low | high << 4);
  }
}

template <class S>
void encode_tokens(const CodedTokens& a, const void* tokens, uint8_t* codes) {
  const int64_t dim = a.head_dim, item = a.dtype == Dtype::f32 ? 4 : 2;
  float *x = a.scratch, *spare = x + dim;
  const char* row = static_cast<const char*>(tokens);
  with_codes(a.codec, [&]<class T>() {
    T* out = reinterpret_cast<T*>(codes);
    for (int64_t t = 0; t < a.count; ++t, row += a.stride * item) {
      widen<S>(row, a.dtype, dim, x);
      if (a.centre) {
        for (int64_t i = 0; i < dim; ++i) x[i] -= a.centre[i];
      }
      turn<S>(a.rotation, dim, x, spare);
      round_best<S, T>(x, dim, spare);
      put_codes(spare, dim, out);
      out += dim / Elements<S, T>::kParts;
    }
  });
}

// The levels of a row's codes times its scale, still turned.
template <class S, class T>
void read_row(const T* codes, int64_t head_dim, float* out) {
  constexpr int kParts = Elements<S, T>::kParts;
  const int64_t part = head_dim / kParts;
  const float scale = scale_of_row<S>(codes, head_dim);
  int64_t i = 0;
  for (; i + S::kLanes <= part; i += S::kLanes) {
    typename S::Reg levels[kParts];
    Elements<S, T>::load(codes + i, levels);
    for (int p = 0; p < kParts; ++p) {
      S::store(out + p * part + i, S::mul(levels[p], S::set1(scale)));
    }
  }
  for (; i < part; ++i) {
    float levels[kParts];
    Elements<portable::Simd, T>::load(codes + i, levels);
    for (int p = 0; p < kParts; ++p) out[p * part + i] = levels[p] * scale;
  }
}

template <class S>
void decode_tokens(const CodedTokens& a, const uint8_t* codes, void* tokens) {
  const int64_t dim = a.head_dim;
  float *x = a.scratch, *spare = x + dim;
  with_codes(a.codec, [&]<class T>() {
    const T* row = reinterpret_cast<const T*>(codes);
    for (int64_t t = 0; t < a.count; ++t, row += dim / Elements<S, T>::kParts) {
      read_row<S, T>(row, dim, x);
      turn_back<S>(a.rotation, dim, x, spare);
      if (a.centre) {
        for (int64_t i = 0; i < dim; ++i) x[i] += a.centre[i];
      }
      const int64_t place = t * a.stride;
      switch (a.dtype) {
        case Dtype::f32: put_row(x, dim, static_cast<float*>(tokens) + place); break;
        case Dtype::bf16: put_row(x, dim, static_cast<Bf16*>(tokens) + place); break;
        case Dtype::f16: put_row(x, dim, static_cast<F16*>(tokens) + place); break;
      }
    }
  });
}

}  // namespace
}  // namespace kvswap
