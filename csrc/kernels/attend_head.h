// Attention of a few query rows to scattered tokens, written once for every instruction set.
//
// Included by the isa_*.cc files alone, each with its own `Simd`.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/api.h"
#include "kernels/elements.h"
#include "kernels/rotation.h"
#include "kernels/scales.h"
#include "kernels/simd_portable.h"

namespace kvswap {
namespace {

template <class S, class T>
void widen_dtype(const T* x, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + S::kLanes <= count; i += S::kLanes) S::store(out + i, S::load(x + i));
  for (; i < count; ++i) out[i] = portable::Simd::load(x + i);
}

template <class S>
void widen(const void* x, Dtype dtype, int64_t count, float* out) {
  switch (dtype) {
    case Dtype::f32: return widen_dtype<S>(static_cast<const float*>(x), count, out);
    case Dtype::bf16: return widen_dtype<S>(static_cast<const Bf16*>(x), count, out);
    case Dtype::f16: return widen_dtype<S>(static_cast<const F16*>(x), count, out);
  }
}

// The dot product of a row with a key. An instruction set with a product of its own for some
// dtype specialises it.
template <class S, class T>
struct Dot {
  // Rows are widened once to float32.
  static void prepare(const T* query, int64_t head_dim, float* row) {
    int64_t i = 0;
    for (; i + S::kLanes <= head_dim; i += S::kLanes) S::store(row + i, S::load(query + i));
    for (; i < head_dim; ++i) row[i] = portable::Simd::load(query + i);
  }
  template <int Rows>
  static void run(const T* key, const float* rows, int64_t head_dim, float* out) {
    constexpr int kParts = Elements<S, T>::kParts;
    const int64_t part = head_dim / kParts;
    typename S::Reg sums[Rows];
    for (int r = 0; r < Rows; ++r) sums[r] = S::zero();
    int64_t i = 0;
    for (; i + S::kLanes <= part; i += S::kLanes) {
      typename S::Reg k[kParts];
      Elements<S, T>::load(key + i, k);
      for (int p = 0; p < kParts; ++p) {
        const float* at = rows + p * part + i;
        for (int r = 0; r < Rows; ++r) sums[r] = S::fma(k[p], S::load(at + r * head_dim), sums[r]);
      }
    }
    for (int r = 0; r < Rows; ++r) out[r] = S::sum(sums[r]);
    for (; i < part; ++i) {
      float k[kParts];
      Elements<portable::Simd, T>::load(key + i, k);
      for (int p = 0; p < kParts; ++p) {
        for (int r = 0; r < Rows; ++r) out[r] += k[p] * rows[r * head_dim + p * part + i];
      }
    }
  }
};

// The next segment's first lines are asked for while this one is worked on: slots lie
// scattered, and no hardware foresees where the next one is.
inline void prefetch(const void* begin, int64_t nbytes) {
  const char* at = static_cast<const char*>(begin);
  for (int64_t i = 0; i < nbytes; i += 64) __builtin_prefetch(at + i);
}

// Segments that are coded, or those that are not, and the place of their first token.
struct Span {
  int64_t first, last, place;
};

// Asks for the first rows of a segment that comes after the one worked on.
template <class S, class T>
void prefetch_ahead(const AttendHead& a, int64_t segment, const void* Segment::* rows) {
  if (segment >= a.num_segments) return;
  const int64_t row = a.head_dim / Elements<S, T>::kParts * static_cast<int64_t>(sizeof(T));
  prefetch(a.segments[segment].*rows, std::min<int64_t>(a.segments[segment].count, 4) * row);
}

// The sum of a few hundred numbers or more.
template <class S>
float sum_of(const float* x, int64_t count) {
  auto sums = S::zero();
  int64_t i = 0;
  for (; i + S::kLanes <= count; i += S::kLanes) sums = S::add(sums, S::load(x + i));
  float sum = S::sum(sums);
  for (; i < count; ++i) sum += x[i];
  return sum;
}

// The scale of a row of codes.
template <class S, class T>
float scale_of_row(const T* codes, int64_t head_dim) {
  constexpr int kParts = Elements<S, T>::kParts;
  return scale_of<kParts>(codes, head_dim / kParts);
}

// Each row's product with what was taken off the coded keys is added to the scores of those.
template <class S, class T, int Rows>
void score_rows(const AttendHead& a, Span span, const float* rows, const float* centred,
                float* scores, int64_t stride) {
  for (int64_t s = span.first, place = span.place; s < span.last; ++s) {
    const Segment& segment = a.segments[s];
    const T* key = static_cast<const T*>(segment.keys);
    prefetch_ahead<S, T>(a, s + 2, &Segment::keys);
    for (int64_t t = 0; t < segment.count; ++t, key += segment.key_stride, ++place) {
      float dots[Rows];
      Dot<S, T>::template run<Rows>(key, rows, a.head_dim, dots);
      if constexpr (kIsCoded<T>) {
        const float scale = scale_of_row<S>(key, a.head_dim);
        for (int r = 0; r < Rows; ++r) dots[r] = dots[r] * scale + centred[r];
      }
      for (int r = 0; r < Rows; ++r) scores[r * stride + place] = dots[r];
    }
  }
}

// Scores become weights that sum to one; returns the log of their sum before that.
template <class S>
float soften(const AttendHead& a, float* scores, int64_t hidden) {
  const int64_t seen = a.num_tokens - hidden, padded = padded_tokens(a.num_tokens);
  const float lowest = -std::numeric_limits<float>::infinity();
  if (a.softcap > 0) {
    for (int64_t i = 0; i < seen; ++i) {
      scores[i] = a.softcap * std::tanh(scores[i] * a.scaling / a.softcap);
    }
  } else {
    const auto scaling = S::set1(a.scaling);
    for (int64_t i = 0; i < padded; i += S::kLanes) {
      S::store(scores + i, S::mul(S::load(scores + i), scaling));
    }
  }
  std::fill(scores + seen, scores + padded, lowest);
  auto tops = S::set1(lowest);
  for (int64_t i = 0; i < padded; i += S::kLanes) tops = S::max(tops, S::load(scores + i));
  const float top = S::largest(tops);
  auto sums = S::zero();
  for (int64_t i = 0; i < padded; i += S::kLanes) {
    const auto weight = S::exp(S::sub(S::load(scores + i), S::set1(top)));
    S::store(scores + i, weight);
    sums = S::add(sums, weight);
  }
  const float sum = S::sum(sums);
  const auto share = S::set1(1.0f / sum);
  for (int64_t i = 0; i < padded; i += S::kLanes) {
    S::store(scores + i, S::mul(S::load(scores + i), share));
  }
  return top + std::log(sum);
}

// Weights of coded tokens become those of their levels.
template <class S, class T, int Rows>
void scale_weights(const AttendHead& a, Span span, float* weights, int64_t stride) {
  for (int64_t s = span.first, place = span.place; s < span.last; ++s) {
    const Segment& segment = a.segments[s];
    const T* value = static_cast<const T*>(segment.values);
    for (int64_t t = 0; t < segment.count; ++t, value += segment.value_stride, ++place) {
      const float scale = scale_of_row<S>(value, a.head_dim);
      for (int r = 0; r < Rows; ++r) weights[r * stride + place] *= scale;
    }
  }
}

// out[r] = sum over tokens of weight[r] * value, for elements [begin, begin + Vectors * lanes)
// of each part.
template <class S, class T, int Rows, int Vectors>
void weigh_values(const AttendHead& a, Span span, const float* weights, int64_t stride,
                  int64_t begin, float* const* out) {
  constexpr int kParts = Elements<S, T>::kParts;
  typename S::Reg sums[Rows][Vectors * kParts];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors * kParts; ++v) sums[r][v] = S::zero();
  }
  for (int64_t s = span.first, place = span.place; s < span.last; ++s) {
    const Segment& segment = a.segments[s];
    const T* value = static_cast<const T*>(segment.values) + begin;
    if (begin == 0) prefetch_ahead<S, T>(a, s + 2, &Segment::values);
    for (int64_t t = 0; t < segment.count; ++t, value += segment.value_stride, ++place) {
      typename S::Reg wide[Vectors * kParts];
      for (int v = 0; v < Vectors; ++v) {
        Elements<S, T>::load(value + v * S::kLanes, wide + v * kParts);
      }
      for (int r = 0; r < Rows; ++r) {
        const auto weight = S::set1(weights[r * stride + place]);
        for (int v = 0; v < Vectors * kParts; ++v) {
          sums[r][v] = S::fma(weight, wide[v], sums[r][v]);
        }
      }
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors * kParts; ++v) {
      const int64_t part = v % kParts * (a.head_dim / kParts);
      S::store(out[r] + part + begin + v / kParts * S::kLanes, sums[r][v]);
    }
  }
}

