// Keys into codes: projected, rounded, put where the tiles want them.
#pragma once

#include <cstdint>

#include "kernels/scan.h"

namespace kvswap {

// Writes the codes of whole groups. `tokens` holds their keys [count * group_size][dim] one
// after another; every id must be below keys.num_groups.
void encode_groups(const CodedKeys& keys, uint8_t* codes, uint16_t* scales, const void* tokens,
                   Dtype dtype, const int64_t* ids, int64_t count);

}  // namespace kvswap
