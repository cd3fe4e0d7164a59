// Scores of a tile: every instruction set against the portable kernels.
#include "check.h"
#include "random.h"

using namespace kvswap;
using namespace kvswap::test;

namespace {

struct Input {
  std::vector<uint8_t> codes;
  std::vector<uint32_t> query;
  std::vector<int32_t> start;
  std::vector<uint16_t> scale;
  Code code;
  int64_t chunks, of_band[kBands];
  int quads, group_size;

  Input(Random& random, Code kind, int64_t num_chunks, int num_quads, int size)
      : start(kMaxQueries),
        scale(kTileTokens),
        code(kind),
        chunks(num_chunks),
        quads(num_quads),
        group_size(size) {
    codes.resize(static_cast<size_t>(chunks * 4 * kTileTokens));
    of_band[0] = random.between(0, chunks);
    of_band[1] = random.between(0, chunks - of_band[0]);
    of_band[2] = chunks - of_band[0] - of_band[1];
    const int64_t of_bands = of_band[0] + 2 * of_band[1] + 4 * of_band[2];
    const int64_t words = code == Code::band ? of_bands : planes_of(code) * chunks;
    query.resize(static_cast<size_t>(words * kMaxQueries));
    if (code == Code::bf16) {
      fill_halves(random, codes.data(), codes.size() / 2);
      fill_halves(random, reinterpret_cast<uint8_t*>(query.data()), query.size() * 2);
      return;
    }
    for (uint8_t& each : codes) each = static_cast<uint8_t>(random.below(256));
    for (uint32_t& word : query) {
      for (int i = 0; i < 32; i += 8) {
        word |= static_cast<uint32_t>(random.between(-127, 127) & 255) << i;
      }
    }
    for (int32_t& each : start) each = static_cast<int32_t>(random.between(-100000, 100000));
    for (uint16_t& each : scale) each = to_f16(std::fabs(random.normal()));
  }

  static void fill_halves(Random& random, uint8_t* out, size_t count) {
    for (size_t i = 0; i < count; ++i) {
      const uint16_t half = to_bf16(random.normal());
      std::memcpy(out + 2 * i, &half, 2);
    }
  }

  std::vector<float> run(const Kernels& kernels) const {
    std::vector<float> out(static_cast<size_t>(quads * 4 * (kTileTokens / group_size)), kNan);
    TileScore a{codes.data(), chunks,       {of_band[0], of_band[1], of_band[2]},
                quads,        query.data(), start.data(),
                scale.data(), group_size,   out.data()};
    kernels.score_tile(code, a);
    return out;
  }
};

}  // namespace

TEST(tiles_of_integers_score_exactly_alike_and_those_of_floats_nearly) {
  each_other([](const Kernels& other) {
    const Using named(other.name);
    Random random(10);
    for (const Code code : kAllCodes) {
      for (const int64_t chunks : {1, 2, 3, 16, 33}) {
        for (int quads = 1; quads <= kMaxQueries / 4; ++quads) {
          for (const int size : {1, 2, 4, 8, 16}) {
            const At at{{"code", static_cast<int>(code)},
                        {"chunks", chunks},
                        {"quads", quads},
                        {"group_size", size}};
            const Input input(random, code, chunks, quads, size);
            const std::vector<float> expected = input.run(kPortable), found = input.run(other);
            const double tolerance = code == Code::bf16 ? 2e-4 : 0;
            for (size_t i = 0; i < found.size(); ++i) CHECK_NEAR(found[i], expected[i], tolerance);
          }
        }
      }
    }
  });
}

// Term by term, as the header says what lies where.
TEST(a_score_is_the_start_and_all_products_times_the_scale) {
  each_name([](const char* name) {
    const Using named(name);
    Random random(11);
    for (const Code code : kAllCodes) {
      if (code == Code::bf16) continue;
      const Input input(random, code, 5, 2, 1);
      const std::vector<float> found = input.run(kernels());
      for (int token = 0; token < kTileTokens; ++token) {
        for (int q = 0; q < 8; ++q) {
          int64_t sum = input.start[static_cast<size_t>(q)];
          for (int64_t byte = 0; byte < input.chunks * 4; ++byte) {
            const auto word = [&](int64_t chunk) {
              const uint32_t four = input.query[static_cast<size_t>(chunk * kMaxQueries + q)];
              return static_cast<int8_t>(four >> (byte % 4 * 8) & 255);
            };
            const int held = input.codes[static_cast<size_t>(byte / 4 * 64 + token * 4 + byte % 4)];
            const int64_t chunk = byte / 4;
            int bits = grid_bits(code) ? grid_bits(code) : 8;
            int64_t first = 0, chunks = input.chunks;  // words before, less chunks before
            if (code == Code::band) {
              int band = 0;
              int64_t before = 0;
              for (; chunk >= before + input.of_band[band]; ++band) {
                first += (8 / kBandBits[band] - 1) * input.of_band[band];
                before += input.of_band[band];
              }
              bits = kBandBits[band];
              chunks = input.of_band[band];
            }
            for (int plane = 0; plane < 8 / bits; ++plane) {
              const int digit = (held >> (bits * plane)) & ((1 << bits) - 1);
              sum += digit * word(first + chunk + plane * chunks);
            }
          }
          const float scale =
              has_scale(code) ? from_f16(input.scale[static_cast<size_t>(token)]) : 1.0f;
          const float expected = static_cast<float>(sum) * scale;
          const int place = q / 4 * 4 * kTileTokens + token * 4 + q % 4;
          CHECK_NEAR(found[static_cast<size_t>(place)], expected, 0);
        }
      }
    }
  });
}
