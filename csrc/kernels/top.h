// The positions of the largest scores.
#pragma once

#include <cstdint>

namespace kvswap {

// Writes `count` positions, ascending: all pinned ones, then those of the largest scores; of
// equal ones the first. count is at most the number of scores and at least that of the pinned.
void top_positions(const float* scores, int64_t num_scores, int64_t count, const int64_t* pinned,
                   int64_t num_pinned, int64_t* out);

}  // namespace kvswap
