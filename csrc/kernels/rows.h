// The groups that a scan is asked for, as rows of scores.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/queries.h"

namespace kvswap {

// Ids that follow each other. A row of scores is a tile, or a group of several tiles; the
// first and the last row of a run may hold groups that nobody asked for.
struct Run {
  int64_t id, position, count;  // of its first group; groups
  int64_t first_row, num_rows;
};

static inline float best_of_four(const float* x) {
  return std::max(std::max(x[0], x[1]), std::max(x[2], x[3]));
}

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

  // Raises out at the row's ids to the best of four each: [groups][4].
  void finish(const Run& run, int64_t row, const float* best, float* out) const {
    const Asked wanted = asked(run, row);
    const float* four = best + 4 * wanted.first;
    float* target = out + wanted.position;
    for (int64_t g = wanted.first; g < wanted.last; ++g, four += 4, ++target) {
      *target = std::max(*target, best_of_four(four));
    }
  }

  // Where the group at a position of the ids is scored: a row of all, and its place in it.
  struct Place {
    int64_t row, group;
  };
  Place place(int64_t position) const {
    const auto after = [](int64_t at, const Run& run) { return at < run.position; };
    const Run& run = *(std::upper_bound(runs.begin(), runs.end(), position, after) - 1);
    const int64_t id = run.id + position - run.position;
    return {run.first_row + id / in_row - run.id / in_row, id % in_row};
  }

  // Its first tile.
  int64_t tile(const Run& run, int64_t row) const { return (run.id / in_row + row) * in_group; }

  // Scores a row: groups that nobody asked for count for nothing.
  void score(const CodedKeys& keys, const Queries& queries, const Run& run, int64_t row,
             float* out) const {
    score_tiles(keys, queries, tile(run, row), in_group, out);
    if (row != 0 && row != run.num_rows - 1) return;
    const Asked wanted = asked(run, row);
    for (int64_t i = 0; i < queries.quads * 4 * in_row; ++i) {
      const int64_t group = i % (4 * in_row) / 4;
      if (group < wanted.first || group >= wanted.last) {
        out[i] = -std::numeric_limits<float>::infinity();
      }
    }
  }
};

}  // namespace kvswap