template <class S, class T, int Rows>
void weigh_rows(const AttendHead& a, Span span, const float* weights, int64_t stride,
                float* const* out) {
  constexpr int kParts = Elements<S, T>::kParts, kVectors = S::kVectors / kParts;
  const int64_t part = a.head_dim / kParts;
  int64_t begin = 0;
  for (; begin + kVectors * S::kLanes <= part; begin += kVectors * S::kLanes) {
    weigh_values<S, T, Rows, kVectors>(a, span, weights, stride, begin, out);
  }
  for (; begin + S::kLanes <= part; begin += S::kLanes) {
    weigh_values<S, T, Rows, 1>(a, span, weights, stride, begin, out);
  }
  for (; begin < part; ++begin) {
    weigh_values<portable::Simd, T, Rows, 1>(a, span, weights, stride, begin, out);
  }
}

// Adds the values of coded tokens, turned back, once for all of them. `turned` has a row for
// each query row and a spare one.
template <class S, class T, int Rows>
void add_coded(const AttendHead& a, Span span, float* weights, int64_t stride, float* turned,
               int64_t first) {
  float *sums[Rows], shares[Rows];
  for (int r = 0; r < Rows; ++r) {
    sums[r] = turned + r * a.head_dim;
    shares[r] = a.centre.values ? sum_of<S>(weights + r * stride, a.num_coded_tokens) : 0;
  }
  scale_weights<S, T, Rows>(a, span, weights, stride);
  weigh_rows<S, T, Rows>(a, span, weights, stride, sums);
  for (int r = 0; r < Rows; ++r) {
    turn_back<S>(a.rotation, a.head_dim, sums[r], turned + Rows * a.head_dim);
    float* out = a.out[first + r];
    for (int64_t i = 0; i < a.head_dim; ++i) out[i] += sums[r][i];
    if (!a.centre.values) continue;
    for (int64_t i = 0; i < a.head_dim; ++i) out[i] += shares[r] * a.centre.values[i];
  }
}

