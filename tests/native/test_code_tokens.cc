// Tokens into codes and back, and attention to codes: against what they stand for.
#include "check.h"
#include "kernels/records.h"
#include "kernels/scales.h"
#include "random.h"

using namespace kvswap;
using namespace kvswap::test;

namespace {

constexpr int64_t kDims[] = {16, 24, 40, 64, 80, 128};

// A rotation of signs, and of Hadamard's matrix or, for other lengths, a reflection.
struct Turn {
  std::vector<float> factors, matrix;

  Turn(Random& random, int64_t dim) {
    const bool is_power = (dim & (dim - 1)) == 0;
    const float size = is_power ? 1 / std::sqrt(static_cast<float>(dim)) : 1;
    for (int64_t i = 0; i < dim; ++i) factors.push_back(random.below(2) ? size : -size);
    if (is_power) return;
    matrix.assign(static_cast<size_t>(dim * dim), -2 / static_cast<float>(dim));
    for (int64_t i = 0; i < dim; ++i) matrix[static_cast<size_t>(i * (dim + 1))] += 1;
  }
  Rotation view() const { return {factors.data(), matrix.empty() ? nullptr : matrix.data()}; }
};

RecordShape some_shape(Random& random, Codec codec, int64_t dim, const Turn& turn) {
  return {random.one_of<int64_t>({1, 2, 4, 8}),
          random.between(1, 3),
          dim,
          random.one_of({Dtype::f32, Dtype::bf16, Dtype::f16}),
          codec,
          turn.view()};
}

// Records of random tokens, exactly as long as they are.
struct Packed {
  RecordShape shape;
  int64_t count;
  Numbers keys, values;
  std::vector<uint8_t> bytes;
  std::vector<float> centre;  // every second time

  Packed(Random& random, const RecordShape& s, int64_t n) : shape(s), count(n) {
    if (random.below(2)) {
      centre.resize(static_cast<size_t>(2 * s.kv_heads * s.head_dim));
      for (float& each : centre) each = random.normal() / 4;
    }
    const auto draw = [&] { return random.normal(); };
    const int64_t items = count * shape.group_size * shape.kv_heads * shape.head_dim;
    keys = numbers(shape.dtype, items, draw);
    values = numbers(shape.dtype, items, draw);
    pack_again();
  }
  int64_t tokens() const { return count * shape.group_size; }
  int64_t record_bytes() const { return 2 * shape.half_bytes(); }
  Records records() {
    return {reinterpret_cast<char*>(bytes.data()), record_bytes(), count, shape,
            centre.empty() ? nullptr : centre.data()};
  }
  void pack_again() {
    const int64_t heads = tokens() * shape.head_dim, dim = shape.head_dim;
    bytes.assign(static_cast<size_t>(count * record_bytes()), 0xa5);
    pack({keys.bytes.data(), values.bytes.data(), tokens(), heads, dim, heads, dim}, records());
  }
  // Keys, then values, [2][kv_head][token][head_dim] as float32.
  std::vector<float> unpacked() {
    RecordShape wide = shape;
    wide.dtype = Dtype::f32;
    std::vector<float> made(2 * keys.plain.size());
    Records all = records();
    all.shape = wide;
    unpack(all, made.data(), made.data() + keys.plain.size());
    return made;
  }
};

double lost(const std::vector<float>& found, const Numbers& keys, const Numbers& values) {
  double error = 0, size = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    const size_t n = keys.plain.size();
    const float x = i < n ? keys.plain[i] : values.plain[i - n];
    error += static_cast<double>(found[i] - x) * (found[i] - x);
    size += static_cast<double>(x) * x;
  }
  return std::sqrt(error / size);
}

}  // namespace

TEST(codes_keep_what_tokens_are) {
  each_name([](const char* name) {
    const Using named(name);
    Random random(90);
    for (const Codec codec : {Codec::int8, Codec::rot4}) {
      for (const int64_t dim : kDims) {
        const At at{{"codec", static_cast<int>(codec)}, {"head_dim", dim}};
        const Turn turn(random, dim);
        Packed packed(random, some_shape(random, codec, dim, turn), random.between(1, 9));
        CHECK(lost(packed.unpacked(), packed.keys, packed.values) <
              (codec == Codec::int8 ? 0.012 : 0.16));
      }
    }
  });
}

TEST(every_instruction_set_reads_the_same_of_codes) {
  Random random(91);
  for (const Codec codec : {Codec::int8, Codec::rot4}) {
    for (const int64_t dim : kDims) {
      const At at{{"codec", static_cast<int>(codec)}, {"head_dim", dim}};
      const Turn turn(random, dim);
      Packed packed(random, some_shape(random, codec, dim, turn), 3);
      each_name([&](const char* name) {
        std::vector<float> expected, found;
        {
          const Using named("portable");
          expected = packed.unpacked();
        }
        const Using named(name);
        found = packed.unpacked();
        for (size_t i = 0; i < found.size(); ++i) CHECK_NEAR(found[i], expected[i], 1e-5);
      });
    }
  }
}

