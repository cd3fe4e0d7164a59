// The positions of the largest scores.
#pragma once

#include <cstdint>
#include <vector>

namespace kvswap {

// Writes `count` positions, ascending: all pinned ones, then those of the largest scores; of
// equal ones the first. count is at most the number of scores and at least that of the pinned.
void top_positions(const float* scores, int64_t num_scores, int64_t count, const int64_t* pinned,
                   int64_t num_pinned, int64_t* out);

// The largest number that at least `count` of the scores reach, or any that exactly so many do;
// minus infinity where they are fewer.
float nth_largest(const std::vector<float>& scores, int64_t count);

// Lets every score below `least` fall behind all others, except those at `kept` positions;
// what is no position is skipped.
void discourage(float* scores, int64_t num_scores, const int32_t* kept, int64_t num_kept,
                float least);

}  // namespace kvswap
