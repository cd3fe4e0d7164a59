#include "kernels/records.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "common/parallel.h"

namespace kvswap {
namespace {

constexpr int64_t kLeastBytes = 1 << 18;  // a thread's worth
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

}  // namespace

void pack(const TokensView& tokens, const Records& records) {
  const int64_t item = records.dtype == Dtype::f32 ? 4 : 2;
  const auto row = static_cast<size_t>(records.head_dim * item);
  const int64_t head_bytes = records.group_size * records.head_dim * item;
  const auto pack_part = [&](const void* data, int64_t head_stride, int64_t stride, int64_t group,
                             char* to) {
    const char* from = static_cast<const char*>(data) + group * records.group_size * stride * item;
    for (int64_t head = 0; head < records.kv_heads; ++head, to += head_bytes) {
      copy_tokens(from + head * head_stride * item, stride * item, records.group_size, row, to);
    }
  };
  const int64_t bytes = records.count * records.kv_heads * head_bytes * 2;
  parallel(threads_for(bytes, kLeastBytes), [&](int thread, int total) {
    const int64_t end = records.count * (thread + 1) / total;
    for (int64_t group = records.count * thread / total; group < end; ++group) {
      char* to = records.first + group * records.stride_bytes;
      pack_part(tokens.keys, tokens.key_head_stride, tokens.key_stride, group, to);
      pack_part(tokens.values, tokens.value_head_stride, tokens.value_stride, group,
                to + records.kv_heads * head_bytes);
    }
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