TEST(a_token_that_is_no_number_leaves_none_and_the_others_alone) {
  each_name([](const char* name) {
    const Using named(name);
    Random random(92);
    for (const Codec codec : {Codec::int8, Codec::rot4}) {
      for (const int64_t dim : kDims) {
        const At at{{"codec", static_cast<int>(codec)}, {"head_dim", dim}};
        const Turn turn(random, dim);
        RecordShape shape = some_shape(random, codec, dim, turn);
        shape.dtype = Dtype::f32;
        Packed packed(random, shape, 2);
        const auto wrong = static_cast<size_t>(dim + random.below(dim));  // of the second token
        std::memcpy(packed.keys.bytes.data() + 4 * wrong, &kNan, 4);
        packed.pack_again();
        const std::vector<float> found = packed.unpacked();
        for (size_t i = 0; i < found.size(); ++i) {
          const bool is_wrong = i / static_cast<size_t>(dim) == 1;
          CHECK(std::isnan(found[i]) == is_wrong);
        }
      }
    }
  });
}

TEST(codes_spell_any_scale) {
  Random random(94);
  for (int scale = 0; scale < 256; ++scale) {
    const float expected = kScales[static_cast<size_t>(scale)];
    for (const int64_t row : {8, 12, 16, 32, 40, 128}) {
      // Whatever the others say: the first of each column makes up for them.
      std::vector<uint8_t> codes(static_cast<size_t>(row));
      for (uint8_t& each : codes) each = static_cast<uint8_t>(random.below(256));
      for (const int codes_in_byte : {1, 2}) {
        for (int64_t column = 0; column < 8; ++column) {
          int odd = scale >> column & 1;
          for (int64_t i = column; i < 8 * spelling_words(row); i += 8) {
            const uint8_t each = codes[static_cast<size_t>(i)];
            odd ^= (each ^ (codes_in_byte == 2 ? each >> 4 : 0)) & 1;
          }
          codes[static_cast<size_t>(column)] ^= static_cast<uint8_t>(odd);
        }
        const float found =
            codes_in_byte == 1 ? scale_of<1>(codes.data(), row) : scale_of<2>(codes.data(), row);
        CHECK(found == expected || (std::isnan(found) && scale == 255));
      }
    }
    CHECK(scale < 2 || scale == 255 || expected > kScales[static_cast<size_t>(scale - 1)]);
  }
}

TEST(attention_to_coded_slots_is_attention_to_what_they_stand_for) {
  each_name([](const char* name) {
    const Using named(name);
    Random random(93);
    for (const Codec codec : {Codec::int8, Codec::rot4}) {
      for (const int64_t dim : kDims) {
        for (const int64_t shared : {1, 3, 4}) {
          const At at{{"codec", static_cast<int>(codec)}, {"head_dim", dim}, {"shared", shared}};
          const Turn turn(random, dim);
          RecordShape shape = some_shape(random, codec, dim, turn);
          shape.dtype = Dtype::f32;
          Packed packed(random, shape, 4);
          const std::vector<float> plain = packed.unpacked();
          // The same tokens in raw records.
          RecordShape raw = shape;
          raw.codec = Codec::raw;
          const int64_t heads = packed.tokens() * dim;
          std::vector<float> slots(plain.size());
          pack({plain.data(), plain.data() + plain.size() / 2, packed.tokens(), heads, dim, heads,
                dim},
               {reinterpret_cast<char*>(slots.data()), 2 * raw.half_bytes(), 4, raw});
          const int64_t num_heads = shared * shape.kv_heads;
          const auto draw = [&] { return random.normal(); };
          const Numbers query = numbers(Dtype::f32, num_heads * dim, draw);
          const Numbers rolling = numbers(Dtype::f32, shape.kv_heads * 3 * dim, draw);
          const std::vector<int64_t> rows{2, 0, 3};
          const auto run = [&](const char* pool, const RecordShape& s, const float* centre) {
            std::vector<float> out(static_cast<size_t>(num_heads * (dim + 1)));
            Attend a{};
            a.query = {query.bytes.data(), Dtype::f32, num_heads, 1, dim, dim};
            a.rows = rows.data();
            a.num_rows = 3;
            a.rolling = {rolling.bytes.data(), rolling.bytes.data(), 3, 3 * dim, dim, 3 * dim, dim};
            a.centre = centre;
            a.scaling = 1 / std::sqrt(static_cast<float>(dim));
            a.out = out.data();
            a.lse = out.data() + num_heads * dim;
            attend({pool, 2 * s.half_bytes(), s}, a);
            return out;
          };
          const auto found = run(packed.records().first, shape, packed.records().centre);
          const auto expected = run(reinterpret_cast<const char*>(slots.data()), raw, nullptr);
          for (size_t i = 0; i < found.size(); ++i) CHECK_NEAR(found[i], expected[i], 5e-5);
        }
      }
    }
  });
}
