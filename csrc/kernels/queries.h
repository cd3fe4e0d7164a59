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

// Each query's largest score, and the sum of exponentials relative to it.
struct QuerySums {
  float largest[kMaxQueries];
  double sum[kMaxQueries] = {};
};

// From those of blocks of rows, whose columns are [quads][in_row][4].
QuerySums merge_columns(const Queries& queries, int64_t in_row, const std::vector<float>& tops,
                        const std::vector<float>& sums);

}  // namespace kvswap
