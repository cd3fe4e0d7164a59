// Scores of groups, end to end: against the formula, on every instruction set, any threads.
#include <numeric>
#include <thread>

#include "check.h"
#include "coded.h"
#include "kernels/queries.h"
#include "openmp.h"

using namespace kvswap;
using namespace kvswap::test;

namespace {

constexpr int64_t kAll = 1000000;  // more groups than there are

struct Ask {
  Numbers query;
  int64_t num_heads, q_len, token_stride;
  std::vector<int64_t> ids;

  int64_t head_stride() const { return q_len * token_stride; }
};

// All groups, some of them scattered, or a few runs.
std::vector<int64_t> some_ids(Random& random, int64_t num_groups) {
  std::vector<int64_t> ids;
  const int64_t most = random.one_of<int64_t>({1, 2, num_groups});
  for (int64_t id = random.below(num_groups); id < num_groups; ++id) {
    ids.push_back(id);
    if (static_cast<int64_t>(ids.size()) % most == 0) id += random.below(4);
  }
  if (random.below(4) == 0) std::reverse(ids.begin(), ids.end());
  return ids;
}

Ask some_ask(Random& random, const Shape& shape, int64_t num_heads, int64_t q_len) {
  const int64_t stride = shape.head_dim + random.one_of({0, 0, 5});
  Ask ask{{}, num_heads, q_len, stride, some_ids(random, shape.num_groups)};
  const int64_t size = (num_heads * q_len - 1) * stride + shape.head_dim;
  ask.query = numbers(random.one_of({Dtype::f32, Dtype::bf16, Dtype::f16}), size,
                      [&] { return random.dyadic(); });
  return ask;
}

std::vector<float> scan(const Index& index, const Ask& ask, float scaling, int64_t wanted = kAll) {
  std::vector<float> out(ask.ids.size(), kNan);
  const QueryView view{ask.query.bytes.data(), ask.query.dtype, ask.num_heads, ask.q_len,
                       ask.head_stride(),      ask.token_stride};
  scan_groups(index.keys(), view, scaling, ask.ids.data(), static_cast<int64_t>(ask.ids.size()),
              wanted, out.data());
  return out;
}

// One query's score of each group, its own log-sum-exp taken off, and what it has less to say.
std::vector<double> by_formula(Index& index, const std::vector<double>& x,
                               const std::vector<int64_t>& ids, int64_t wanted) {
  const Shape& shape = index.shape;
  std::vector<double> scores;
  for (const int64_t id : ids) {
    double best = -INFINITY;
    for (int64_t t = id * shape.group_size; t < (id + 1) * shape.group_size; ++t) {
      const std::vector<double> key = index.decoded(t);
      best = std::max(best, std::inner_product(key.begin(), key.end(), x.begin(), 0.0));
    }
    scores.push_back(best);
  }
  const double top = *std::max_element(scores.begin(), scores.end());
  double sum = 0;
  for (const double score : scores) sum += std::exp(score - top);
  double entropy = 0;
  for (double& score : scores) {
    score -= top + std::log(sum);
    entropy -= std::exp(score) * score;
  }
  const double over = std::max(0.0, entropy - std::log(static_cast<double>(wanted)));
  for (double& score : scores) score -= kOutvoted * over;
  return scores;
}

// The query, carried through the projection and rounded as its code wants it.
std::vector<double> projected(const Index& index, const Ask& ask, int64_t head, int64_t token,
                              float scaling) {
  const Shape& shape = index.shape;
  const int64_t kv_head = head / (ask.num_heads / shape.kv_heads);
  std::vector<double> x(static_cast<size_t>(shape.rank));
  float top = 0;
  for (size_t j = 0; j < x.size(); ++j) {
    for (int64_t i = 0; i < shape.head_dim; ++i) {
      const auto place =
          static_cast<size_t>(head * ask.head_stride() + token * ask.token_stride + i);
      const auto row = static_cast<size_t>(kv_head * shape.head_dim + i);
      x[j] += static_cast<double>(ask.query.plain[place]) *
              plain(index.query_basis[row * x.size() + j]);
    }
    x[j] *= scaling;
    top = std::max(top, std::fabs(static_cast<float>(x[j])));
  }
  const float scale = top > 0 ? top / 127 : 1;
  for (double& each : x) {
    const auto exact = static_cast<float>(each);
    each = shape.code == Code::bf16 ? static_cast<double>(rounded(exact, Dtype::bf16))
                                    : std::nearbyint(exact / scale) * static_cast<double>(scale);
  }
  return x;
}

std::vector<double> by_formula(Index& index, const Ask& ask, float scaling, int64_t wanted) {
  std::vector<double> best(ask.ids.size(), -INFINITY);
  for (int64_t head = 0; head < ask.num_heads; ++head) {
    for (int64_t token = 0; token < ask.q_len; ++token) {
      const auto x = projected(index, ask, head, token, scaling);
      const auto scores = by_formula(index, x, ask.ids, wanted);
      for (size_t i = 0; i < best.size(); ++i) best[i] = std::max(best[i], scores[i]);
    }
  }
  return best;
}

Index some_index(Random& random, Code code, int64_t group_size) {
  Shape shape;
  shape.code = code;
  shape.group_size = group_size;
  shape.rank = code == Code::rot4 ? 2 * random.between(1, 10) : random.between(1, 20);
  shape.num_groups = random.between(1, group_size > 8 ? 12 : 70);
  shape.kv_heads = random.between(1, 3);
  shape.head_dim = random.one_of<int64_t>({4, 8, 13});
  Index index(random, shape);
  std::vector<int64_t> ids(static_cast<size_t>(shape.num_groups));
  std::iota(ids.begin(), ids.end(), 0);
  index.encode(numbers(Dtype::f32, shape.num_groups * group_size * shape.dim(),
                       [&] { return random.dyadic(); }),
               ids);
  return index;
}

}  // namespace

