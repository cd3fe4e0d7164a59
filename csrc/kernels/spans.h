// Spans: a bound for every few groups, so that a scan need not look at each of them.
//
// A span is what a row of scores holds: a tile's groups, or one longer group. Of its keys are
// kept a centre, coded like a key, and how far the farthest of them lies from it. No score in
// the span can then pass the centre's by more than that distance times the query's length.
#pragma once

#include <cstdint>

#include "kernels/scan.h"

namespace kvswap {

struct Spans {
  uint8_t* codes;    // of centres, int8 or bf16, in tiles: [tiles][span_width / 4][16][4]
  uint16_t* scales;  // [tiles][16] float16; null for bf16
  float* radii;      // [tiles][16]
};

// Bytes of a centre: coefficients lie in it as a query's do.
int64_t span_width(const CodedKeys& keys);

// Makes anew the spans that hold these groups; every id must be below keys.num_groups.
void bound_spans(const CodedKeys& keys, const Spans& spans, const int64_t* ids, int64_t count);

// The groups that will be looked at: so many of the best, whatever `scan_groups` makes of that
// number, and those at `kept` positions, of which what is none is skipped.
struct Wanted {
  int64_t count;
  const int32_t* kept = nullptr;
  int64_t num_kept = 0;
};

// As `scan_groups`, with another normaliser where there are groups for kSampledFrom rows and more:
// a query's scores are set against its best one and against a sample of all, of each kSampleStride
// rows' worth of groups one row's.
// With spans, groups that are not wanted may have lower scores than they do without; all others
// have the same. Returns the share of rows that were scored: 1 without spans.
double scan_best(const CodedKeys& keys, const Spans* spans, const QueryView& query, float scaling,
                 const int64_t* ids, int64_t count, const Wanted& wanted, float* out);

constexpr int64_t kSampledFrom = 1024;
constexpr int64_t kSampleStride = 16;

}  // namespace kvswap
