#include "kernels/bindings.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>

#include "common/parallel.h"
#include "kernels/api.h"
#include "kernels/attend.h"
#include "kernels/encode.h"
#include "kernels/records.h"
#include "kernels/rope.h"
#include "kernels/scan.h"
#include "kernels/spans.h"
#include "kernels/top.h"

namespace nb = nanobind;

namespace kvswap {
namespace {

// Tensors cross as addresses: what Python checks once need not be unpacked at every call.
template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Ids = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void check_below(const int64_t* ids, int64_t count, int64_t end, const char* what) {
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= end) throw std::invalid_argument(what);
  }
}

void check_heads(int64_t num_heads, int64_t kv_heads) {
  if (num_heads < 1 || num_heads % kv_heads) {
    throw std::invalid_argument("query heads must be a multiple of the KV heads");
  }
}

class Scanner {
 public:
  Scanner(int code, uintptr_t codes, uintptr_t scales, uintptr_t basis, uintptr_t query_basis,
          uintptr_t offsets, uintptr_t steps, std::array<int64_t, kBands> counts, int64_t width,
          int64_t rank, int64_t group_size, int64_t num_groups, int64_t kv_heads, int64_t head_dim)
      : codes_(pointer<uint8_t>(codes)),
        scales_(pointer<uint16_t>(scales)),
        keys_{static_cast<Code>(code),
              pointer<const uint8_t>(codes),
              pointer<const uint16_t>(scales),
              pointer<const Bf16>(basis),
              pointer<const Bf16>(query_basis),
              width,
              rank,
              group_size,
              num_groups,
              kv_heads,
              head_dim,
              pointer<const float>(offsets),
              pointer<const float>(steps),
              {counts[0], counts[1], counts[2]}} {}

  void scan(uintptr_t query, int dtype, int64_t num_heads, int64_t q_len, int64_t head_stride,
            int64_t token_stride, float scaling, Ids ids, int64_t wanted, uintptr_t out) const {
    const auto count = static_cast<int64_t>(ids.shape(0));
    const int64_t* data = ids.data();
    const QueryView view{pointer<const void>(query),
                         static_cast<Dtype>(dtype),
                         num_heads,
                         q_len,
                         head_stride,
                         token_stride};
    nb::gil_scoped_release released;
    check_heads(num_heads, keys_.kv_heads);
    check_below(data, count, keys_.num_groups, "group ids must be those of this index");
    scan_groups(keys_, view, scaling, data, count, wanted, pointer<float>(out));
  }

  void hold_spans(uintptr_t codes, uintptr_t scales, uintptr_t radii) {
    spans_ = {pointer<uint8_t>(codes), pointer<uint16_t>(scales), pointer<float>(radii)};
  }

  void bound(Ids ids) const {
    const auto count = static_cast<int64_t>(ids.shape(0));
    const int64_t* data = ids.data();
    nb::gil_scoped_release released;
    check_spans();
    check_below(data, count, keys_.num_groups, "group ids must be those of this index");
    bound_spans(keys_, spans_, data, count);
  }

  // query: as an Attender's, with the dtype in front.
  double best(const nb::tuple& query, float scaling, Ids ids, int64_t wanted, Table kept,
              bool by_spans, uintptr_t out) const {
    const auto count = static_cast<int64_t>(ids.shape(0));
    const int64_t* data = ids.data();
    const QueryView view{pointer<const void>(nb::cast<uintptr_t>(query[1])),
                         static_cast<Dtype>(nb::cast<int>(query[0])),
                         nb::cast<int64_t>(query[2]),
                         nb::cast<int64_t>(query[3]),
                         nb::cast<int64_t>(query[4]),
                         nb::cast<int64_t>(query[5])};
    nb::gil_scoped_release released;
    check_heads(view.num_heads, keys_.kv_heads);
    if (by_spans) check_spans();
    check_below(data, count, keys_.num_groups, "group ids must be those of this index");
    const Wanted asked{wanted, kept.data(), static_cast<int64_t>(kept.shape(0))};
    return scan_best(keys_, by_spans ? &spans_ : nullptr, view, scaling, data, count, asked,
                     pointer<float>(out));
  }

  void encode(uintptr_t tokens, int dtype, Ids ids) const {
    const auto count = static_cast<int64_t>(ids.shape(0));
    const int64_t* data = ids.data();
    nb::gil_scoped_release released;
    check_below(data, count, keys_.num_groups, "group ids must be those of this index");
    encode_groups(keys_, codes_, scales_, pointer<const void>(tokens), static_cast<Dtype>(dtype),
                  data, count);
  }

