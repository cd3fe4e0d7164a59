// How much attention each group of a layer can expect, from its coded keys.
#pragma once

#include <cstdint>

#include "kernels/api.h"

namespace kvswap {

// One layer's codes; `width` bytes a token, a multiple of four, in tiles of sixteen tokens.
struct CodedKeys {
  Code code;
  const uint8_t* codes;     // [tiles][width / 4][16][4]
  const uint16_t* scales;   // [tiles][16] float16; null for bf16
  const Bf16* basis;        // [kv_heads * head_dim][rank], of keys
  const Bf16* query_basis;  // and of queries; often the same
  int64_t width, rank, group_size, num_groups, kv_heads, head_dim;
  // For band alone, [rank] each: what is taken off keys' coefficients, and the distance of the
  // levels of each; and how many coefficients each band has, `rank` in all.
  const float* offsets = nullptr;
  const float* steps = nullptr;
  int64_t counts[kBands] = {};
};

// [num_heads, q_len, head_dim] with strides in elements, the last one 1.
struct QueryView {
  const void* data;
  Dtype dtype;
  int64_t num_heads, q_len, head_stride, token_stride;
};

// out[i]: the most that any query gives group ids[i], against what it gives all of them, and less
// where it attends to more groups than are `wanted`. Every id must be below keys.num_groups.
void scan_groups(const CodedKeys& keys, const QueryView& query, float scaling, const int64_t* ids,
                 int64_t count, int64_t wanted, float* out);

}  // namespace kvswap
