#include "kernels/encode.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

#include "common/parallel.h"
#include "kernels/bands.h"
#include "kernels/half.h"

namespace kvswap {
namespace {

// As src/kvswap/kernels/coding.py has them.
constexpr float kGaussianStep8 = 0.0308f, kGaussianStep4 = 0.3352f, kGaussianStep2 = 0.9957f,
                kGaussianStep1 = 1.596f;
constexpr float kScaleLimit = 6.0e4f;
constexpr int64_t kLeastTokens = 16;  // a thread's worth

// A token's bytes and its scale.
struct Coded {
  std::vector<uint8_t> bytes;
  uint16_t scale = 0;
};

constexpr float gaussian_step(int bits) {
  switch (bits) {
    case 8: return kGaussianStep8;
    case 4: return kGaussianStep4;
    case 2: return kGaussianStep2;
    default: return kGaussianStep1;
  }
}

void round_grid(const float* x, int64_t rank, Code kind, Coded& out) {
  const int64_t length = plane_length(kind, rank);
  const auto half = static_cast<float>((grid_top(kind) + 1) / 2);
  float norm = 0;
  for (int64_t i = 0; i < rank; ++i) norm += x[i] * x[i];
  const float deviation = std::sqrt(norm) / std::sqrt(static_cast<float>(rank));
  const float step = std::max(deviation * gaussian_step(grid_bits(kind)), 1e-20f);
  float products = 0, squares = 0;
  for (int64_t i = 0; i < rank; ++i) {
    const float code = std::clamp(std::floor(x[i] / step), -half, half - 1);
    const float level = code + 0.5f;
    products += x[i] * level;
    squares += level * level;
    const int shift = static_cast<int>(i / length) * grid_bits(kind);
    out.bytes[static_cast<size_t>(i % length)] |=
        static_cast<uint8_t>(static_cast<int>(code + half) << shift);
  }
  out.scale = to_f16(std::min(products / squares, kScaleLimit));
}

// A token's deviation from those of all tokens is found first, then the scale that fits best.
void round_bands(float* x, const CodedKeys& keys, Coded& out) {
  const Bands bands = bands_of(keys);
  float norm = 0;
  for (const Band& band : bands) {
    const float grid = gaussian_step(band.bits);
    for (int64_t i = band.first; i < band.first + band.count; ++i) {
      x[i] = (x[i] - keys.offsets[i]) / keys.steps[i];
      norm += x[i] * grid * x[i] * grid;
    }
  }
  const float deviation =
      std::max(std::sqrt(norm) / std::sqrt(static_cast<float>(keys.rank)), 1e-20f);
  float products = 0, squares = 0;
  for (const Band& band : bands) {
    const float half = static_cast<float>((band.top() + 1) / 2), grid = gaussian_step(band.bits);
    uint8_t* bytes = out.bytes.data() + 4 * band.first_chunk;
    for (int64_t j = 0; j < band.count; ++j) {
      const int64_t i = band.first + j;
      const float code = std::clamp(std::floor(x[i] / deviation), -half, half - 1);
      const float level = code + 0.5f, weight = keys.steps[i] * grid;
      products += weight * x[i] * level;
      squares += weight * level * level;
      const int shift = static_cast<int>(j / band.length()) * band.bits;
      bytes[j % band.length()] |= static_cast<uint8_t>(static_cast<int>(code + half) << shift);
    }
  }
  out.scale = to_f16(std::clamp(products / squares, 0.0f, kScaleLimit));
}

void round_int8(const float* x, int64_t rank, Coded& out) {
  float top = 0;
  for (int64_t i = 0; i < rank; ++i) top = std::max(top, std::fabs(x[i]));
  out.scale = to_f16(std::min(top / 127, kScaleLimit));
  const float scale = from_f16(out.scale) == 0 ? 1.0f : from_f16(out.scale);
  for (int64_t i = 0; i < rank; ++i) {
    const float code = std::clamp(std::nearbyint(x[i] / scale), -127.0f, 127.0f);
    out.bytes[static_cast<size_t>(i)] = static_cast<uint8_t>(code + 128);
  }
}

void round_bf16(const float* x, int64_t rank, Coded& out) {
  for (int64_t i = 0; i < rank; ++i) {
    const uint16_t half = to_bf16(x[i]);
    out.bytes[static_cast<size_t>(2 * i)] = static_cast<uint8_t>(half & 255);
    out.bytes[static_cast<size_t>(2 * i + 1)] = static_cast<uint8_t>(half >> 8);
  }
}

void put(const CodedKeys& keys, uint8_t* codes, int64_t token, const Coded& coded) {
  uint8_t* tile = codes + token / kTileTokens * keys.width * kTileTokens;
  for (int64_t i = 0; i < keys.width; ++i) {
    tile[i / 4 * 4 * kTileTokens + token % kTileTokens * 4 + i % 4] =
        coded.bytes[static_cast<size_t>(i)];
  }
}

}  // namespace

void encode_groups(const CodedKeys& keys, uint8_t* codes, uint16_t* scales, const void* tokens,
                   Dtype dtype, const int64_t* ids, int64_t count) {
  const int64_t dim = keys.kv_heads * keys.head_dim, total = count * keys.group_size;
  const int64_t item = dtype == Dtype::f32 ? 4 : 2;
  const int64_t worth = std::max<int64_t>(1, total / kLeastTokens);
  parallel(static_cast<int>(std::min<int64_t>(num_threads(), worth)), [&](int thread, int all) {
    std::vector<float> wide(static_cast<size_t>(dim)), x(static_cast<size_t>(keys.rank));
    Coded coded;
    for (int64_t i = total * thread / all; i < total * (thread + 1) / all; ++i) {
      kernels().widen(static_cast<const char*>(tokens) + i * dim * item, dtype, dim, wide.data());
      std::fill(x.begin(), x.end(), 0.0f);
      kernels().project(wide.data(), dim, keys.basis, keys.rank, x.data());
      coded.bytes.assign(static_cast<size_t>(keys.width), 0);
      switch (keys.code) {
        case Code::rot4:
        case Code::rot2:
        case Code::rot1: round_grid(x.data(), keys.rank, keys.code, coded); break;
        case Code::int8: round_int8(x.data(), keys.rank, coded); break;
        case Code::bf16: round_bf16(x.data(), keys.rank, coded); break;
        case Code::band: round_bands(x.data(), keys, coded); break;
      }
      const int64_t token = ids[i / keys.group_size] * keys.group_size + i % keys.group_size;
      put(keys, codes, token, coded);
      if (scales) scales[token] = coded.scale;
    }
  });
}

}  // namespace kvswap
