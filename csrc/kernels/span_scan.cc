#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/bounds.h"
#include "kernels/queries.h"
#include "kernels/rows.h"
#include "kernels/spans.h"
#include "kernels/top.h"

namespace kvswap {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kBlockRows = 128;  // of the sample, whose sums do not depend on the threads
constexpr int64_t kRowsAhead = 3;
constexpr int64_t kLeastRun = 8;  // rows on average, or bounds cost what scores do

size_t at(int64_t i) { return static_cast<size_t>(i); }

// What a thread keeps from call to call.
struct Workspace {
  Bounds bounds;
  std::vector<float> scores, priorities, found, sample;
  ColumnSums columns;
  std::vector<char> is_scored;
  std::vector<int64_t> scored;
};

// One pass for up to sixteen queries. A row is scored where some bound says that it can matter:
// for the best score of a query, which its normaliser needs, or for the groups wanted.
class Pass {
 public:
  Pass(const CodedKeys& keys, const Queries& queries, const Rows& rows, int64_t num_ids,
       const Wanted& wanted, Workspace& work, int threads)
      : keys_(keys),
        queries_(queries),
        rows_(rows),
        num_ids_(num_ids),
        wanted_(wanted),
        work_(work),
        threads_(threads),
        in_quad_(4 * rows.in_row),
        length_(queries.quads * in_quad_),
        scale_(at(length_)),
        shift_(at(length_)) {
    work.scores.resize(at(rows.count * length_));
    work.is_scored.assign(at(rows.count), 0);
    work.scored.clear();
    std::fill_n(top_, kMaxQueries, -kInfinity);
    for (int64_t i = 0; i < length_; ++i) scale_[at(i)] = queries.scale[query_of(i)];
  }

  // All rows.
  void run() {
    score([](int64_t) { return true; });
    find_shifts();
    finish();
  }

  // The rows that may hold one of the groups wanted, and a few more.
  void run(const Spans& spans) {
    work_.bounds.find(keys_, spans, queries_, rows_, threads_);
    score_sample_and_kept();
    float least[kMaxQueries];
    work_.bounds.highest(least);
    score_reaching(least);
    std::copy_n(top_, kMaxQueries, least);
    score_reaching(least);
    find_shifts();
    find_priorities();
    score_from(nth_largest(work_.priorities, wanted_.count));
    finish();
    score_from(nth_largest(work_.found, wanted_.count));
    finish();
  }

  const std::vector<float>& found() const { return work_.found; }
  int64_t num_scored() const { return static_cast<int64_t>(work_.scored.size()); }

 private:
  int64_t query_of(int64_t column) const { return column / in_quad_ * 4 + column % 4; }

  // Calls body(position) for the sample: as many groups as a row holds, every so often. Where
  // they lie in rows does not matter to it.
  template <class F>
  void each_sampled(F&& body) const {
    const int64_t in_row = rows_.in_row, step = in_row * kSampleStride;
    for (int64_t first = step / 2; first < num_ids_; first += step) {
      for (int64_t i = first; i < std::min(num_ids_, first + in_row); ++i) body(i);
    }
  }

  void score_sample_and_kept() {
    std::vector<char> holds(at(rows_.count), 0);
    const auto note = [&](int64_t position) { holds[at(rows_.place(position).row)] = 1; };
    each_sampled(note);
    for (int64_t i = 0; i < wanted_.num_kept; ++i) {
      if (wanted_.kept[i] >= 0 && wanted_.kept[i] < num_ids_) note(wanted_.kept[i]);
    }
    score([&](int64_t row) { return holds[at(row)] != 0; });
  }

  // Rows of which some query may find its `least`.
  void score_reaching(float* least) {
    std::fill(least + queries_.count, least + kMaxQueries, kInfinity);
    score([&](int64_t row) { return work_.bounds.reaches(row, least); });
  }

  void score_from(float least) {
    score([&](int64_t row) { return work_.priorities[at(row)] >= least; });
  }

  // Scores the rows of which `asks` is true and that have no scores yet.
  template <class F>
  void score(F&& asks) {
    const int64_t before = num_scored();
    for (int64_t row = 0; row < rows_.count; ++row) {
      if (!work_.is_scored[at(row)] && asks(row)) work_.scored.push_back(row);
    }
    std::vector<float> tops(at(threads_ * length_), -kInfinity);
    share_rows(threads_, num_scored() - before, [&](int thread, int64_t begin, int64_t end) {
      float* top = tops.data() + thread * length_;
      for (int64_t i = before + begin; i < before + end; ++i) {
        if (i + kRowsAhead < before + end) prefetch(work_.scored[at(i + kRowsAhead)]);
        const int64_t row = work_.scored[at(i)];
        float* scores = work_.scores.data() + row * length_;
        rows_.each(row, row + 1, [&](const Run& run, int64_t in_run, int64_t) {
          rows_.score(keys_, queries_, run, in_run, scores);
        });
        for (int64_t c = 0; c < length_; ++c) top[c] = std::max(top[c], scores[c]);
        work_.is_scored[at(row)] = 1;
      }
    });
    for (int64_t i = 0; i < threads_ * length_; ++i) {
      const int64_t q = query_of(i % length_);
      top_[q] = std::max(top_[q], tops[at(i)] * queries_.scale[q]);
    }
  }