TEST(scores_are_those_of_the_formula) {
  for (const Code code : kAllCodes) {
    Random random(30);
    for (const int64_t group_size : {1, 2, 4, 8, 16, 32, 64}) {
      for (const int64_t shared : {1, 3, 7}) {
        Index index = some_index(random, code, group_size);
        const Ask ask = some_ask(random, index.shape, index.shape.kv_heads * shared,
                                 random.one_of<int64_t>({1, 1, 3}));
        const int64_t wanted = random.one_of<int64_t>({kAll, 1, 5});
        const std::vector<double> expected = by_formula(index, ask, 0.25f, wanted);
        each_name([&](const char* name) {
          const Using named(name);
          const At at{{"code", static_cast<int>(code)},
                      {"group_size", group_size},
                      {"heads", ask.num_heads},
                      {"q_len", ask.q_len},
                      {"wanted", wanted},
                      {"ids", static_cast<int64_t>(ask.ids.size())}};
          const std::vector<float> found = scan(index, ask, 0.25f, wanted);
          // The offset of a grid, or of all bands, is made whole: half a unit of query and key.
          const int bits = code == Code::band ? 1 : grid_bits(code);
          const double tolerance = (bits ? 8e-2 / bits : 1e-4) * (wanted < kAll ? kOutvoted : 1);
          for (size_t i = 0; i < found.size(); ++i) CHECK_NEAR(found[i], expected[i], tolerance);
        });
      }
    }
  }
}

TEST(scores_do_not_depend_on_the_threads) {
  Random random(31);
  Shape shape;
  shape.group_size = 16;
  shape.num_groups = 700;
  for (const Code code : kAllCodes) {
    shape.code = code;
    Index index(random, shape);
    for (uint8_t& each : index.codes)
      each = static_cast<uint8_t>(random.below(code == Code::bf16 ? 64 : 256));
    for (uint16_t& each : index.scales) each = to_f16(std::fabs(random.normal()));
    const Ask ask = some_ask(random, shape, 6, 2);
    each_name([&](const char* name) {
      const Using named(name);
      const std::vector<float> expected = scan(index, ask, 0.5f);
      for (const int threads : {2, 3, 5}) {
        const At at{{"code", static_cast<int>(code)}, {"threads", threads}};
        omp_set_num_threads(threads);
        const std::vector<float> found = scan(index, ask, 0.5f);
        omp_set_num_threads(1);
        CHECK(found == expected);
      }
    });
  }
}

TEST(groups_count_as_often_as_they_are_asked_for_and_in_any_order) {
  Random random(32);
  Index index = some_index(random, Code::int8, 4);
  Ask ask = some_ask(random, index.shape, index.shape.kv_heads, 1);
  ask.ids = {0, 0, index.shape.num_groups - 1, 0};
  const std::vector<double> expected = by_formula(index, ask, 1.0f, kAll);
  const std::vector<float> found = scan(index, ask, 1.0f);
  for (size_t i = 0; i < found.size(); ++i) CHECK_NEAR(found[i], expected[i], 1e-4);
}

TEST(nothing_asked_for_is_nothing_written) {
  Random random(33);
  Index index = some_index(random, Code::rot4, 4);
  Ask ask = some_ask(random, index.shape, index.shape.kv_heads, 1);
  ask.ids.clear();
  CHECK(scan(index, ask, 1.0f).empty());
}

TEST(queries_of_zeros_find_all_groups_alike) {
  for (const Code code : kAllCodes) {
    Random random(34);
    Index index = some_index(random, code, 2);
    Ask ask = some_ask(random, index.shape, index.shape.kv_heads * 5, 1);
    ask.query =
        numbers(Dtype::f32, static_cast<int64_t>(ask.query.plain.size()), [] { return 0.0f; });
    each_name([&](const char* name) {
      const Using named(name);
      for (const float x : scan(index, ask, 1.0f)) {
        CHECK_NEAR(x, -std::log(static_cast<double>(ask.ids.size())), 1e-5);
      }
    });
  }
}

TEST(several_threads_may_scan_at_once) {
  Random random(35);
  const Index index = some_index(random, Code::rot4, 4);
  std::vector<Ask> asks;
  std::vector<std::vector<float>> expected, found(4);
  for (int i = 0; i < 4; ++i) {
    asks.push_back(some_ask(random, index.shape, index.shape.kv_heads * 2, 1));
    expected.push_back(scan(index, asks.back(), 0.5f));
  }
  std::vector<std::thread> threads;
  for (size_t i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      for (int round = 0; round < 10; ++round) found[i] = scan(index, asks[i], 0.5f);
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(found == expected);
}
