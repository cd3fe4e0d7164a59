// Keys into codes: near what they stand for, the same everywhere, and nothing beside them.
#include <numeric>

#include "check.h"
#include "coded.h"
#include "openmp.h"

using namespace kvswap;
using namespace kvswap::test;

namespace {

Shape some_shape(Random& random, Code code) {
  Shape shape;
  shape.code = code;
  shape.rank = code == Code::rot4 ? 2 * random.between(1, 20) : random.between(1, 40);
  shape.group_size = random.one_of<int64_t>({1, 2, 4, 8, 16, 32, 64});
  shape.num_groups = random.between(2, 9);
  shape.kv_heads = random.between(1, 3);
  shape.head_dim = random.one_of<int64_t>({4, 8, 13, 24});
  return shape;
}

// A few groups, in no order.
std::vector<int64_t> some_ids(Random& random, int64_t num_groups) {
  std::vector<int64_t> ids(static_cast<size_t>(num_groups));
  std::iota(ids.begin(), ids.end(), 0);
  for (size_t i = ids.size(); i > 1; --i) {
    std::swap(ids[i - 1], ids[static_cast<size_t>(random.below(static_cast<int64_t>(i)))]);
  }
  ids.resize(static_cast<size_t>(random.between(1, num_groups)));
  return ids;
}

Numbers some_keys(Random& random, const Shape& shape, const std::vector<int64_t>& ids) {
  const int64_t tokens = static_cast<int64_t>(ids.size()) * shape.group_size;
  return numbers(random.one_of({Dtype::f32, Dtype::bf16, Dtype::f16}), tokens * shape.dim(),
                 [&] { return random.dyadic(); });
}

std::vector<double> projected(const Index& index, const Numbers& keys, int64_t token) {
  std::vector<double> made(static_cast<size_t>(index.shape.rank));
  for (int64_t i = 0; i < index.shape.dim(); ++i) {
    for (size_t j = 0; j < made.size(); ++j) {
      made[j] +=
          static_cast<double>(keys.plain[static_cast<size_t>(token * index.shape.dim() + i)]) *
          plain(index.basis[static_cast<size_t>(i) * made.size() + j]);
    }
  }
  for (size_t j = 0; j < index.offsets.size(); ++j)
    made[j] -= static_cast<double>(index.offsets[j]);
  return made;
}

// How far a code may be from its coefficient.
double slack(const Shape& shape, const std::vector<double>& x, size_t j) {
  const Code code = shape.code;
  const double one = x[j];
  double top = 0, squares = 0;
  for (const double each : x) {
    top = std::max(top, std::fabs(each));
    squares += each * each;
  }
  if (code == Code::bf16) return std::fabs(one) / 256 + 1e-9;
  if (code == Code::int8) return top / 127 * 0.51 + 127 * top / 127 / 1024 + 1e-6;
  const double wide = code == Code::rot4 ? 0.3352 : code == Code::rot2 ? 0.9957 : 1.596;
  const double step = std::sqrt(squares / static_cast<double>(x.size())) * wide;
  const double outermost = (grid_top(code) - 1) / 2 * step;
  return std::max(step, std::fabs(one) - outermost) + step + 1e-6;  // the scale is a fit
}

// The banded code's levels and scale of a token whose projected key is `x`, by their formula.
void check_bands(Index& index, const std::vector<double>& x, int64_t token) {
  std::vector<double> grids, ends;
  for (const Band& band : index.shape.bands()) {
    const double grid = band.bits == 8 ? 0.0308 : band.bits == 4 ? 0.3352 : 0.9957;
    grids.insert(grids.end(), static_cast<size_t>(band.count), grid);
    ends.insert(ends.end(), static_cast<size_t>(band.count), band.top() / 2.0);
  }
  double squares = 0, products = 0, norms = 0;
  const auto in_steps = [&](size_t j) { return x[j] / static_cast<double>(index.steps[j]); };
  for (size_t j = 0; j < x.size(); ++j) squares += std::pow(in_steps(j) * grids[j], 2);
  const double own = std::sqrt(squares / static_cast<double>(x.size()));
  const double scale = from_f16(index.scales[static_cast<size_t>(token)]);
  const auto found = index.decoded(token);
  for (size_t j = 0; j < x.size() && own > 0; ++j) {
    const double step = static_cast<double>(index.steps[j]), level = found[j] / (scale * step);
    const double apart = std::fabs(in_steps(j) / own - level);
    CHECK(apart < 0.5001 || std::fabs(std::fabs(level) - ends[j]) < 1e-3);
    products += step * grids[j] * in_steps(j) * level;
    norms += step * grids[j] * level * level;
  }
  if (own > 0) CHECK_NEAR(scale, products / norms, 1e-3 * products / norms);
}

}  // namespace

