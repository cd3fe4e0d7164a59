// The positions of the largest scores, against a plain sort.
#include <algorithm>
#include <numeric>
#include <set>

#include "check.h"
#include "kernels/top.h"
#include "random.h"

using namespace kvswap;
using namespace kvswap::test;

namespace {

std::vector<int64_t> top(const std::vector<float>& scores, int64_t count,
                         const std::vector<int64_t>& pinned) {
  std::vector<int64_t> out(static_cast<size_t>(count), -1);
  top_positions(scores.data(), static_cast<int64_t>(scores.size()), count, pinned.data(),
                static_cast<int64_t>(pinned.size()), out.data());
  return out;
}

std::vector<int64_t> by_sort(const std::vector<float>& scores, int64_t count,
                             const std::vector<int64_t>& pinned) {
  std::vector<int64_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  const std::set<int64_t> first(pinned.begin(), pinned.end());
  const auto rank = [&](int64_t i) {
    const float x = scores[static_cast<size_t>(i)];
    return std::pair(!first.count(i), std::isnan(x) ? kInfinity : -x);
  };
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return rank(a) < rank(b); });
  order.resize(static_cast<size_t>(count));
  std::sort(order.begin(), order.end());
  return order;
}

void expect_sorted(Random& random, std::vector<float> scores) {
  const auto size = static_cast<int64_t>(scores.size());
  std::set<int64_t> some;
  for (int64_t i = random.below(std::min<int64_t>(size, 6)); i > 0; --i)
    some.insert(random.below(size));
  const std::vector<int64_t> pinned(some.begin(), some.end());
  const auto least = static_cast<int64_t>(pinned.size());
  for (const int64_t count : {least, random.between(least, size), size}) {
    const At at{{"size", size}, {"count", count}, {"pinned", least}};
    CHECK(top(scores, count, pinned) == by_sort(scores, count, pinned));
  }
}

}  // namespace

TEST(the_largest_are_found_and_of_equal_ones_the_first) {
  each_name([](const char* name) {
    const Using named(name);
    Random random(50);
    for (int round = 0; round < 300; ++round) {
      std::vector<float> scores(static_cast<size_t>(random.between(1, 130)));
      const int kind = static_cast<int>(random.below(4));
      for (float& x : scores) {
        if (kind == 0) x = random.normal();
        if (kind == 1) x = random.one_of({-3.0f, 0.0f, -0.0f, 0.5f});
        if (kind == 2) x = random.one_of({-kInfinity, -2.0f, 1e-42f, -1e-42f, 7.0f, kInfinity});
        if (kind == 3) x = random.below(5) ? random.normal() : kNan;
      }
      expect_sorted(random, scores);
    }
  });
}

TEST(what_is_no_number_comes_last_of_either_sign) {
  CHECK((top({kNan, 1, -kNan, -3, 2}, 3, {}) == std::vector<int64_t>{1, 3, 4}));
  CHECK((top({kNan, 1, -kNan, -3, 2}, 2, {2}) == std::vector<int64_t>{2, 4}));
  CHECK((top({kNan, kNan, kNan}, 2, {}) == std::vector<int64_t>{0, 1}));
}

TEST(pinned_ones_come_before_infinite_scores) {
  CHECK((top({kInfinity, -kInfinity, kInfinity, -3}, 2, {1, 3}) == std::vector<int64_t>{1, 3}));
  CHECK((top({kInfinity, -kInfinity, kInfinity, -3}, 2, {1}) == std::vector<int64_t>{0, 1}));
}

TEST(no_count_writes_nothing) { CHECK(top({1, 2, 3}, 0, {}).empty()); }
