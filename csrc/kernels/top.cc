#include "kernels/top.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/api.h"

namespace kvswap {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kSpan = 32;  // looked through together
constexpr float kPenalty = 65536.0f;
constexpr float kLargest = std::numeric_limits<float>::max();

// Integers in the order of the floats, infinities included, and back.
uint32_t ordered(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
float unordered(uint32_t key) {
  return std::bit_cast<float>(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Moves the scores that reach `least` together; `out` may be where they are, and has room for all.
void keep_from(const float* scores, int64_t count, float least, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    const float x = scores[i];
    *out = x;
    out += x >= least;
  }
}

}  // namespace

// Halving the range of the integers needs 32 passes at most, and each is a plain count of those
// that reach its lower end.
float nth_largest(const std::vector<float>& scores, int64_t count) {
  thread_local std::vector<float> left;
  const float* from = scores.data();
  auto size = static_cast<int64_t>(scores.size());
  uint32_t low = ordered(-kInfinity), high = ordered(kInfinity);
  while (low < high) {
    const uint32_t middle = low + (high - low + 1) / 2;
    const int64_t found = kernels().count_from(from, size, unordered(middle));
    if (found == count) return unordered(middle);
    if (found > count) {
      low = middle;
      if (2 * found > size) continue;
      if (from != left.data()) left.resize(scores.size());
      keep_from(from, size, unordered(middle), left.data());
      from = left.data();
      size = found;
    } else {
      high = middle - 1;
    }
  }
  return unordered(low);
}

void top_positions(const float* scores, int64_t num_scores, int64_t count, const int64_t* pinned,
                   int64_t num_pinned, int64_t* out) {
  if (count <= 0) return;
  thread_local std::vector<float> held;
  held.resize(static_cast<size_t>(num_scores));
  // Infinity is the pinned ones' alone; what is no number comes last.
  for (int64_t i = 0; i < num_scores; ++i) {
    const float x = scores[i];
    held[static_cast<size_t>(i)] = x == x ? std::min(x, kLargest) : -kInfinity;
  }
  for (int64_t i = 0; i < num_pinned; ++i) held[static_cast<size_t>(pinned[i])] = kInfinity;
  const float least = nth_largest(held, count);
  // Where more reach it than are wanted, the first of those that equal it are taken.
  const int64_t reach = kernels().count_from(held.data(), num_scores, least);
  int64_t equal = count;
  if (reach > count) {
    const float above = std::nextafter(least, kInfinity);
    equal = count - kernels().count_from(held.data(), num_scores, above);
  }
  for (int64_t begin = 0; begin < num_scores; begin += kSpan) {
    const int64_t end = std::min(num_scores, begin + kSpan);
    if (!kernels().count_from(held.data() + begin, end - begin, least)) continue;
    for (int64_t i = begin; i < end; ++i) {
      const float x = held[static_cast<size_t>(i)];
      if (x > least || (x == least && equal-- > 0)) *out++ = i;
    }
  }
}

void discourage(float* scores, int64_t num_scores, const int32_t* kept, int64_t num_kept,
                float least) {
  thread_local std::vector<float> before;
  before.clear();
  const auto is_one = [&](int32_t place) { return place >= 0 && place < num_scores; };
  for (int64_t i = 0; i < num_kept; ++i) before.push_back(is_one(kept[i]) ? scores[kept[i]] : 0);
  for (int64_t i = 0; i < num_scores; ++i) scores[i] -= scores[i] < least ? kPenalty : 0.0f;
  for (int64_t i = 0; i < num_kept; ++i) {
    if (is_one(kept[i])) scores[kept[i]] = before[static_cast<size_t>(i)];
  }
}

}  // namespace kvswap
