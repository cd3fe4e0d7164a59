// Packing into records and merging of partial attentions, on any number of threads.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "kernels/records.h"
#include "kernels/top.h"
#include "random.h"

using namespace kvswap;
using namespace kvswap::test;

TEST(records_hold_keys_then_values_head_by_head) {
  Random random(70);
  for (int round = 0; round < 40; ++round) {
    const int64_t heads = random.between(1, 3), size = random.between(1, 8);
    const int64_t count = random.between(1, 60), dim = random.between(1, 70);
    const int64_t tokens = count * size, room = tokens + random.below(3);
    std::vector<float> keys(static_cast<size_t>(heads * room * dim)), values(keys.size());
    for (size_t i = 0; i < keys.size(); ++i) {
      keys[i] = static_cast<float>(i);
      values[i] = -static_cast<float>(i);
    }
    const int64_t payload = 2 * heads * size * dim, stride = payload + 5;
    std::vector<float> packed(static_cast<size_t>(count * stride), 0.5f);
    pack({keys.data(), values.data(), tokens, room * dim, dim, room * dim, dim},
         {reinterpret_cast<char*>(packed.data()), stride * 4, count, size, heads, dim, Dtype::f32});
    for (int64_t i = 0; i < count * stride; ++i) {
      const int64_t group = i / stride, at = i % stride;
      float expected = 0.5f;
      if (at < payload) {
        const int64_t part = at / (heads * size * dim), rest = at % (heads * size * dim);
        const int64_t head = rest / (size * dim), token = rest / dim % size;
        const int64_t from = (head * room + group * size + token) * dim + rest % dim;
        expected = part ? -static_cast<float>(from) : static_cast<float>(from);
      }
      CHECK(packed[static_cast<size_t>(i)] == expected);
    }
  }
}

TEST(merged_parts_weigh_as_their_sums_do) {
  const float none = -std::numeric_limits<float>::infinity();
  std::vector<float> out{1, 2, 3, 4, 0, 0}, lse{std::log(1.0f), none, none};
  const std::vector<float> part{5, 6, 7, 8, 0, 0}, part_lse{std::log(3.0f), 2.0f, none};
  merge(out.data(), lse.data(), part.data(), part_lse.data(), 3, 2);
  const std::vector<float> expected{4, 5, 7, 8, 0, 0};
  for (size_t i = 0; i < out.size(); ++i) CHECK(std::fabs(out[i] - expected[i]) < 1e-5f);
  CHECK(std::fabs(lse[0] - std::log(4.0f)) < 1e-6f);
  CHECK(lse[1] == 2.0f);
  CHECK(lse[2] == none);
}

TEST(low_scores_fall_behind_unless_kept) {
  std::vector<float> scores{-1, -5, -7, -2};
  const std::vector<int32_t> kept{2, -1};
  discourage(scores.data(), 4, kept.data(), 2, -3.0f);
  CHECK(scores[0] == -1.0f);
  CHECK(scores[1] < -1000.0f);
  CHECK(scores[2] == -7.0f);
  CHECK(scores[3] == -2.0f);
}
