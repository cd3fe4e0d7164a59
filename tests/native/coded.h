// An index of its own memory, whose arithmetic is exact: dyadic bases, queries and keys.
#pragma once

#include <algorithm>

#include "kernels/bands.h"
#include "kernels/encode.h"
#include "kernels/scan.h"
#include "random.h"

namespace kvswap::test {

struct Shape {
  Code code = Code::rot4;
  int64_t rank = 8, group_size = 4, num_groups = 20, kv_heads = 2, head_dim = 8;

  int64_t dim() const { return kv_heads * head_dim; }
  int64_t width() const {
    if (code == Code::bf16) return (2 * rank + 3) / 4 * 4;
    int64_t chunks = 0;
    for (const Band& band : bands()) chunks += band.chunks;
    return 4 * chunks;
  }
  // A ninth of the coefficients in eight bits, half of the others in four.
  int64_t count(int band) const {
    const int64_t wide = rank / 9, middle = (rank - wide + 1) / 2;
    return band == 0 ? wide : band == 1 ? middle : rank - wide - middle;
  }
  Bands bands() const {
    CodedKeys keys{};
    keys.code = code, keys.rank = rank;
    for (int i = 0; i < kBands; ++i) keys.counts[i] = count(i);
    return bands_of(keys);
  }
  int64_t tiles() const { return (num_groups * group_size + kTileTokens - 1) / kTileTokens; }
};

struct Index {
  Shape shape;
  std::vector<Bf16> basis, query_basis;
  std::vector<uint8_t> codes;
  std::vector<uint16_t> scales;
  std::vector<float> offsets, steps;

  Index(Random& random, const Shape& s)
      : shape(s),
        basis(basis_of(s.dim() * s.rank, [&] { return random.dyadic() / 2; })),
        query_basis(basis_of(s.dim() * s.rank, [&] { return random.dyadic() / 2; })),
        codes(static_cast<size_t>(s.tiles() * s.width() * kTileTokens), 0xa5),
        scales(has_scale(s.code) ? static_cast<size_t>(s.tiles() * kTileTokens) : 0, 0x5a5a),
        offsets(s.code == Code::band ? static_cast<size_t>(s.rank) : 0),
        steps(offsets.size()) {
    for (float& each : offsets) each = random.dyadic();
    for (float& each : steps) each = static_cast<float>(random.between(1, 4)) / 2;
  }

  CodedKeys keys() const {
    return {shape.code,
            codes.data(),
            has_scale(shape.code) ? scales.data() : nullptr,
            basis.data(),
            query_basis.data(),
            shape.width(),
            shape.rank,
            shape.group_size,
            shape.num_groups,
            shape.kv_heads,
            shape.head_dim,
            offsets.data(),
            shape.code == Code::band ? steps.data() : nullptr,
            {shape.count(0), shape.count(1), shape.count(2)}};
  }
  uint8_t& byte(int64_t token, int64_t i) {
    const int64_t tile = token / kTileTokens * shape.width() * kTileTokens;
    return codes[static_cast<size_t>(tile + i / 4 * 4 * kTileTokens + token % kTileTokens * 4 +
                                     i % 4)];
  }
  // Keys [ids * group_size][dim] into codes.
  void encode(const Numbers& tokens, const std::vector<int64_t>& ids) {
    encode_groups(keys(), codes.data(), has_scale(shape.code) ? scales.data() : nullptr,
                  tokens.bytes.data(), tokens.dtype, ids.data(), static_cast<int64_t>(ids.size()));
  }
  // What the codes of a token stand for.
  std::vector<double> decoded(int64_t token) {
    std::vector<double> made(static_cast<size_t>(shape.rank));
    for (int64_t j = 0; j < shape.rank; ++j) {
      double& x = made[static_cast<size_t>(j)];
      if (shape.code == Code::bf16) {
        const int bits = byte(token, 2 * j) | byte(token, 2 * j + 1) << 8;
        x = plain(Bf16{static_cast<uint16_t>(bits)});
        continue;
      }
      const double scale =
          has_scale(shape.code) ? from_f16(scales[static_cast<size_t>(token)]) : 1.0;
      for (const Band& band : shape.bands()) {
        const int64_t in_band = j - band.first;
        if (in_band < 0 || in_band >= band.count) continue;
        const int held = byte(token, 4 * band.first_chunk + in_band % band.length());
        const auto shift = static_cast<int>(in_band / band.length()) * band.bits;
        const double middle = shape.code == Code::int8 ? 128 : band.top() / 2.0;
        x = (((held >> shift) & band.top()) - middle) * scale;
        if (!steps.empty()) x *= static_cast<double>(steps[static_cast<size_t>(j)]);
      }
    }
    return made;
  }
};

}  // namespace kvswap::test