 private:
  void check_spans() const {
    if (!spans_.radii) throw std::invalid_argument("spans must be held first");
  }

  uint8_t* codes_;
  uint16_t* scales_;
  CodedKeys keys_;
  Spans spans_{};
};

// Address of keys, of values, count, strides of keys' heads and tokens, of values'.
TokensView tokens_view(const nb::tuple& t) {
  return {pointer<const void>(nb::cast<uintptr_t>(t[0])),
          pointer<const void>(nb::cast<uintptr_t>(t[1])),
          nb::cast<int64_t>(t[2]),
          nb::cast<int64_t>(t[3]),
          nb::cast<int64_t>(t[4]),
          nb::cast<int64_t>(t[5]),
          nb::cast<int64_t>(t[6])};
}

// group_size, kv_heads, head_dim, dtype, codec, addresses of factors and of the matrix.
RecordShape record_shape(const nb::tuple& t) {
  return {nb::cast<int64_t>(t[0]),
          nb::cast<int64_t>(t[1]),
          nb::cast<int64_t>(t[2]),
          static_cast<Dtype>(nb::cast<int>(t[3])),
          static_cast<Codec>(nb::cast<int>(t[4])),
          {pointer<const float>(nb::cast<uintptr_t>(t[5])),
           pointer<const float>(nb::cast<uintptr_t>(t[6]))}};
}

class Attender {
 public:
  Attender(uintptr_t pool, int64_t num_slots, int64_t record_bytes, const nb::tuple& shape)
      : slots_{pointer<const char>(pool), record_bytes, record_shape(shape)},
        num_slots_(num_slots) {}

  // query: address, num_heads, q_len, strides of head and token.
  void attend(const nb::tuple& query, Ids rows, const nb::tuple& rolling, const nb::tuple& newest,
              uintptr_t centre, float scaling, float softcap, uintptr_t out, uintptr_t lse) const {
    Attend a;
    a.centre = pointer<const float>(centre);
    a.query = {pointer<const void>(nb::cast<uintptr_t>(query[0])),
               slots_.shape.dtype,
               nb::cast<int64_t>(query[1]),
               nb::cast<int64_t>(query[2]),
               nb::cast<int64_t>(query[3]),
               nb::cast<int64_t>(query[4])};
    a.rows = rows.data();
    a.num_rows = static_cast<int64_t>(rows.shape(0));
    a.rolling = tokens_view(rolling);
    a.newest = tokens_view(newest);
    a.scaling = scaling;
    a.softcap = softcap;
    a.out = pointer<float>(out);
    a.lse = pointer<float>(lse);
    nb::gil_scoped_release released;
    check_heads(a.query.num_heads, slots_.shape.kv_heads);
    if (a.newest.count && a.newest.count != a.query.q_len) {
      throw std::invalid_argument("newest must be none or the query's own tokens");
    }
    check_below(a.rows, a.num_rows, num_slots_, "rows must be slots");
    kvswap::attend(slots_, a);
  }

  // One new token: query [num_heads, head_dim], key and value [kv_heads, head_dim] by address
  // and stride of the head; rolling [2, kv_heads, room, head_dim] holds `length` tokens, and is
  // given the new one behind them.
  void decode(uintptr_t query, int64_t num_heads, int64_t query_stride, Ids groups, Table row_of,
              uintptr_t rolling, int64_t room, int64_t length, uintptr_t key, int64_t key_stride,
              uintptr_t value, int64_t value_stride, uintptr_t centre, float scaling, float softcap,
              uintptr_t out) const {
    const auto count = static_cast<int64_t>(groups.shape(0));
    const auto num_groups = static_cast<int64_t>(row_of.shape(0));
    const int64_t* wanted = groups.data();
    const int32_t* table = row_of.data();
    nb::gil_scoped_release released;
    check_heads(num_heads, slots_.shape.kv_heads);
    check_below(wanted, count, num_groups, "groups must be those of the table");
    if (length < 0 || length >= room) throw std::invalid_argument("rolling must have room");
    thread_local std::vector<int64_t> rows;
    rows.resize(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) rows[static_cast<size_t>(i)] = table[wanted[i]];
    check_below(rows.data(), count, num_slots_, "groups must lie in slots");
    const int64_t dim = slots_.shape.head_dim, item = slots_.shape.dtype == Dtype::f32 ? 4 : 2;
    char* held = pointer<char>(rolling);
    const int64_t half = slots_.shape.kv_heads * room * dim * item;
    const auto append = [&](char* to, uintptr_t from, int64_t stride) {
      for (int64_t head = 0; head < slots_.shape.kv_heads; ++head) {
        std::memcpy(to + (head * room + length) * dim * item,
                    pointer<const char>(from) + head * stride * item,
                    static_cast<size_t>(dim * item));
      }
    };
    append(held, key, key_stride);
    append(held + half, value, value_stride);
    Attend a{};
    a.query = {pointer<const void>(query), slots_.shape.dtype, num_heads, 1, query_stride, dim};
    a.rows = rows.data();
    a.num_rows = count;
    a.rolling = {held, held + half, length + 1, room * dim, dim, room * dim, dim};
    a.centre = pointer<const float>(centre);
    a.scaling = scaling;
    a.softcap = softcap;
    attend_rounded(slots_, a, pointer<void>(out));
  }

