// Keys and values laid out as records, and attention over parts brought together.
#pragma once

#include <cstdint>

#include "kernels/attend.h"

namespace kvswap {

// Records of whole groups: K then V, each [kv_head, token, head_dim].
struct Records {
  char* first;
  int64_t stride_bytes;  // from record to record
  int64_t count, group_size, kv_heads, head_dim;
  Dtype dtype;
};

// Lays consecutive groups of tokens out as records.
void pack(const TokensView& tokens, const Records& records);

// Takes attention over one more part into attention over all parts before; both are
// [rows, head_dim], each row with the log of its softmax sum.
void merge(float* out, float* lse, const float* part, const float* part_lse, int64_t rows,
           int64_t head_dim);

}  // namespace kvswap
