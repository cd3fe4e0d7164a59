#include "kernels/attend.h"

#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "kernels/half.h"

namespace kvswap {
namespace {

// What a thread works with, kept from call to call.
struct Workspace {
  std::vector<Segment> segments;
  std::vector<const void*> query;
  std::vector<float*> out;
  std::vector<int64_t> hidden;
  std::vector<float> lse;
  std::vector<float> scratch;
};

size_t item_bytes(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

const char* at(const void* data, int64_t elements, Dtype dtype) {
  return static_cast<const char*>(data) + elements * static_cast<int64_t>(item_bytes(dtype));
}

void add_tokens(const TokensView& tokens, int64_t head, Dtype dtype, std::vector<Segment>& out) {
  if (!tokens.count) return;
  out.push_back({at(tokens.keys, head * tokens.key_head_stride, dtype),
                 at(tokens.values, head * tokens.value_head_stride, dtype), tokens.count,
                 tokens.key_stride, tokens.value_stride});
}

void gather_segments(const Slots& slots, const Attend& a, int64_t head, std::vector<Segment>& out) {
  const RecordShape& shape = slots.shape;
  const int64_t place = head * shape.head_bytes(), values = shape.half_bytes();
  const int64_t stride = shape.row_items();
  out.clear();
  for (int64_t i = 0; i < a.num_rows; ++i) {
    const char* keys = slots.pool + a.rows[i] * slots.record_bytes + place;
    out.push_back({keys, keys + values, shape.group_size, stride, stride});
  }
  add_tokens(a.rolling, head, shape.dtype, out);
  add_tokens(a.newest, head, shape.dtype, out);
}

// The query heads that share a KV head, all tokens of them.
void attend_kv_head(const Slots& slots, const Attend& a, int64_t head, Workspace& work) {
  const RecordShape& shape = slots.shape;
  const int64_t shared = a.query.num_heads / shape.kv_heads, q_len = a.query.q_len;
  const int64_t dim = shape.head_dim, in_slots = a.num_rows * shape.group_size;
  const bool is_coded = shape.codec != Codec::raw;
  gather_segments(slots, a, head, work.segments);
  work.query.clear();
  work.out.clear();
  work.hidden.clear();
  for (int64_t h = head * shared; h < (head + 1) * shared; ++h) {
    for (int64_t token = 0; token < q_len; ++token) {
      const int64_t place = h * a.query.head_stride + token * a.query.token_stride;
      work.query.push_back(at(a.query.data, place, shape.dtype));
      work.out.push_back(a.out + (h * q_len + token) * dim);
      work.hidden.push_back(a.newest.count ? q_len - 1 - token : 0);
    }
  }
  AttendHead job;
  job.segments = work.segments.data();
  job.num_segments = static_cast<int64_t>(work.segments.size());
  job.num_coded = is_coded ? a.num_rows : 0;
  job.num_coded_tokens = is_coded ? in_slots : 0;
  job.codec = shape.codec;
  job.rotation = shape.rotation;
  if (a.centre) job.centre = {a.centre + head * dim, a.centre + (shape.kv_heads + head) * dim};
  job.num_tokens = in_slots + a.rolling.count + a.newest.count;
  job.head_dim = dim;
  job.query = work.query.data();
  job.num_rows = shared * q_len;
  job.hidden = work.hidden.data();
  job.scaling = a.scaling;
  job.softcap = a.softcap;
  job.dtype = shape.dtype;
  job.out = work.out.data();
  job.lse = a.lse + head * shared * q_len;
  work.scratch.resize(
      static_cast<size_t>(scratch_floats(job.num_rows, job.num_tokens, job.head_dim)));
  job.scratch = work.scratch.data();
  kernels().attend_head(job);
}

}  // namespace

void attend(const Slots& slots, const Attend& a) {
  const int64_t heads = slots.shape.kv_heads;
  const int threads = static_cast<int>(std::min<int64_t>(num_threads(), heads));
  parallel(threads, [&](int thread, int total) {
    thread_local Workspace work;
    const int64_t begin = heads * thread / total, end = heads * (thread + 1) / total;
    for (int64_t head = begin; head < end; ++head) attend_kv_head(slots, a, head, work);
  });
}

void attend_rounded(const Slots& slots, Attend a, void* out) {
  thread_local std::vector<float> wide;
  const int64_t rows = a.query.num_heads * a.query.q_len, count = rows * slots.shape.head_dim;
  wide.resize(static_cast<size_t>(count + rows));
  a.out = wide.data();
  a.lse = wide.data() + count;
  attend(slots, a);
  switch (slots.shape.dtype) {
    case Dtype::f32: std::copy_n(a.out, count, static_cast<float*>(out)); break;
    case Dtype::bf16:
      std::transform(a.out, a.out + count, static_cast<uint16_t*>(out), to_bf16);
      break;
    case Dtype::f16:
      std::transform(a.out, a.out + count, static_cast<uint16_t*>(out), to_f16);
      break;
  }
}

}  // namespace kvswap
