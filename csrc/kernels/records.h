// Keys and values laid out as records, and attention over parts brought together.
#pragma once

#include <cstdint>

#include "kernels/attend.h"

namespace kvswap {

// Records of whole groups.
struct Records {
  char* first;
  int64_t stride_bytes;  // from record to record
  int64_t count;
  RecordShape shape;
  const float* centre = nullptr;  // [keys, values][kv_heads][head_dim] of coded ones, or null
};

// Lays consecutive groups of tokens out as records, in the codec's form.
void pack(const TokensView& tokens, const Records& records);

// Gives the tokens of coded records, each [kv_head, count * group_size, head_dim].
void unpack(const Records& records, void* keys, void* values);

// Takes attention over one more part into attention over all parts before; both are
// [rows, head_dim], each row with the log of its softmax sum.
void merge(float* out, float* lse, const float* part, const float* part_lse, int64_t rows,
           int64_t head_dim);

}  // namespace kvswap
