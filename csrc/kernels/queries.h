// Queries of a scan, carried through the projection and laid out as the codes are.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/api.h"
#include "kernels/scan.h"

namespace kvswap {

// Queries of one pass, laid out as `TileScore` wants them.
struct Queries {
  int count;
  int quads;
  int64_t band_chunks[kBands];  // of a token, as `TileScore` has them
  std::vector<uint32_t> words;
  float scale[kMaxQueries];
  int32_t start[kMaxQueries];
  int32_t sum[kMaxQueries];  // of the rounded coefficients
  float norm[kMaxQueries];   // of what is multiplied, `scale` included
};

// The queries from `first` on, in the order token, head; as many as a pass takes.
Queries prepare(const CodedKeys& keys, const QueryView& query, int64_t first, float scaling,
                int threads);

// The best score of each group in tiles [first, first + count): [quads][groups of a tile][4],
// query scales left out. Groups of several tiles are one group then.
void score_tiles(const CodedKeys& keys, const Queries& queries, int64_t first, int64_t count,
                 float* out);

// Of the columns of blocks of rows, [blocks][quads][in_row][4] each: what `column_sums` gives.
struct ColumnSums {
  void resize(int64_t blocks, int64_t length);
  void find(const ScoreRows& rows, int64_t block);

  std::vector<float> largest, sum, product;
};

// Each query's largest score, the sum of exponentials relative to it, and the sum of those times
// what they are the exponentials of.
struct QuerySums {
  float largest[kMaxQueries];
  double sum[kMaxQueries] = {}, product[kMaxQueries] = {};
};

QuerySums merge_columns(const Queries& queries, int64_t in_row, const ColumnSums& columns);

// A query that attends to e times as many groups as are wanted is taken for one that gives each
// e^-kOutvoted of what it does.
constexpr double kOutvoted = 4;

// What is taken off a query's scores: its log-sum-exp, so that shares of attention are compared,
// and more where it attends to more groups than are `wanted`, so that it has less say in which
// they are: the perplexity of its shares counts. Of queries that are none infinity.
float shift_of(const Queries& queries, const QuerySums& sums, int64_t query, int64_t wanted);

}  // namespace kvswap
