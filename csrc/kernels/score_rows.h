// From scores a group and query to one a group: every query less its own shift.
//
// Included by the isa_*.cc files alone, each with its own `Simd`.
#pragma once

#include <limits>

#include "kernels/api.h"
#include "kernels/simd_portable.h"

namespace kvswap {
namespace {

constexpr float kNothing = -104.0f;  // of which the exponential is 0

template <class S>
void column_sum(const ScoreRows& a, int64_t i, float* largest, float* sum, float* product) {
  const auto scale = S::load(a.scale + i);
  auto top = S::set1(-std::numeric_limits<float>::infinity());
  for (int64_t row = 0; row < a.num_rows; ++row) {
    top = S::max(top, S::mul(S::load(a.scores + row * a.length + i), scale));
  }
  // Where nothing was asked for all are minus infinity, and so is what is written.
  const auto finite = S::max(top, S::set1(-std::numeric_limits<float>::max()));
  auto total = S::zero(), products = S::zero();
  for (int64_t row = 0; row < a.num_rows; ++row) {
    const auto scaled = S::mul(S::load(a.scores + row * a.length + i), scale);
    const auto x = S::max(S::set1(kNothing), S::sub(scaled, finite));
    const auto exp = S::exp(x);
    total = S::add(total, exp);
    products = S::fma(exp, x, products);
  }
  S::store(largest + i, top);
  S::store(sum + i, total);
  S::store(product + i, products);
}

template <class S>
void column_sums(const ScoreRows& a, float* largest, float* sum, float* product) {
  int64_t i = 0;
  for (; i + S::kLanes <= a.length; i += S::kLanes) column_sum<S>(a, i, largest, sum, product);
  for (; i < a.length; ++i) column_sum<portable::Simd>(a, i, largest, sum, product);
}

template <class S>
void best_of_row(const ScoreRows& a, const float* row, const float* shift, int64_t best_length,
                 int64_t i, float* best) {
  auto top = S::load(best + i);
  for (int64_t j = i; j < a.length; j += best_length) {
    const auto x = S::mul(S::load(row + j), S::load(a.scale + j));
    top = S::max(top, S::sub(x, S::load(shift + j)));
  }
  S::store(best + i, top);
}

template <class S>
void best_shifted(const ScoreRows& a, const float* shift, int64_t best_length, float* best) {
  for (int64_t r = 0; r < a.num_rows; ++r, best += best_length) {
    const float* row = a.scores + r * a.length;
    int64_t i = 0;
    for (; i + S::kLanes <= best_length; i += S::kLanes) {
      best_of_row<S>(a, row, shift, best_length, i, best);
    }
    for (; i < best_length; ++i) {
      best_of_row<portable::Simd>(a, row, shift, best_length, i, best);
    }
  }
}

template <class S>
int64_t count_from(const float* x, int64_t count, float least) {
  int64_t found = 0, i = 0;
  const auto bound = S::set1(least);
  for (; i + S::kLanes <= count; i += S::kLanes) found += S::num_from(S::load(x + i), bound);
  for (; i < count; ++i) found += x[i] >= least;
  return found;
}

}  // namespace
}  // namespace kvswap
