#include "kernels/scan.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "common/parallel.h"
#include "kernels/queries.h"
#include "kernels/rows.h"

namespace kvswap {
namespace {

// Sums of exponentials are taken block by block, so that they do not depend on the threads.
constexpr int64_t kBlockRows = 128;
constexpr int64_t kTilesAhead = 6;
constexpr int64_t kLeastRows = 128;  // a thread's worth

// What a thread keeps from call to call.
struct Workspace {
  std::vector<float> scores, best;
  ColumnSums columns;
};

class Pass {
 public:
  Pass(const CodedKeys& keys, const Queries& queries, const Rows& rows, int64_t wanted,
       Workspace& work)
      : keys_(keys),
        queries_(queries),
        rows_(rows),
        wanted_(wanted),
        work_(work),
        in_quad_(4 * rows.in_row),
        length_(queries.quads * in_quad_),
        blocks_((rows.count + kBlockRows - 1) / kBlockRows),
        scale_(static_cast<size_t>(length_)),
        shift_(static_cast<size_t>(length_)) {
    work.scores.resize(static_cast<size_t>(rows.count * length_));
    work.columns.resize(blocks_, length_);
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
    rows_.each(begin, end, [&](const Run& run, int64_t in_run, int64_t row) {
      prefetch(rows_.tile(run, in_run) + kTilesAhead);
      rows_.score(keys_, queries_, run, in_run, work_.scores.data() + row * length_);
    });
    work_.columns.find(rows_of(block), block);
  }

  // Codes stream through memory once: no cache holds them from step to step.
  void prefetch(int64_t tile) const {
    const uint8_t* at = keys_.codes + tile * keys_.width * kTileTokens;
    for (int64_t i = 0; i < keys_.width * kTileTokens; i += 64) __builtin_prefetch(at + i);
  }

  void find_shifts() {
    const QuerySums sums = merge_columns(queries_, rows_.in_row, work_.columns);
    for (int64_t i = 0; i < length_; ++i) {
      shift_[at(i)] = shift_of(queries_, sums, query_of(i), wanted_);
    }
  }

  void finish_block(int64_t block, float* out) {
    const ScoreRows rows = rows_of(block);
    const int64_t begin = block * kBlockRows;
    float* best = work_.best.data() + begin * in_quad_;
    std::fill_n(best, rows.num_rows * in_quad_, -kInfinity);
    kernels().best_shifted(rows, shift_.data(), in_quad_, best);
    rows_.each(begin, begin + rows.num_rows, [&](const Run& run, int64_t in_run, int64_t row) {
      rows_.finish(run, in_run, work_.best.data() + row * in_quad_, out);
    });
  }

  static constexpr float kInfinity = std::numeric_limits<float>::infinity();

  const CodedKeys& keys_;
  const Queries& queries_;
  const Rows& rows_;
  int64_t wanted_;
  Workspace& work_;
  int64_t in_quad_, length_, blocks_;
  std::vector<float> scale_, shift_;
};

}  // namespace

void scan_groups(const CodedKeys& keys, const QueryView& query, float scaling, const int64_t* ids,
                 int64_t count, int64_t wanted, float* out) {
  std::fill_n(out, count, -std::numeric_limits<float>::infinity());
  if (!count) return;
  thread_local Workspace work;
  const Rows rows(keys, ids, count);
  const int64_t worth = std::max<int64_t>(1, rows.count / kLeastRows);
  const int threads = static_cast<int>(std::min<int64_t>(num_threads(), worth));
  for (int64_t first = 0; first < query.num_heads * query.q_len; first += kMaxQueries) {
    const Queries queries = prepare(keys, query, first, scaling, threads);
    Pass(keys, queries, rows, wanted, work).run(threads, out);
  }
}

}  // namespace kvswap
