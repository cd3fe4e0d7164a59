// Where a record holds what: keys then values, each [kv_head, token, head_dim].
#pragma once

#include <cstdint>

#include "kernels/api.h"

namespace kvswap {

struct RecordShape {
  int64_t group_size, kv_heads, head_dim;
  Dtype dtype;  // of tokens that are not coded
  Codec codec = Codec::raw;
  Rotation rotation{};

  // Elements of a row as an array of what the codec makes of it, and bytes of each.
  int64_t row_items() const { return codec == Codec::rot4 ? head_dim / 2 : head_dim; }
  int64_t item_bytes() const { return codec != Codec::raw ? 1 : dtype == Dtype::f32 ? 4 : 2; }
  int64_t head_bytes() const { return group_size * row_items() * item_bytes(); }
  int64_t half_bytes() const { return kv_heads * head_bytes(); }  // keys, or values
};

}  // namespace kvswap
