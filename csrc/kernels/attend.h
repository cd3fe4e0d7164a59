// Decode attention straight over reuse slots, rolling buffer and new tokens.
#pragma once

#include <cstdint>

#include "kernels/api.h"
#include "kernels/record_shape.h"
#include "kernels/scan.h"

namespace kvswap {

// Groups in slots.
struct Slots {
  const char* pool;
  int64_t record_bytes;
  RecordShape shape;
};

// [kv_heads, count, head_dim] with strides in elements, the last one 1.
struct TokensView {
  const void* keys;
  const void* values;
  int64_t count, key_head_stride, key_stride, value_head_stride, value_stride;
};

struct Attend {
  QueryView query;
  const int64_t* rows;  // slots attended to
  int64_t num_rows;
  TokensView rolling;
  TokensView newest;    // the query's own tokens: none sees a later one
  const float* centre;  // [keys, values][kv_heads][head_dim] of coded slots, or null
  float scaling, softcap;
  float* out;  // [num_heads, q_len, head_dim]
  float* lse;  // [num_heads, q_len]
};

void attend(const Slots& slots, const Attend& a);

// Attention of one new token, rounded to the slots' dtype: [num_heads, head_dim]. `out` and
// `lse` of `a` are not used.
void attend_rounded(const Slots& slots, Attend a, void* out);

}  // namespace kvswap