 private:
  Slots slots_;
  int64_t num_slots_;
};

using Positions = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void top(uintptr_t scores, int64_t num_scores, Ids pinned, Positions out) {
  const auto count = static_cast<int64_t>(out.shape(0));
  const auto num_pinned = static_cast<int64_t>(pinned.shape(0));
  const int64_t* first = pinned.data();
  int64_t* target = out.data();
  nb::gil_scoped_release released;
  if (count > num_scores || num_pinned > count) {
    throw std::invalid_argument("count must lie between the pinned and all positions");
  }
  check_below(first, num_pinned, num_scores, "pinned must be positions of scores");
  top_positions(pointer<const float>(scores), num_scores, count, first, num_pinned, target);
}

void discourage_scores(uintptr_t scores, int64_t num_scores, Table kept, float least) {
  const auto count = static_cast<int64_t>(kept.shape(0));
  discourage(pointer<float>(scores), num_scores, kept.data(), count, least);
}

void rotate_queries(uintptr_t x, uintptr_t cos, uintptr_t sin, int64_t tokens, int64_t heads,
                    int64_t dim, int dtype, uintptr_t out) {
  rotate(pointer<const void>(x), pointer<const void>(cos), pointer<const void>(sin), tokens, heads,
         dim, static_cast<Dtype>(dtype), pointer<void>(out));
}

void pack_records(const nb::tuple& tokens, uintptr_t records, int64_t stride_bytes, int64_t count,
                  const nb::tuple& shape, uintptr_t centre) {
  const TokensView view = tokens_view(tokens);
  const Records all{pointer<char>(records), stride_bytes, count, record_shape(shape),
                    pointer<const float>(centre)};
  if (view.count != count * all.shape.group_size) {
    throw std::invalid_argument("tokens must fill the records");
  }
  nb::gil_scoped_release released;
  pack(view, all);
}

void unpack_records(uintptr_t records, int64_t stride_bytes, int64_t count, const nb::tuple& shape,
                    uintptr_t centre, uintptr_t keys, uintptr_t values) {
  const Records all{pointer<char>(records), stride_bytes, count, record_shape(shape),
                    pointer<const float>(centre)};
  if (all.shape.codec == Codec::raw) throw std::invalid_argument("records must be coded");
  nb::gil_scoped_release released;
  unpack(all, pointer<void>(keys), pointer<void>(values));
}

void merge_parts(uintptr_t out, uintptr_t lse, uintptr_t part, uintptr_t part_lse, int64_t rows,
                 int64_t head_dim) {
  nb::gil_scoped_release released;
  merge(pointer<float>(out), pointer<float>(lse), pointer<const float>(part),
        pointer<const float>(part_lse), rows, head_dim);
}

std::vector<std::string> names() {
  std::vector<std::string> found;
  for (const Kernels* const* each = all_kernels(); *each; ++each) {
    if ((*each)->is_there()) found.emplace_back((*each)->name);
  }
  return found;
}

}  // namespace

