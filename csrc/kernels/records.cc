#include "kernels/records.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "common/parallel.h"

namespace kvswap {
namespace {

constexpr int64_t kLeastBytes = 1 << 18;       // a thread's worth of copying
constexpr int64_t kLeastCodedBytes = 1 << 15;  // and of codes
constexpr int64_t kLeastNumbers = 1 << 16;

int threads_for(int64_t work, int64_t least) {
  return static_cast<int>(std::clamp<int64_t>(work / least, 1, num_threads()));
}

// One head's tokens of one group.
void copy_tokens(const char* from, int64_t stride_bytes, int64_t count, size_t nbytes, char* to) {
  if (stride_bytes == static_cast<int64_t>(nbytes)) {
    std::memcpy(to, from, nbytes * static_cast<size_t>(count));
    return;
  }
  for (int64_t t = 0; t < count; ++t, from += stride_bytes, to += nbytes) {
    std::memcpy(to, from, nbytes);
  }
}

// Calls body(record, is_values, head, thread's scratch) for every head of every record.
template <class F>
void each_head(const Records& records, int64_t least_bytes, F&& body) {
  const RecordShape& shape = records.shape;
  const int64_t bytes = records.count * shape.kv_heads * shape.group_size * shape.head_dim * 4;
  parallel(threads_for(bytes, least_bytes), [&](int thread, int total) {
    const bool is_raw = shape.codec == Codec::raw;
    std::vector<float> scratch(is_raw ? 0 : static_cast<size_t>(3 * shape.head_dim));
    const int64_t end = records.count * (thread + 1) / total;
    for (int64_t group = records.count * thread / total; group < end; ++group) {
      for (const bool is_values : {false, true}) {
        for (int64_t head = 0; head < shape.kv_heads; ++head) {
          body(group, is_values, head, scratch.data());
        }
      }
    }
  });
}

// Where a record holds a head's keys, or values.
char* place(const Records& records, int64_t group, bool is_values, int64_t head) {
  const RecordShape& shape = records.shape;
  return records.first + group * records.stride_bytes + is_values * shape.half_bytes() +
         head * shape.head_bytes();
}

CodedTokens coded_tokens(const Records& records, bool is_values, int64_t head, int64_t stride,
                         float* scratch) {
  const RecordShape& shape = records.shape;
  const int64_t row = (is_values * shape.kv_heads + head) * shape.head_dim;
  return {shape.codec,
          shape.rotation,
          shape.head_dim,
          shape.group_size,
          shape.dtype,
          stride,
          records.centre ? records.centre + row : nullptr,
          scratch};
}

}  // namespace

void pack(const TokensView& tokens, const Records& records) {
  const RecordShape& shape = records.shape;
  const bool is_raw = shape.codec == Codec::raw;
  const int64_t item = shape.dtype == Dtype::f32 ? 4 : 2;
  each_head(records, is_raw ? kLeastBytes : kLeastCodedBytes,
            [&](int64_t group, bool is_values, int64_t head, float* scratch) {
              const int64_t stride = is_values ? tokens.value_stride : tokens.key_stride;
              const int64_t heads = is_values ? tokens.value_head_stride : tokens.key_head_stride;
              const char* from = static_cast<const char*>(is_values ? tokens.values : tokens.keys) +
                                 (head * heads + group * shape.group_size * stride) * item;
              char* to = place(records, group, is_values, head);
              if (is_raw) {
                const auto row = static_cast<size_t>(shape.head_dim * item);
                copy_tokens(from, stride * item, shape.group_size, row, to);
              } else {
                kernels().encode_tokens(coded_tokens(records, is_values, head, stride, scratch),
                                        from, reinterpret_cast<uint8_t*>(to));
              }
            });
}

void unpack(const Records& records, void* keys, void* values) {
  const RecordShape& shape = records.shape;
  const int64_t item = shape.dtype == Dtype::f32 ? 4 : 2;
  const int64_t row = shape.head_dim * item, tokens = records.count * shape.group_size;
  each_head(
      records, kLeastCodedBytes, [&](int64_t group, bool is_values, int64_t head, float* scratch) {
        const char* from = place(records, group, is_values, head);
        char* to = static_cast<char*>(is_values ? values : keys) +
                   (head * tokens + group * shape.group_size) * row;
        kernels().decode_tokens(coded_tokens(records, is_values, head, shape.head_dim, scratch),
                                reinterpret_cast<const uint8_t*>(from), to);
      });
}

void merge(float* out, float* lse, const float* part, const float* part_lse, int64_t rows,
           int64_t head_dim) {
  parallel(threads_for(rows * head_dim, kLeastNumbers), [&](int thread, int total) {
    const int64_t end = rows * (thread + 1) / total;
    for (int64_t row = rows * thread / total; row < end; ++row) {
      const float top = std::max(lse[row], part_lse[row]);
      if (top == -std::numeric_limits<float>::infinity()) continue;  // neither saw anything
      const float mine = std::exp(lse[row] - top), other = std::exp(part_lse[row] - top);
      const float sum = mine + other, keep = mine / sum, take = other / sum;
      float* target = out + row * head_dim;
      const float* source = part + row * head_dim;
      for (int64_t i = 0; i < head_dim; ++i) target[i] = target[i] * keep + source[i] * take;
      lse[row] = top + std::log(sum);
    }
  });
}

}  // namespace kvswap