TEST(codes_stand_for_the_projected_keys) {
  each_name([](const char* name) {
    const Using named(name);
    for (const Code code : kAllCodes) {
      Random random(20);
      for (int round = 0; round < 20; ++round) {
        const At at{{"code", static_cast<int>(code)}, {"round", round}};
        Index index(random, some_shape(random, code));
        const std::vector<int64_t> ids = some_ids(random, index.shape.num_groups);
        const Numbers keys = some_keys(random, index.shape, ids);
        index.encode(keys, ids);
        for (size_t g = 0; g < ids.size(); ++g) {
          for (int64_t t = 0; t < index.shape.group_size; ++t) {
            const auto expected =
                projected(index, keys, static_cast<int64_t>(g) * index.shape.group_size + t);
            const int64_t token = ids[g] * index.shape.group_size + t;
            if (code == Code::band) {
              check_bands(index, expected, token);
              continue;
            }
            const auto found = index.decoded(token);
            for (size_t j = 0; j < found.size(); ++j) {
              CHECK_NEAR(found[j], expected[j], slack(index.shape, expected, j));
            }
          }
        }
      }
    }
  });
}

TEST(codes_are_the_same_on_every_instruction_set_and_with_any_threads) {
  for (const Code code : kAllCodes) {
    for (int round = 0; round < 12; ++round) {
      const At at{{"code", static_cast<int>(code)}, {"round", round}};
      Random random(static_cast<uint64_t>(round));
      const Index empty(random, some_shape(random, code));
      const std::vector<int64_t> ids = some_ids(random, empty.shape.num_groups);
      const Numbers keys = some_keys(random, empty.shape, ids);
      Index expected = empty;
      {
        const Using portable("portable");
        expected.encode(keys, ids);
      }
      each_name([&](const char* name) {
        const Using named(name);
        for (const int threads : {1, 2, 3}) {
          omp_set_num_threads(threads);
          Index found = empty;
          found.encode(keys, ids);
          omp_set_num_threads(1);
          CHECK(found.codes == expected.codes);
          CHECK(found.scales == expected.scales);
        }
      });
    }
  }
}

TEST(tokens_beside_those_encoded_stay_as_they_were) {
  each_name([](const char* name) {
    const Using named(name);
    for (const Code code : kAllCodes) {
      Random random(21);
      for (int round = 0; round < 12; ++round) {
        const At at{{"code", static_cast<int>(code)}, {"round", round}};
        Index index(random, some_shape(random, code));
        const std::vector<int64_t> ids = some_ids(random, index.shape.num_groups);
        index.encode(some_keys(random, index.shape, ids), ids);
        for (int64_t token = 0; token < index.shape.tiles() * kTileTokens; ++token) {
          const bool was_encoded =
              std::find(ids.begin(), ids.end(), token / index.shape.group_size) != ids.end();
          if (was_encoded) continue;
          for (int64_t i = 0; i < index.shape.width(); ++i) CHECK(index.byte(token, i) == 0xa5);
          if (has_scale(code)) CHECK(index.scales[static_cast<size_t>(token)] == 0x5a5a);
        }
      }
    }
  });
}

TEST(keys_of_zeros_stand_for_zeros) {
  each_name([](const char* name) {
    const Using named(name);
    for (const Code code : kAllCodes) {
      if (code == Code::band) continue;  // its levels are of what an offset was taken from
      Random random(22);
      Index index(random, some_shape(random, code));
      const std::vector<int64_t> ids{1};
      index.encode(
          numbers(Dtype::f32, index.shape.group_size * index.shape.dim(), [] { return 0.0f; }),
          ids);
      for (const double x : index.decoded(index.shape.group_size)) CHECK_NEAR(x, 0, 1e-6);
    }
  });
}
