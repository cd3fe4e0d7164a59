// Turning a row by the matrix of coded tokens, and back.
//
// Included by the isa_*.cc files alone, each with its own `Simd`.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/api.h"

namespace kvswap {
namespace {

// Multiplies by Hadamard's matrix of ones, in place; the dimension is a power of two.
template <class S>
void spread(int64_t head_dim, float* x) {
  for (int64_t half = 1; half < head_dim; half *= 2) {
    for (int64_t begin = 0; begin < head_dim; begin += 2 * half) {
      float *a = x + begin, *b = a + half;
      int64_t i = 0;
      for (; i + S::kLanes <= half; i += S::kLanes) {
        const auto first = S::load(a + i), second = S::load(b + i);
        S::store(a + i, S::add(first, second));
        S::store(b + i, S::sub(first, second));
      }
      for (; i < half; ++i) {
        const float first = a[i], second = b[i];
        a[i] = first + second;
        b[i] = first - second;
      }
    }
  }
}

// The same with a matrix of its own; `spare` is another row.
template <class S>
void spread(const float* matrix, int64_t head_dim, float* x, float* spare) {
  std::fill(spare, spare + head_dim, 0.0f);
  for (int64_t row = 0; row < head_dim; ++row, matrix += head_dim) {
    const auto each = S::set1(x[row]);
    int64_t i = 0;
    for (; i + S::kLanes <= head_dim; i += S::kLanes) {
      S::store(spare + i, S::fma(each, S::load(matrix + i), S::load(spare + i)));
    }
    for (; i < head_dim; ++i) spare[i] += x[row] * matrix[i];
  }
  std::copy(spare, spare + head_dim, x);
}

template <class S>
void spread(const Rotation& rotation, int64_t head_dim, float* x, float* spare) {
  if (rotation.matrix) {
    spread<S>(rotation.matrix, head_dim, x, spare);
  } else {
    spread<S>(head_dim, x);
  }
}

template <class S>
void turn(const Rotation& rotation, int64_t head_dim, float* x, float* spare) {
  for (int64_t i = 0; i < head_dim; ++i) x[i] *= rotation.factors[i];
  spread<S>(rotation, head_dim, x, spare);
}

template <class S>
void turn_back(const Rotation& rotation, int64_t head_dim, float* x, float* spare) {
  spread<S>(rotation, head_dim, x, spare);
  for (int64_t i = 0; i < head_dim; ++i) x[i] *= rotation.factors[i];
}

}  // namespace
}  // namespace kvswap
