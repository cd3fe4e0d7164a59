// Spans: no key lies farther from its centre than the radius says, and a scan that goes by them
// finds the best groups of one that does not, on every instruction set, any threads.
#include <functional>
#include <numeric>

#include "check.h"
#include "coded.h"
#include "kernels/spans.h"
#include "openmp.h"

using namespace kvswap;
using namespace kvswap::test;

namespace {

// An index whose spans have memory of their own.
struct Spanned {
  Index index;
  std::vector<uint8_t> codes;
  std::vector<uint16_t> scales;
  std::vector<float> radii;

  Spanned(Random& random, const Shape& shape) : index(random, shape) {
    const int64_t tiles = (num_spans() + kTileTokens - 1) / kTileTokens;
    codes.resize(static_cast<size_t>(tiles * kTileTokens * span_width(index.keys())), 0xa5);
    if (shape.code != Code::bf16) scales.resize(static_cast<size_t>(tiles * kTileTokens));
    radii.resize(static_cast<size_t>(tiles * kTileTokens));
    // What was never encoded is zeros, as in an index's own memory.
    std::fill(index.codes.begin(), index.codes.end(), 0);
    std::fill(index.scales.begin(), index.scales.end(), 0);
  }

  int64_t in_span() const { return std::max<int64_t>(kTileTokens, index.shape.group_size); }
  int64_t num_spans() const {
    return (index.shape.num_groups * index.shape.group_size + in_span() - 1) / in_span();
  }
  Spans spans() { return {codes.data(), scales.empty() ? nullptr : scales.data(), radii.data()}; }
  void encode(const Numbers& tokens, const std::vector<int64_t>& ids) {
    index.encode(tokens, ids);
    bound_spans(index.keys(), spans(), ids.data(), static_cast<int64_t>(ids.size()));
  }
  // What a centre's codes stand for, in the order of the coefficients.
  std::vector<double> centre(int64_t span) const {
    const Shape& shape = index.shape;
    const int64_t width = span_width(index.keys());
    const auto byte = [&](int64_t i) {
      return codes[static_cast<size_t>(span / kTileTokens * width * kTileTokens +
                                       i / 4 * 4 * kTileTokens + span % kTileTokens * 4 + i % 4)];
    };
    std::vector<double> made(static_cast<size_t>(shape.rank));
    for (int64_t j = 0; j < shape.rank; ++j) {
      double& x = made[static_cast<size_t>(j)];
      if (shape.code == Code::bf16) {
        x = plain(Bf16{static_cast<uint16_t>(byte(2 * j) | byte(2 * j + 1) << 8)});
        continue;
      }
      const int64_t length = plane_length(shape.code, shape.rank);
      const int code = byte(j % length + j / length * shape.width()) - 128;
      x = code * static_cast<double>(from_f16(scales[static_cast<size_t>(span)]));
    }
    return made;
  }
};

// Keys that follow each other lie as far apart as `apart` says, and some are repeated.
Numbers some_keys(Random& random, const Shape& shape, int64_t count, float apart) {
  std::vector<float> place(static_cast<size_t>(shape.dim()));
  int64_t i = 0;
  const int64_t tokens = std::max<int64_t>(kTileTokens, shape.group_size);
  return numbers(Dtype::f32, count * shape.group_size * shape.dim(), [&] {
    const auto column = static_cast<size_t>(i % shape.dim());
    if (i++ / shape.dim() % tokens == 0) place[column] = random.dyadic();
    return place[column] + apart * random.dyadic();
  });
}

std::vector<int64_t> all_ids(const Shape& shape) {
  std::vector<int64_t> ids(static_cast<size_t>(shape.num_groups));
  std::iota(ids.begin(), ids.end(), 0);
  return ids;
}

Spanned some_spanned(Random& random, Code code, int64_t group_size, int64_t rows, float apart) {
  Shape shape;
  shape.code = code;
  shape.group_size = group_size;
  shape.rank = code == Code::rot4 ? 2 * random.between(1, 7) : random.between(1, 14);
  shape.num_groups = rows * std::max<int64_t>(1, kTileTokens / group_size);
  Spanned made(random, shape);
  made.encode(some_keys(random, shape, shape.num_groups, apart), all_ids(shape));
  return made;
}

double distance(const std::vector<double>& a, const std::vector<double>& b) {
  double squares = 0;
  for (size_t i = 0; i < a.size(); ++i) squares += (a[i] - b[i]) * (a[i] - b[i]);
  return std::sqrt(squares);
}

struct Found {
  std::vector<float> scores;
  double scored;
};

Found scan(Spanned& made, const Numbers& query, int64_t num_heads, const std::vector<int64_t>& ids,
           int64_t wanted, bool by_spans, const std::vector<int32_t>& kept = {}) {
  Found found{std::vector<float>(ids.size(), kNan), 0};
  const int64_t dim = made.index.shape.head_dim;
  const QueryView view{query.bytes.data(), query.dtype, num_heads, 1, dim, dim};
  const Spans spans = made.spans();
  found.scored = scan_best(made.index.keys(), by_spans ? &spans : nullptr, view, 0.5f, ids.data(),
                           static_cast<int64_t>(ids.size()),
                           Wanted{wanted, kept.data(), static_cast<int64_t>(kept.size())},
                           found.scores.data());
  return found;
}

Numbers some_query(Random& random, const Shape& shape, int64_t num_heads) {
  return numbers(random.one_of({Dtype::f32, Dtype::bf16, Dtype::f16}), num_heads * shape.head_dim,
                 [&] { return random.dyadic(); });
}

// Groups that reach the `wanted`-th best score have it, and no other group reaches it.
void check_best(const std::vector<float>& flat, const std::vector<float>& found, int64_t wanted) {
  std::vector<float> sorted = flat;
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  const float least = sorted[std::min(sorted.size(), static_cast<size_t>(wanted)) - 1];
  for (size_t i = 0; i < flat.size(); ++i) {
    CHECK(flat[i] >= least ? found[i] == flat[i] : found[i] <= flat[i]);
  }
}

}  // namespace