  // Rows that lie apart are not foreseen by the processor.
  void prefetch(int64_t row) const {
    rows_.each(row, row + 1, [&](const Run& run, int64_t in_run, int64_t) {
      const uint8_t* codes = keys_.codes + rows_.tile(run, in_run) * keys_.width * kTileTokens;
      for (int64_t i = 0; i < keys_.width * kTileTokens; i += 64) __builtin_prefetch(codes + i);
    });
  }

  // Every query's best score, and with it what the sample says of all others.
  void find_shifts() {
    std::vector<float>& sample = work_.sample;
    sample.clear();
    int64_t asked = 0;
    each_sampled([&](int64_t position) {
      const Rows::Place place = rows_.place(position);
      const int64_t group = asked++ % rows_.in_row;
      if (group == 0) sample.insert(sample.end(), at(length_), -kInfinity);
      float* to = sample.data() + at(static_cast<int64_t>(sample.size()) - length_ + 4 * group);
      const float* from = work_.scores.data() + place.row * length_ + 4 * place.group;
      for (int quad = 0; quad < queries_.quads; ++quad) {
        std::copy_n(from + quad * in_quad_, 4, to + quad * in_quad_);
      }
    });
    const auto num_rows = static_cast<int64_t>(sample.size()) / length_;
    const int64_t blocks = (num_rows + kBlockRows - 1) / kBlockRows;
    work_.columns.resize(blocks, length_);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = b * kBlockRows;
      work_.columns.find({sample.data() + first * length_, std::min(num_rows - first, kBlockRows),
                          length_, scale_.data()},
                         b);
    }
    const double weight = static_cast<double>(num_ids_) / static_cast<double>(asked);
    const QuerySums sums = with_best(merge_columns(queries_, rows_.in_row, work_.columns), weight);
    for (int64_t i = 0; i < length_; ++i) {
      shift_[at(i)] = shift_of(queries_, sums, query_of(i), wanted_.count);
    }
  }

  // Of the best scores and the sample, each of which stands for `weight`.
  QuerySums with_best(QuerySums sums, double weight) const {
    for (int64_t q = 0; q < queries_.count; ++q) {
      const double less = sums.largest[q] - top_[q], factor = weight * std::exp(less);
      sums.product[q] = factor * (sums.product[q] + less * sums.sum[q]);
      sums.sum[q] = 1 + factor * sums.sum[q];
      sums.largest[q] = top_[q];
    }
    return sums;
  }

  // The highest score that a row's bounds leave to it.
  void find_priorities() {
    float shift[kMaxQueries];
    for (int64_t q = 0; q < 4 * queries_.quads; ++q) {
      shift[q] = shift_[at(q / 4 * in_quad_ + q % 4)];
    }
    work_.priorities.resize(at(rows_.count));
    for (int64_t row = 0; row < rows_.count; ++row) {
      work_.priorities[at(row)] = work_.bounds.best(row, shift);
    }
  }

  // Scores of the groups in rows that have been scored since the last call.
  void finish() {
    if (!finished_) work_.found.assign(at(num_ids_), -kInfinity);
    share_rows(threads_, num_scored() - finished_, [&](int, int64_t begin, int64_t end) {
      float best[4 * kTileTokens];
      for (int64_t i = finished_ + begin; i < finished_ + end; ++i) {
        const int64_t row = work_.scored[at(i)];
        std::fill_n(best, in_quad_, -kInfinity);
        kernels().best_shifted({work_.scores.data() + row * length_, 1, length_, scale_.data()},
                               shift_.data(), in_quad_, best);
        rows_.each(row, row + 1, [&](const Run& run, int64_t in_run, int64_t) {
          rows_.finish(run, in_run, best, work_.found.data());
        });
      }
    });
    finished_ = num_scored();
  }

  const CodedKeys& keys_;
  const Queries& queries_;
  const Rows& rows_;
  int64_t num_ids_;
  const Wanted& wanted_;
  Workspace& work_;
  int threads_;
  int64_t in_quad_, length_;  // floats of four queries, and of a row
  int64_t finished_ = 0;
  float top_[kMaxQueries];
  std::vector<float> scale_, shift_;
};

}  // namespace

double scan_best(const CodedKeys& keys, const Spans* spans, const QueryView& query, float scaling,
                 const int64_t* ids, int64_t count, const Wanted& wanted, float* out) {
  const Rows rows(keys, ids, count);
  if (count < kSampledFrom * rows.in_row) {
    scan_groups(keys, query, scaling, ids, count, wanted.count, out);
    return 1;
  }
  std::fill_n(out, count, -kInfinity);
  thread_local Workspace work;
  const bool is_worth = rows.count >= kLeastRun * static_cast<int64_t>(rows.runs.size());
  const int threads = num_threads();
  const int64_t all = query.num_heads * query.q_len;
  int64_t scored = 0, passes = 0;
  for (int64_t first = 0; first < all; first += kMaxQueries, ++passes) {
    const Queries queries = prepare(keys, query, first, scaling, threads);
    Pass pass(keys, queries, rows, count, wanted, work, threads);
    if (spans && is_worth) {
      pass.run(*spans);
    } else {
      pass.run();
    }
    const std::vector<float>& found = pass.found();
    for (int64_t i = 0; i < count; ++i) out[i] = std::max(out[i], found[at(i)]);
    scored += pass.num_scored();
  }
  return static_cast<double>(scored) / static_cast<double>(passes * rows.count);
}

}  // namespace kvswap
