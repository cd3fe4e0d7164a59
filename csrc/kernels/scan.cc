#include "kernels/scan.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "common/parallel.h"
#include "kernels/half.h"

namespace kvswap {
namespace {

// Sums of exponentials are taken block by block, so that they do not depend on the threads.
constexpr int64_t kBlockRows = 128;
constexpr int64_t kTilesAhead = 6;
constexpr int64_t kLeastRows = 128;  // a thread's worth

// Queries of one pass, laid out as `TileScore` wants them.
struct Queries {
  int count;
  int quads;
  std::vector<uint32_t> words;
  float scale[kMaxQueries];
  int32_t start[kMaxQueries];
};

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
  kernels().project(wide.data(), keys.head_dim, keys.basis + kv_head * keys.head_dim * keys.rank,
                    keys.rank, out);
  for (int64_t i = 0; i < keys.rank; ++i) out[i] *= scaling;
}

// Puts coefficient j of query q where the tiles' bytes meet it.
void place(const CodedKeys& keys, Queries& queries, int q, const float* coefficients) {
  const auto word = [&](int64_t chunk) {
    return reinterpret_cast<char*>(&queries.words[static_cast<size_t>(chunk * kMaxQueries + q)]);
  };
  if (keys.code == Code::bf16) {
    for (int64_t j = 0; j < keys.rank; ++j) {
      const uint16_t half = to_bf16(coefficients[j]);
      std::memcpy(word(j / 2) + 2 * (j % 2), &half, 2);
    }
    return;
  }
  float top = 0;
  for (int64_t j = 0; j < keys.rank; ++j) top = std::max(top, std::fabs(coefficients[j]));
  const float scale = top > 0 ? top / 127 : 1.0f;
  const int64_t half = keys.code == Code::rot4 ? keys.rank / 2 : keys.rank;
  int32_t sum = 0;
  for (int64_t j = 0; j < keys.rank; ++j) {
    const auto rounded = static_cast<int8_t>(std::nearbyint(coefficients[j] / scale));
    const int64_t at = j % half, chunk = at / 4 + (j < half ? 0 : keys.width / 4);
    word(chunk)[at % 4] = static_cast<char>(rounded);
    sum += rounded;
  }
  queries.scale[q] = scale;
  queries.start[q] = keys.code == Code::rot4 ? -(sum * 15 >> 1) : -sum * 128;
}

Queries prepare(const CodedKeys& keys, const QueryView& query, int64_t first, float scaling,
                int threads) {
  Queries made;
  const int64_t all = query.num_heads * query.q_len;
  made.count = static_cast<int>(std::min<int64_t>(kMaxQueries, all - first));
  made.quads = (made.count + 3) / 4;
  std::fill_n(made.scale, kMaxQueries, 1.0f);
  std::fill_n(made.start, kMaxQueries, 0);
  const int64_t planes = keys.code == Code::rot4 ? 2 : 1;
  made.words.assign(static_cast<size_t>(planes * keys.width / 4 * kMaxQueries), 0);
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

// -- the groups asked for, as rows of scores ----------------------------------------------

// Ids that follow each other. A row of scores is a tile, or a group of several tiles; the
// first and the last row of a run may hold groups that nobody asked for.
struct Run {
  int64_t id, position, count;  // of its first group; groups
  int64_t first_row, num_rows;
};

struct Rows {
  int64_t in_row;    // groups
  int64_t in_group;  // tiles
  int64_t count = 0;
  std::vector<Run> runs;

  Rows(const CodedKeys& keys, const int64_t* ids, int64_t num_ids)
      : in_row(std::max<int64_t>(1, kTileTokens / keys.group_size)),
        in_group(std::max<int64_t>(1, keys.group_size / kTileTokens)) {
    for (int64_t begin = 0, end; begin < num_ids; begin = end) {
      for (end = begin + 1; end < num_ids && ids[end] == ids[end - 1] + 1;) ++end;
      const int64_t last = (ids[end - 1]) / in_row, first = ids[begin] / in_row;
      runs.push_back({ids[begin], begin, end - begin, count, last - first + 1});
      count += last - first + 1;
    }
  }

  // Calls body(run, row of the run, row of all) for rows [begin, end).
  template <class F>
  void each(int64_t begin, int64_t end, F&& body) const {
    const auto after = [](int64_t row, const Run& run) { return row < run.first_row; };
    auto run = std::upper_bound(runs.begin(), runs.end(), begin, after) - 1;
    for (int64_t row = begin; row < end; ++run) {
      const int64_t stop = std::min(end, run->first_row + run->num_rows);
      for (; row < stop; ++row) body(*run, row - run->first_row, row);
    }
  }

  // The row's groups that were asked for: [first, last) of its own, at `position` of the ids.
  struct Asked {
    int64_t first, last, position;
  };
  Asked asked(const Run& run, int64_t row) const {
    const int64_t id = (run.id / in_row + row) * in_row;
    const int64_t first = std::max<int64_t>(0, run.id - id);
    const int64_t last = std::min(in_row, run.id + run.count - id);
    return {first, last, run.position + id + first - run.id};
  }
};

// -- one pass over all groups for up to sixteen queries -----------------------------------

// What a thread keeps from call to call.
struct Workspace {
  std::vector<float> scores, tops, sums, best;
};

class Pass {
 public:
  Pass(const CodedKeys& keys, const Queries& queries, const Rows& rows, Workspace& work)
      : keys_(keys),
        queries_(queries),
        rows_(rows),
        work_(work),
        in_quad_(4 * rows.in_row),
        length_(queries.quads * in_quad_),
        blocks_((rows.count + kBlockRows - 1) / kBlockRows),
        scale_(static_cast<size_t>(length_)),
        shift_(static_cast<size_t>(length_)) {
    work.scores.resize(static_cast<size_t>(rows.count * length_));
    work.tops.resize(static_cast<size_t>(blocks_ * length_));
    work.sums.resize(work.tops.size());
    work.best.resize(static_cast<size_t>(rows.count * in_quad_));
    for (int64_t i = 0; i < length_; ++i) scale_[at(i)] = queries.scale[query_of(i)];
  }

  void run(int threads, float* out) {
    const auto share = [&](int thread, int total, auto&& body) {
      const int64_t end = blocks_ * (thread + 1) / total;
      for (int64_t b = blocks_ * thread / total; b < end; ++b) body(b);
    };
    parallel(threads, [&](int thread, int total) {
      share(thread, total, [&](int64_t block) { score_block(block); });
    });
    find_shifts();
    parallel(threads, [&](int thread, int total) {
      share(thread, total, [&](int64_t block) { finish_block(block, out); });
    });
  }

 private:
  static size_t at(int64_t i) { return static_cast<size_t>(i); }
  int64_t query_of(int64_t column) const { return column / in_quad_ * 4 + column % 4; }
  ScoreRows rows_of(int64_t block) const {
    const int64_t begin = block * kBlockRows;
    return {work_.scores.data() + begin * length_, std::min(rows_.count - begin, kBlockRows),
            length_, scale_.data()};
  }

  void score_block(int64_t block) {
    const int64_t begin = block * kBlockRows, end = std::min(rows_.count, begin + kBlockRows);
    float more[kMaxQueries * kTileTokens];
    rows_.each(begin, end, [&](const Run& run, int64_t in_run, int64_t row) {
      float* out = work_.scores.data() + row * length_;
      const int64_t tile = (run.id / rows_.in_row + in_run) * rows_.in_group;
      prefetch(tile + kTilesAhead);
      score_tile(tile, out);
      for (int64_t next = 1; next < rows_.in_group; ++next) {
        score_tile(tile + next, more);
        for (int64_t i = 0; i < length_; ++i) out[i] = std::max(out[i], more[i]);
      }
      if (in_run == 0 || in_run == run.num_rows - 1) hide(rows_.asked(run, in_run), out);
    });
    kernels().column_sums(rows_of(block), work_.tops.data() + block * length_,
                          work_.sums.data() + block * length_);
  }

  // Codes stream through memory once: no cache holds them from step to step.
  void prefetch(int64_t tile) const {
    const uint8_t* at = keys_.codes + tile * keys_.width * kTileTokens;
    for (int64_t i = 0; i < keys_.width * kTileTokens; i += 64) __builtin_prefetch(at + i);
  }

  void score_tile(int64_t tile, float* out) const {
    TileScore a;
    a.codes = keys_.codes + tile * keys_.width * kTileTokens;
    a.chunks = keys_.width / 4;
    a.num_quads = queries_.quads;
    a.query = queries_.words.data();
    a.start = queries_.start;
    a.scale = keys_.scales ? keys_.scales + tile * kTileTokens : nullptr;
    a.group_size = static_cast<int>(std::min<int64_t>(keys_.group_size, kTileTokens));
    a.out = out;
    kernels().score_tile(keys_.code, a);
  }

  // Groups that nobody asked for count for nothing.
  void hide(const Rows::Asked& asked, float* row) const {
    for (int64_t i = 0; i < length_; ++i) {
      const int64_t group = i % in_quad_ / 4;
      if (group < asked.first || group >= asked.last) row[i] = -kInfinity;
    }
  }

  // Every query's log-sum-exp over all groups, from those of the blocks.
  void find_shifts() {
    float largest[kMaxQueries];
    double sum[kMaxQueries] = {};
    std::fill_n(largest, kMaxQueries, -kInfinity);
    for (int64_t i = 0; i < blocks_ * length_; ++i) {
      float& top = largest[query_of(i % length_)];
      top = std::max(top, work_.tops[at(i)]);
    }
    for (int64_t i = 0; i < blocks_ * length_; ++i) {
      const int64_t q = query_of(i % length_);
      sum[q] += static_cast<double>(work_.sums[at(i)]) * std::exp(work_.tops[at(i)] - largest[q]);
    }
    for (int64_t i = 0; i < length_; ++i) {
      const int64_t q = query_of(i);
      const bool is_real = q < queries_.count;
      shift_[at(i)] = is_real ? largest[q] + static_cast<float>(std::log(sum[q])) : kInfinity;
    }
  }

  void finish_block(int64_t block, float* out) {
    const ScoreRows rows = rows_of(block);
    const int64_t begin = block * kBlockRows;
    float* best = work_.best.data() + begin * in_quad_;
    std::fill_n(best, rows.num_rows * in_quad_, -kInfinity);
    kernels().best_shifted(rows, shift_.data(), in_quad_, best);
    rows_.each(begin, begin + rows.num_rows, [&](const Run& run, int64_t in_run, int64_t row) {
      const Rows::Asked asked = rows_.asked(run, in_run);
      const float* four = work_.best.data() + row * in_quad_ + 4 * asked.first;
      float* target = out + asked.position;
      for (int64_t g = asked.first; g < asked.last; ++g, four += 4, ++target) {
        const float top = std::max(std::max(four[0], four[1]), std::max(four[2], four[3]));
        *target = std::max(*target, top);
      }
    });
  }

  static constexpr float kInfinity = std::numeric_limits<float>::infinity();

  const CodedKeys& keys_;
  const Queries& queries_;
  const Rows& rows_;
  Workspace& work_;
  int64_t in_quad_, length_, blocks_;
  std::vector<float> scale_, shift_;
};

}  // namespace

void scan_groups(const CodedKeys& keys, const QueryView& query, float scaling, const int64_t* ids,
                 int64_t count, float* out) {
  std::fill_n(out, count, -std::numeric_limits<float>::infinity());
  if (!count) return;
  thread_local Workspace work;
  const Rows rows(keys, ids, count);
  const int64_t worth = std::max<int64_t>(1, rows.count / kLeastRows);
  const int threads = static_cast<int>(std::min<int64_t>(num_threads(), worth));
  for (int64_t first = 0; first < query.num_heads * query.q_len; first += kMaxQueries) {
    const Queries queries = prepare(keys, query, first, scaling, threads);
    Pass(keys, queries, rows, work).run(threads, out);
  }
}

}  // namespace kvswap