void bind_kernels(nb::module_& m) {
  m.def("kernel_names", names, "Instruction sets whose kernels run here, best first.");
  m.def("kernel_name", [] { return std::string(kernels().name); }, "The one in use.");
  m.def(
      "use_kernels", [](const std::string& name) { return use_kernels(name.c_str()); },
      nb::arg("name"), "Use another; False where it does not run here.");
  m.def("num_threads", num_threads, "Threads that kernels share their work over.");
  m.def("top", top, nb::arg("scores"), nb::arg("num_scores"), nb::arg("pinned"),
        nb::arg("out").noconvert(),  // a copy of another type would be filled in its place
        "Fill out with the positions of the pinned and the largest scores, ascending.");
  m.def("discourage", discourage_scores, nb::arg("scores"), nb::arg("num_scores"), nb::arg("kept"),
        nb::arg("least"), "Let scores below the least fall behind, by address.");
  m.def("pack", pack_records, nb::arg("tokens"), nb::arg("records"), nb::arg("stride_bytes"),
        nb::arg("count"), nb::arg("shape"), nb::arg("centre"),
        "Lay consecutive groups of tokens out as records, by address.");
  m.def("unpack", unpack_records, nb::arg("records"), nb::arg("stride_bytes"), nb::arg("count"),
        nb::arg("shape"), nb::arg("centre"), nb::arg("keys"), nb::arg("values"),
        "Give the tokens of coded records, by address.");
  m.def("merge", merge_parts, nb::arg("out"), nb::arg("lse"), nb::arg("part"), nb::arg("part_lse"),
        nb::arg("rows"), nb::arg("head_dim"),
        "Take attention over one more part into attention over others, by address.");
  m.def("rotate", rotate_queries, nb::arg("query"), nb::arg("cos"), nb::arg("sin"),
        nb::arg("num_tokens"), nb::arg("num_heads"), nb::arg("head_dim"), nb::arg("dtype"),
        nb::arg("out"), "Rotate queries [num_tokens, num_heads, head_dim], by address.");
  nb::class_<Scanner>(m, "Scanner", "One layer's coded keys, by address.")
      .def(nb::init<int, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t,
                    std::array<int64_t, kBands>, int64_t, int64_t, int64_t, int64_t, int64_t,
                    int64_t>(),
           nb::arg("code"), nb::arg("codes"), nb::arg("scales"), nb::arg("basis"),
           nb::arg("query_basis"), nb::arg("offsets"), nb::arg("steps"), nb::arg("counts"),
           nb::arg("width"), nb::arg("rank"), nb::arg("group_size"), nb::arg("num_groups"),
           nb::arg("num_kv_heads"), nb::arg("head_dim"))
      .def("scan", &Scanner::scan, nb::arg("query"), nb::arg("dtype"), nb::arg("num_heads"),
           nb::arg("q_len"), nb::arg("head_stride"), nb::arg("token_stride"), nb::arg("scaling"),
           nb::arg("ids"), nb::arg("wanted"), nb::arg("out"))
      .def("encode", &Scanner::encode, nb::arg("tokens"), nb::arg("dtype"), nb::arg("ids"))
      .def("hold_spans", &Scanner::hold_spans, nb::arg("codes"), nb::arg("scales"),
           nb::arg("radii"))
      .def("bound", &Scanner::bound, nb::arg("ids"))
      .def("best", &Scanner::best, nb::arg("query"), nb::arg("scaling"), nb::arg("ids"),
           nb::arg("wanted"), nb::arg("kept"), nb::arg("by_spans"), nb::arg("out"),
           "Score groups, by spans only those that can be among the best; return their share.");
  nb::class_<Attender>(m, "Attender", "The slots of all layers, by address.")
      .def(nb::init<uintptr_t, int64_t, int64_t, const nb::tuple&>(), nb::arg("pool"),
           nb::arg("num_slots"), nb::arg("record_bytes"), nb::arg("shape"))
      .def("attend", &Attender::attend, nb::arg("query"), nb::arg("rows"), nb::arg("rolling"),
           nb::arg("newest"), nb::arg("centre"), nb::arg("scaling"), nb::arg("softcap"),
           nb::arg("out"), nb::arg("lse"))
      .def("decode", &Attender::decode, nb::arg("query"), nb::arg("num_heads"),
           nb::arg("query_stride"), nb::arg("groups"), nb::arg("row_of"), nb::arg("rolling"),
           nb::arg("room"), nb::arg("length"), nb::arg("key"), nb::arg("key_stride"),
           nb::arg("value"), nb::arg("value_stride"), nb::arg("centre"), nb::arg("scaling"),
           nb::arg("softcap"), nb::arg("out"));
}

}  // namespace kvswap
