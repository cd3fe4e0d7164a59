#include "kernels/queries.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "common/parallel.h"
#include "kernels/bands.h"
#include "kernels/half.h"

namespace kvswap {
namespace {

// Carries a query head through its KV head's part of the projection.
void project_query(const CodedKeys& keys, const QueryView& query, int64_t index, float scaling,
                   float* out) {
  const int64_t head = index % query.num_heads, token = index / query.num_heads;
  const int64_t kv_head = head / (query.num_heads / keys.kv_heads);
  const size_t item = query.dtype == Dtype::f32 ? 4 : 2;
  const auto* data =
      static_cast<const char*>(query.data) +
      static_cast<size_t>(head * query.head_stride + token * query.token_stride) * item;
  thread_local std::vector<float> wide;
  wide.resize(static_cast<size_t>(keys.head_dim));
  kernels().widen(data, query.dtype, keys.head_dim, wide.data());
  std::fill_n(out, keys.rank, 0.0f);
  kernels().project(wide.data(), keys.head_dim,
                    keys.query_basis + kv_head * keys.head_dim * keys.rank, keys.rank, out);
  for (int64_t i = 0; i < keys.rank; ++i) out[i] *= keys.steps ? scaling * keys.steps[i] : scaling;
}

// Puts coefficient j of query q where the tiles' bytes meet it.
void place(const CodedKeys& keys, Queries& queries, int q, const float* coefficients) {
  const auto word = [&](int64_t chunk) {
    return reinterpret_cast<char*>(&queries.words[static_cast<size_t>(chunk * kMaxQueries + q)]);
  };
  float squares = 0;
  if (keys.code == Code::bf16) {
    for (int64_t j = 0; j < keys.rank; ++j) {
      const uint16_t half = to_bf16(coefficients[j]);
      const float rounded = from_bf16(half);
      squares += rounded * rounded;
      std::memcpy(word(j / 2) + 2 * (j % 2), &half, 2);
    }
    queries.norm[q] = std::sqrt(squares);
    return;
  }
  float top = 0;
  for (int64_t j = 0; j < keys.rank; ++j) top = std::max(top, std::fabs(coefficients[j]));
  const float scale = top > 0 ? top / 127 : 1.0f;
  int32_t sum = 0, twice = 0;  // of the coefficients; of them times what grids begin at
  for (const Band& band : bands_of(keys)) {
    int32_t of_band = 0;
    for (int64_t j = 0; j < band.count; ++j) {
      const auto rounded =
          static_cast<int8_t>(std::nearbyint(coefficients[band.first + j] / scale));
      const int64_t at = j % band.length(), plane = j / band.length();
      word(band.first_words + plane * band.chunks + at / 4)[at % 4] = static_cast<char>(rounded);
      of_band += rounded;
      squares += static_cast<float>(rounded * rounded);
    }
    sum += of_band;
    twice += of_band * (keys.code == Code::int8 ? 256 : band.top());
  }
  queries.scale[q] = scale;
  queries.sum[q] = sum;
  queries.norm[q] = scale * std::sqrt(squares);
  queries.start[q] = -(twice >> 1);
}

}  // namespace

Queries prepare(const CodedKeys& keys, const QueryView& query, int64_t first, float scaling,
                int threads) {
  Queries made;
  const int64_t all = query.num_heads * query.q_len;
  made.count = static_cast<int>(std::min<int64_t>(kMaxQueries, all - first));
  made.quads = (made.count + 3) / 4;
  std::fill_n(made.scale, kMaxQueries, 1.0f);
  std::fill_n(made.start, kMaxQueries, 0);
  std::fill_n(made.sum, kMaxQueries, 0);
  std::fill_n(made.norm, kMaxQueries, 0.0f);
  const Bands bands = bands_of(keys);
  for (int i = 0; i < kBands; ++i) made.band_chunks[i] = bands.each[i].chunks;
  const int64_t chunks = keys.code == Code::bf16 ? keys.width / 4 : bands.words;
  made.words.assign(static_cast<size_t>(chunks * kMaxQueries), 0);
  parallel(std::min(threads, made.count), [&](int thread, int total) {
    std::vector<float> coefficients(static_cast<size_t>(keys.rank));
    const int begin = made.count * thread / total, end = made.count * (thread + 1) / total;
    for (int q = begin; q < end; ++q) {
      project_query(keys, query, first + q, scaling, coefficients.data());
      place(keys, made, q, coefficients.data());
    }
  });
  return made;
}

void score_tiles(const CodedKeys& keys, const Queries& queries, int64_t first, int64_t count,
                 float* out) {
  TileScore a;
  a.chunks = keys.width / 4;
  std::copy_n(queries.band_chunks, kBands, a.band_chunks);
  a.num_quads = queries.quads;
  a.query = queries.words.data();
  a.start = queries.start;
  a.group_size = static_cast<int>(std::min<int64_t>(keys.group_size, kTileTokens));
  const int64_t length = queries.quads * 4 * (kTileTokens / a.group_size);
  float more[kMaxQueries * kTileTokens];
  for (int64_t tile = first; tile < first + count; ++tile) {
    a.codes = keys.codes + tile * keys.width * kTileTokens;
    a.scale = keys.scales ? keys.scales + tile * kTileTokens : nullptr;
    a.out = tile == first ? out : more;
    kernels().score_tile(keys.code, a);
    if (tile == first) continue;
    for (int64_t i = 0; i < length; ++i) out[i] = std::max(out[i], more[i]);
  }
}

void ColumnSums::resize(int64_t blocks, int64_t length) {
  largest.resize(static_cast<size_t>(blocks * length));
  sum.resize(largest.size());
  product.resize(largest.size());
}

void ColumnSums::find(const ScoreRows& rows, int64_t block) {
  const int64_t at = block * rows.length;
  kernels().column_sums(rows, largest.data() + at, sum.data() + at, product.data() + at);
}

QuerySums merge_columns(const Queries& queries, int64_t in_row, const ColumnSums& columns) {
  QuerySums made;
  std::fill_n(made.largest, kMaxQueries, -std::numeric_limits<float>::infinity());
  const int64_t length = queries.quads * 4 * in_row;
  const auto all = static_cast<int64_t>(columns.largest.size());
  const auto query_of = [&](int64_t i) { return i % length / (4 * in_row) * 4 + i % 4; };
  for (int64_t i = 0; i < all; ++i) {
    float& largest = made.largest[query_of(i)];
    largest = std::max(largest, columns.largest[static_cast<size_t>(i)]);
  }
  for (int64_t i = 0; i < all; ++i) {
    const auto at = static_cast<size_t>(i);
    if (columns.sum[at] == 0) continue;
    const int64_t q = query_of(i);
    const double less = columns.largest[at] - made.largest[q], factor = std::exp(less);
    made.sum[q] += factor * columns.sum[at];
    made.product[q] += factor * (columns.product[at] + less * columns.sum[at]);
  }
  return made;
}

float shift_of(const Queries& queries, const QuerySums& sums, int64_t query, int64_t wanted) {
  if (query >= queries.count) return std::numeric_limits<float>::infinity();
  const double sum = sums.sum[query], log_sum = std::log(sum);
  const double entropy = log_sum - sums.product[query] / sum;
  const double over = entropy - std::log(static_cast<double>(std::max<int64_t>(1, wanted)));
  return sums.largest[query] + static_cast<float>(log_sum + kOutvoted * std::max(0.0, over));
}

}  // namespace kvswap