// Rows of one block: their scores, their weights, their sums. Coded keys are met by queries
// that are turned as they were.
template <class S, class T, int Rows>
void attend_rows(const AttendHead& a, int64_t first, float* rows) {
  const int64_t stride = padded_tokens(a.num_tokens), dim = a.head_dim;
  const Span coded{0, a.num_coded, 0}, plain{a.num_coded, a.num_segments, a.num_coded_tokens};
  float *scores = a.scratch, *turned = rows + Rows * dim;
  for (int r = 0; r < Rows; ++r) {
    const T* query = static_cast<const T*>(a.query[first + r]);
    Dot<S, T>::prepare(query, dim, rows + r * dim);
  }
  if (a.num_coded) {
    float centred[Rows] = {};
    for (int r = 0; r < Rows; ++r) {
      float* query = turned + r * dim;
      widen<S>(a.query[first + r], a.dtype, dim, query);
      if (a.centre.keys) Dot<S, float>::template run<1>(a.centre.keys, query, dim, centred + r);
      turn<S>(a.rotation, dim, query, turned + Rows * dim);
    }
    with_codes(a.codec, [&]<class C>() {
      score_rows<S, C, Rows>(a, coded, turned, centred, scores, stride);
    });
  }
  score_rows<S, T, Rows>(a, plain, rows, nullptr, scores, stride);
  for (int r = 0; r < Rows; ++r) {
    const int64_t hidden = a.hidden ? a.hidden[first + r] : 0;
    a.lse[first + r] = soften<S>(a, scores + r * stride, hidden);
  }
  weigh_rows<S, T, Rows>(a, plain, scores, stride, a.out + first);
  if (a.num_coded) {
    with_codes(a.codec,
               [&]<class C>() { add_coded<S, C, Rows>(a, coded, scores, stride, turned, first); });
  }
}

template <class S, class T>
void attend_dtype(const AttendHead& a) {
  float* rows = a.scratch + a.num_rows * padded_tokens(a.num_tokens);
  int64_t first = 0;
  if constexpr (S::kRows >= 4) {
    for (; first + 4 <= a.num_rows; first += 4) attend_rows<S, T, 4>(a, first, rows);
  }
  for (; first + 2 <= a.num_rows; first += 2) attend_rows<S, T, 2>(a, first, rows);
  for (; first < a.num_rows; ++first) attend_rows<S, T, 1>(a, first, rows);
}

template <class S>
void attend_head(const AttendHead& a) {
  switch (a.dtype) {
    case Dtype::f32: return attend_dtype<S, float>(a);
    case Dtype::bf16: return attend_dtype<S, Bf16>(a);
    case Dtype::f16: return attend_dtype<S, F16>(a);
  }
}

// -- small loops --------------------------------------------------------------------------

template <class S>
void project(const float* x, int64_t count, const Bf16* basis, int64_t rank, float* out) {
  constexpr int kRegs = 8;
  int64_t first = 0;
  const auto block = [&]<int Regs>() {
    typename S::Reg sums[Regs];
    for (int v = 0; v < Regs; ++v) sums[v] = S::load(out + first + v * S::kLanes);
    for (int64_t i = 0; i < count; ++i) {
      const auto each = S::set1(x[i]);
      const Bf16* row = basis + i * rank + first;
      for (int v = 0; v < Regs; ++v) sums[v] = S::fma(each, S::load(row + v * S::kLanes), sums[v]);
    }
    for (int v = 0; v < Regs; ++v) S::store(out + first + v * S::kLanes, sums[v]);
    first += Regs * S::kLanes;
  };
  while (first + kRegs * S::kLanes <= rank) block.template operator()<kRegs>();
  while (first + S::kLanes <= rank) block.template operator()<1>();
  for (; first < rank; ++first) {
    for (int64_t i = 0; i < count; ++i) {
      out[first] += x[i] * portable::Simd::load(basis + i * rank + first);
    }
  }
}

}  // namespace
}  // namespace kvswap
