// Decode attention over slots, rolling buffer and new tokens: against the formula.
#include <thread>

#include "check.h"
#include "kernels/attend.h"
#include "openmp.h"
#include "random.h"

using namespace kvswap;
using namespace kvswap::test;

namespace {

struct Tokens {
  Numbers keys, values;
  int64_t count, head_stride, token_stride;

  TokensView view() const {
    return {keys.bytes.data(), values.bytes.data(), count,       head_stride,
            token_stride,      head_stride,         token_stride};
  }
};

struct Input {
  int64_t kv_heads, shared, head_dim, group_size, q_len, record_items, token_stride;
  Dtype dtype;
  float softcap;
  Numbers pool, query;
  std::vector<int64_t> rows;
  Tokens rolling, newest;

  Input(Random& random, int64_t num_rows, int64_t num_rolling, bool has_newest)
      : kv_heads(random.between(1, 3)),
        shared(random.one_of<int64_t>({1, 2, 4, 7})),
        head_dim(random.one_of<int64_t>({8, 24, 40, 64})),
        group_size(random.one_of<int64_t>({1, 2, 4, 16})),
        q_len(random.one_of<int64_t>({1, 1, 2, 5})),
        dtype(random.one_of({Dtype::f32, Dtype::bf16, Dtype::f16})),
        softcap(random.below(3) ? 0.0f : 8.0f) {
    const auto draw = [&] { return random.normal(); };
    record_items = 2 * kv_heads * group_size * head_dim + 6;
    pool = numbers(dtype, 5 * record_items, draw);
    for (int64_t i = 0; i < num_rows; ++i) rows.push_back(random.below(5));
    token_stride = num_heads() * head_dim;  // as a projection leaves it
    query = numbers(dtype, q_len * token_stride, draw);
    rolling = tokens(random, num_rolling);
    newest = tokens(random, has_newest ? q_len : 0);
  }

  int64_t num_heads() const { return kv_heads * shared; }

  Tokens tokens(Random& random, int64_t count) const {
    const auto draw = [&] { return random.normal(); };
    const int64_t size = kv_heads * count * head_dim;
    const bool is_interleaved = random.below(2);
    return {numbers(dtype, size, draw), numbers(dtype, size, draw), count,
            is_interleaved ? head_dim : count * head_dim,
            is_interleaved ? kv_heads * head_dim : head_dim};
  }

  struct Result {
    std::vector<float> out, lse;
    bool operator==(const Result&) const = default;
  };

  Result run() const {
    Result made;
    made.out.resize(static_cast<size_t>(num_heads() * q_len * head_dim));
    made.lse.resize(static_cast<size_t>(num_heads() * q_len));
    const Slots slots{reinterpret_cast<const char*>(pool.bytes.data()),
                      record_items * static_cast<int64_t>(item_bytes(dtype)),
                      group_size,
                      kv_heads,
                      head_dim,
                      dtype};
    const Attend a{{query.bytes.data(), dtype, num_heads(), q_len, head_dim, token_stride},
                   rows.data(),
                   static_cast<int64_t>(rows.size()),
                   rolling.view(),
                   newest.view(),
                   nullptr,
                   scaling(),
                   softcap,
                   made.out.data(),
                   made.lse.data()};
    attend(slots, a);
    return made;
  }

  float scaling() const { return 1 / std::sqrt(static_cast<float>(head_dim)); }

  // Keys and values that one query sees, and attention to them.
  void by_formula(int64_t head, int64_t token, std::vector<double>& out, double& lse) const {
    const int64_t kv_head = head / shared, half = kv_heads * group_size * head_dim;
    std::vector<const float*> keys, values;
    for (const int64_t row : rows) {
      for (int64_t t = 0; t < group_size; ++t) {
        const float* key =
            pool.plain.data() + row * record_items + (kv_head * group_size + t) * head_dim;
        keys.push_back(key);
        values.push_back(key + half);
      }
    }
    const auto add = [&](const Tokens& some, int64_t seen) {
      for (int64_t t = 0; t < seen; ++t) {
        const int64_t place = kv_head * some.head_stride + t * some.token_stride;
        keys.push_back(some.keys.plain.data() + place);
        values.push_back(some.values.plain.data() + place);
      }
    };
    add(rolling, rolling.count);
    add(newest, newest.count ? token + 1 : 0);
    std::vector<double> scores;
    double top = -INFINITY, sum = 0;
    for (const float* key : keys) {
      double score = 0;
      for (int64_t i = 0; i < head_dim; ++i) {
        const auto place = static_cast<size_t>(head * head_dim + token * token_stride + i);
        score += static_cast<double>(query.plain[place]) * key[i];
      }
      score *= scaling();
      if (softcap > 0) score = softcap * std::tanh(score / softcap);
      scores.push_back(score);
      top = std::max(top, score);
    }
    out.assign(static_cast<size_t>(head_dim), 0);
    for (size_t k = 0; k < keys.size(); ++k) {
      const double weight = std::exp(scores[k] - top);
      sum += weight;
      for (size_t i = 0; i < out.size(); ++i) out[i] += weight * values[k][i];
    }
    for (double& x : out) x /= sum;
    lse = top + std::log(sum);
  }
};

void expect_formula(const Input& input) {
  const Input::Result found = input.run();
  for (int64_t head = 0; head < input.num_heads(); ++head) {
    for (int64_t token = 0; token < input.q_len; ++token) {
      std::vector<double> expected;
      double lse;
      input.by_formula(head, token, expected, lse);
      const auto place = static_cast<size_t>(head * input.q_len + token);
      CHECK_NEAR(found.lse[place], lse, 1e-4);
      for (size_t i = 0; i < expected.size(); ++i) {
        CHECK_NEAR(found.out[place * expected.size() + i], expected[i], 1e-4);
      }
    }
  }
}

}  // namespace

TEST(attention_over_all_parts_is_that_of_the_formula) {
  each_name([](const char* name) {
    const Using named(name);
    Random random(40);
    for (int round = 0; round < 60; ++round) {
      const At at{{"round", round}};
      const int64_t slots = random.one_of<int64_t>({0, 1, 3, 7}),
                    rolling = random.one_of<int64_t>({0, 1, 5});
      expect_formula(Input(random, slots, rolling, slots + rolling == 0 || random.below(2)));
    }
  });
}

TEST(attention_does_not_depend_on_the_threads) {
  each_name([](const char* name) {
    const Using named(name);
    Random random(41);
    for (int round = 0; round < 8; ++round) {
      const Input input(random, 4, 3, true);
      const Input::Result expected = input.run();
      for (const int threads : {2, 3}) {
        const At at{{"round", round}, {"threads", threads}};
        omp_set_num_threads(threads);
        const Input::Result found = input.run();
        omp_set_num_threads(1);
        CHECK(found == expected);
      }
    }
  });
}

TEST(attention_to_nothing_is_zero_with_no_weight) {
  each_name([](const char* name) {
    const Using named(name);
    Random random(42);
    const Input input(random, 0, 0, false);
    const Input::Result found = input.run();
    for (const float x : found.lse) CHECK(x == -kInfinity);
  });
}

TEST(several_threads_may_attend_at_once) {
  Random random(43);
  std::vector<Input> inputs;
  std::vector<Input::Result> expected, found(4);
  for (int i = 0; i < 4; ++i) {
    inputs.emplace_back(random, 5, 4, true);
    expected.push_back(inputs.back().run());
  }
  std::vector<std::thread> threads;
  for (size_t i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      for (int round = 0; round < 10; ++round) found[i] = inputs[i].run();
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(found == expected);
}
