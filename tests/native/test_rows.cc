// The small loops: every instruction set against the portable kernels, tails included.
#include "check.h"
#include "random.h"

using namespace kvswap;
using namespace kvswap::test;

namespace {

constexpr int64_t kLengths[] = {1,  2,  3,  4,  7,  8,  9,   15,  16,  17,
                                31, 32, 33, 63, 64, 65, 127, 128, 129, 200};

std::vector<float> normals(Random& random, int64_t count) {
  std::vector<float> made(static_cast<size_t>(count));
  for (float& x : made) x = random.normal();
  return made;
}

std::vector<float> positives(Random& random, int64_t count) {
  std::vector<float> made = normals(random, count);
  for (float& x : made) x = 0.1f + std::fabs(x);
  return made;
}

// Some scores that nobody asked for, now and then a whole column of them.
std::vector<float> scores(Random& random, int64_t rows, int64_t length) {
  std::vector<float> made = normals(random, rows * length);
  for (int64_t i = 0; i < length; ++i) {
    const bool is_empty = random.below(5) == 0;
    for (int64_t r = 0; r < rows; ++r) {
      float& x = made[static_cast<size_t>(r * length + i)];
      x = is_empty || random.below(6) == 0 ? -kInfinity : 20 * x;
    }
  }
  return made;
}

}  // namespace

TEST(projections_agree) {
  each_other([](const Kernels& other) {
    const Using named(other.name);
    Random random(6);
    for (const int64_t rank : kLengths) {
      for (const int64_t count : {1, 2, 5, 64}) {
        const At at{{"rank", rank}, {"count", count}};
        const std::vector<float> x = normals(random, count), start = normals(random, rank);
        const auto basis = basis_of(count * rank, [&] { return random.normal(); });
        std::vector<float> expected = start, found = start;
        kPortable.project(x.data(), count, basis.data(), rank, expected.data());
        other.project(x.data(), count, basis.data(), rank, found.data());
        for (size_t i = 0; i < found.size(); ++i) CHECK_NEAR(found[i], expected[i], 1e-4);
      }
    }
  });
}

TEST(column_sums_agree_and_columns_of_nothing_count_for_nothing) {
  each_other([](const Kernels& other) {
    const Using named(other.name);
    Random random(7);
    for (const int64_t length : kLengths) {
      for (const int64_t rows : {1, 2, 3, 30}) {
        const At at{{"length", length}, {"rows", rows}};
        const std::vector<float> x = scores(random, rows, length),
                                 scale = positives(random, length);
        const ScoreRows a{x.data(), rows, length, scale.data()};
        const auto size = static_cast<size_t>(length);
        std::vector<float> top(size, kNan), sum(size, kNan), product(size, kNan),
            found_top(size, kNan), found_sum(size, kNan), found_product(size, kNan);
        kPortable.column_sums(a, top.data(), sum.data(), product.data());
        other.column_sums(a, found_top.data(), found_sum.data(), found_product.data());
        for (size_t i = 0; i < size; ++i) {
          CHECK(found_top[i] == top[i]);
          CHECK_NEAR(found_sum[i], sum[i], 1e-5 * (1 + sum[i]));
          CHECK_NEAR(found_product[i], product[i], 1e-5 * (1 - product[i]));
          if (top[i] == -kInfinity) CHECK(found_sum[i] == 0 && found_product[i] == 0);
        }
      }
    }
  });
}

TEST(the_best_of_a_row_agrees) {
  each_other([](const Kernels& other) {
    const Using named(other.name);
    Random random(8);
    for (const int64_t best_length : {4, 8, 16, 32, 64}) {
      for (const int64_t quads : {1, 2, 3, 4}) {
        for (const int64_t rows : {1, 2, 7}) {
          const At at{{"best_length", best_length}, {"quads", quads}, {"rows", rows}};
          const int64_t length = quads * best_length;
          const std::vector<float> x = scores(random, rows, length),
                                   scale = positives(random, length);
          std::vector<float> shift = normals(random, length);
          shift[static_cast<size_t>(random.below(length))] = kInfinity;  // a query that is none
          const ScoreRows a{x.data(), rows, length, scale.data()};
          std::vector<float> expected(static_cast<size_t>(rows * best_length), -kInfinity);
          std::vector<float> found = expected;
          kPortable.best_shifted(a, shift.data(), best_length, expected.data());
          other.best_shifted(a, shift.data(), best_length, found.data());
          for (size_t i = 0; i < found.size(); ++i) {
            CHECK_NEAR(found[i], expected[i], 1e-5 * (1 + std::fabs(expected[i])));
          }
        }
      }
    }
  });
}

TEST(counting_takes_what_equals_the_bound_and_nothing_that_is_no_number) {
  each_name([](const char* name) {
    const Using named(name);
    Random random(11);
    for (const int64_t length : kLengths) {
      std::vector<float> x(static_cast<size_t>(length));
      for (float& each : x) {
        each = random.one_of({-kInfinity, -1.0f, -0.0f, 0.0f, 0.5f, kInfinity, kNan});
      }
      for (const float least : {-kInfinity, -1.0f, 0.0f, -0.0f, 0.25f, kInfinity}) {
        const At at{{"length", length}};
        int64_t expected = 0;
        for (const float each : x) expected += each >= least;
        CHECK(kernels().count_from(x.data(), length, least) == expected);
      }
    }
  });
}

TEST(widening_is_exact_for_every_sixteen_bits) {
  std::vector<uint16_t> all(0x10000);
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
  each_other([&](const Kernels& other) {
    const Using named(other.name);
    for (const Dtype dtype : {Dtype::bf16, Dtype::f16}) {
      std::vector<float> expected(all.size()), found(all.size());
      kPortable.widen(all.data(), dtype, 0x10000, expected.data());
      other.widen(all.data(), dtype, 0x10000, found.data());
      for (size_t i = 0; i < all.size(); ++i) {
        const At at{{"dtype", static_cast<int>(dtype)}, {"bits", static_cast<int64_t>(i)}};
        CHECK_NEAR(found[i], expected[i], 0);
        CHECK(std::signbit(found[i]) == std::signbit(expected[i]));
      }
    }
  });
}

TEST(widening_keeps_to_its_length) {
  each_name([](const char* name) {
    const Using named(name);
    Random random(9);
    for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
      for (const int64_t length : kLengths) {
        const At at{{"dtype", static_cast<int>(dtype)}, {"length", length}};
        const Numbers x = numbers(dtype, length, [&] { return random.normal(); });
        std::vector<float> found(x.plain.size());
        kernels().widen(x.bytes.data(), dtype, length, found.data());
        CHECK(found == x.plain);
      }
    }
  });
}
