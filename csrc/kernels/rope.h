// Rotary position embedding of queries, halves of a head turned against each other.
#pragma once

#include <cstdint>

#include "kernels/api.h"

namespace kvswap {

// out[token][head] = x * cos + rotate_half(x) * sin, rounded to the dtype after each step, as
// tensors of it are. x and out: [tokens][heads][dim]; cos and sin: [tokens][dim].
void rotate(const void* x, const void* cos, const void* sin, int64_t tokens, int64_t heads,
            int64_t dim, Dtype dtype, void* out);

}  // namespace kvswap
