// The most that each query can give any key of a row, by the row's span.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/parallel.h"
#include "kernels/queries.h"
#include "kernels/rows.h"
#include "kernels/spans.h"

namespace kvswap {

// Calls body(thread, begin, end) for the parts of [0, count) that threads take.
template <class F>
void share_rows(int threads, int64_t count, F&& body) {
  constexpr int64_t kLeast = 64;  // a thread's worth
  const auto most = static_cast<int>(std::min<int64_t>(threads, count / kLeast + 1));
  parallel(most, [&](int thread, int total) {
    body(thread, count * thread / total, count * (thread + 1) / total);
  });
}

class Bounds {
 public:
  void find(const CodedKeys& keys, const Spans& spans, const Queries& asked, const Rows& rows,
            int threads) {
    CodedKeys centres = keys;
    centres.code = keys.code == Code::bf16 ? Code::bf16 : Code::int8;
    centres.codes = spans.codes;
    centres.scales = spans.scales;
    centres.width = span_width(keys);
    centres.group_size = 1;
    Queries queries = asked;
    for (int q = 0; q < queries.count; ++q) queries.start[q] = -128 * queries.sum[q];
    width_ = 4 * queries.quads;
    values_.resize(static_cast<size_t>(rows.count * width_));
    share_rows(threads, rows.count, [&](int, int64_t begin, int64_t end) {
      float scores[kMaxQueries * kTileTokens];
      int64_t held = -1;
      rows.each(begin, end, [&](const Run& run, int64_t in_run, int64_t row) {
        const int64_t span = run.id / rows.in_row + in_run, tile = span / kTileTokens;
        if (tile != held) score_tiles(centres, queries, held = tile, 1, scores);
        const float* centre = scores + span % kTileTokens * 4;
        float* out = values_.data() + row * width_;
        for (int q = 0; q < width_; q += 4, out += 4, centre += 4 * kTileTokens) {
          for (int i = 0; i < 4; ++i) {
            out[i] = centre[i] * queries.scale[q + i] + queries.norm[q + i] * spans.radii[span];
          }
        }
      });
    });
  }

  // Of each query, over all rows.
  void highest(float* most) const {
    std::fill_n(most, width_, -std::numeric_limits<float>::infinity());
    for (auto x = values_.begin(); x != values_.end(); x += width_) {
      for (int64_t q = 0; q < width_; ++q) most[q] = std::max(most[q], x[q]);
    }
  }

  // Whether some query may find its `least` in a row.
  bool reaches(int64_t row, const float* least) const {
    const float* x = values_.data() + row * width_;
    int reaching = 0;
    for (int64_t q = 0; q < width_; ++q) reaching |= x[q] >= least[q];
    return reaching != 0;
  }

  // The most of a row over all queries, each less its own shift.
  float best(int64_t row, const float* shift) const {
    const float* x = values_.data() + row * width_;
    float most[4];
    std::fill_n(most, 4, -std::numeric_limits<float>::infinity());
    for (int64_t q = 0; q < width_; q += 4) {
      for (int64_t i = 0; i < 4; ++i) most[i] = std::max(most[i], x[q + i] - shift[q + i]);
    }
    return best_of_four(most);
  }

 private:
  int64_t width_ = 0;  // queries, rounded up to fours
  std::vector<float> values_;
};

}  // namespace kvswap
