// How much attention each group of a layer can expect, from its coded keys.
#pragma once

#include <cstdint>

#include "kernels/api.h"

namespace kvswap {

// One layer's codes; `width` bytes a token, a multiple of four, in tiles of sixteen tokens.
struct CodedKeys {
  Code code;
  const uint8_t* codes;     // [tiles][width / 4][16][4]
  const uint16_t* scales;   // [tiles][16] float16; null for bf16 and band
  const Bf16* basis;        // [kv_heads * head_dim][rank], of keys
  const Bf16* query_basis;  // and of queries; often the same
  int64_t width, rank, group_size, num_groups, kv_heads, head_dim;
  const float* offsets = nullptr;  // [rank], of keys' coefficients; for band alone
};

// [num_heads, q_len, head_dim] with strides in elements, the last one 1.
struct QueryView {
  const void* data;
  Dtype dtype;
  int64_t num_heads, q_len, head_stride, token_stride;
};

// out[i]: the most that any query gives group ids[i], against what it gives all of them.
// Every id must be below keys.num_groups.
void scan_groups(const CodedKeys& keys, const QueryView& query, float scaling, const int64_t* ids,
                 int64_t count, float* out);

}  // namespace kvswap