TEST(no_key_lies_farther_from_its_centre_than_the_radius) {
  Random random(40);
  for (const Code code : kSpannedCodes) {
    for (const int64_t group_size : {1, 4, 16, 64}) {
      for (const float apart : {0.0f, 0.1f, 1.0f}) {
        Spanned made = some_spanned(random, code, group_size, 3, apart);
        const At at{{"code", static_cast<int>(code)}, {"group_size", group_size}};
        for (int64_t token = 0; token < made.num_spans() * made.in_span(); ++token) {
          const int64_t span = token / made.in_span();
          CHECK(distance(made.index.decoded(token), made.centre(span)) <=
                static_cast<double>(made.radii[static_cast<size_t>(span)]));
        }
      }
    }
  }
}

TEST(spans_are_made_anew_where_a_group_is_encoded_and_only_there) {
  Random random(41);
  for (const Code code : kSpannedCodes) {
    Spanned made = some_spanned(random, code, 4, 40, 0.1f);
    const Shape& shape = made.index.shape;
    const std::vector<float> before = made.radii;
    const std::vector<int64_t> ids{9, 10, 150};
    Numbers keys = some_keys(random, shape, 3, 1.0f);
    for (float& x : keys.plain) x *= 50;
    std::memcpy(keys.bytes.data(), keys.plain.data(), keys.bytes.size());
    made.encode(keys, ids);
    for (int64_t span = 0; span < made.num_spans(); ++span) {
      const auto i = static_cast<size_t>(span);
      const bool is_touched = span == 2 || span == 37;
      CHECK(is_touched ? made.radii[i] > before[i] : made.radii[i] == before[i]);
    }
  }
}

TEST(two_levels_find_the_best_groups_of_one) {
  for (const Code code : kSpannedCodes) {
    Random random(42);
    for (const int64_t group_size : {1, 8, 32}) {
      const float apart = random.one_of({0.0f, 0.05f, 1.0f});
      Spanned made = some_spanned(random, code, group_size, kSampledFrom + 60, apart);
      std::vector<int64_t> ids = all_ids(made.index.shape);
      ids.resize(ids.size() - static_cast<size_t>(random.below(3)));
      if (random.below(2)) ids.erase(ids.begin() + 17, ids.begin() + 20);
      const int64_t heads = 2 * random.between(1, 9);
      const Numbers query = some_query(random, made.index.shape, heads);
      each_name([&](const char* name) {
        const Using named(name);
        for (const int64_t wanted : {1, 100, static_cast<int>(ids.size()) + 1}) {
          const At at{{"code", static_cast<int>(code)},
                      {"group_size", group_size},
                      {"heads", heads},
                      {"wanted", wanted}};
          std::vector<int32_t> kept{-1};
          for (int i = 0; i < 5; ++i) {
            kept.push_back(static_cast<int32_t>(random.below(static_cast<int64_t>(ids.size()))));
          }
          const Found flat = scan(made, query, heads, ids, wanted, false);
          const Found found = scan(made, query, heads, ids, wanted, true, kept);
          check_best(flat.scores, found.scores, wanted);
          for (const int32_t place : kept) {
            if (place >= 0) {
              const auto i = static_cast<size_t>(place);
              CHECK(found.scores[i] == flat.scores[i]);
            }
          }
        }
      });
    }
  }
}

TEST(two_levels_do_not_depend_on_the_threads) {
  Random random(43);
  for (const Code code : {Code::rot4, Code::rot1, Code::bf16}) {
    Spanned made = some_spanned(random, code, 4, kSampledFrom + 300, 0.05f);
    const std::vector<int64_t> ids = all_ids(made.index.shape);
    const Numbers query = some_query(random, made.index.shape, 6);
    for (const bool by_spans : {false, true}) {
      const Found expected = scan(made, query, 6, ids, 100, by_spans);
      for (const int threads : {2, 5}) {
        const At at{{"code", static_cast<int>(code)}, {"threads", threads}, {"by_spans", by_spans}};
        omp_set_num_threads(threads);
        const Found found = scan(made, query, 6, ids, 100, by_spans);
        const std::vector<float> radii = made.radii;
        bound_spans(made.index.keys(), made.spans(), ids.data(), static_cast<int64_t>(ids.size()));
        omp_set_num_threads(1);
        CHECK(found.scores == expected.scores);
        CHECK(found.scored == expected.scored);
        CHECK(made.radii == radii);
      }
    }
  }
}

TEST(few_rows_are_scored_as_a_plain_scan_scores_them) {
  Random random(44);
  Spanned made = some_spanned(random, Code::int8, 4, 100, 0.1f);
  const std::vector<int64_t> ids = all_ids(made.index.shape);
  const Numbers query = some_query(random, made.index.shape, 4);
  std::vector<float> expected(ids.size(), kNan);
  const int64_t dim = made.index.shape.head_dim;
  scan_groups(made.index.keys(), {query.bytes.data(), query.dtype, 4, 1, dim, dim}, 0.5f,
              ids.data(), static_cast<int64_t>(ids.size()), 5, expected.data());
  CHECK(scan(made, query, 4, ids, 5, false).scores == expected);
  const Found found = scan(made, query, 4, ids, 5, true);
  CHECK(found.scores == expected);
  CHECK(found.scored == 1);
}
