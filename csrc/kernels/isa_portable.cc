#include "kernels/attend_head.h"
#include "kernels/code_tokens.h"
#include "kernels/score_rows.h"
#include "kernels/score_tile.h"
#include "kernels/simd_portable.h"

namespace kvswap {
namespace {

struct Tile {
  static constexpr int kParts = kTileTokens;
  static constexpr int kQuads = 1;
  using Codes = int64_t;  // four bytes of codes or of a query, or a sum
  using Sum = int64_t;

  static Sum start(int32_t at) { return at; }
  static Codes load(const uint8_t* p) {
    return p[0] | p[1] << 8 | p[2] << 16 | static_cast<int64_t>(p[3]) << 24;
  }
  template <int kBits, int kPlane>
  static Codes plane(Codes codes) {
    return (codes >> (kBits * kPlane)) & (0x01010101 * ((1 << kBits) - 1));
  }
  static Codes spread(uint32_t query) { return query; }
  static Sum dot(Sum sum, Codes codes, Codes query) {
    for (int i = 0; i < 32; i += 8) {
      sum += ((codes >> i) & 255) * static_cast<int8_t>((query >> i) & 255);
    }
    return sum;
  }
  static Sum dot_small(Sum sum, Codes codes, Codes query) { return dot(sum, codes, query); }
  static float to_float(Sum sum) { return static_cast<float>(sum); }
  static float dot_bf16(float sum, Codes codes, Codes query) {
    const auto part = [](Codes x, int shift) {
      const Bf16 half{static_cast<uint16_t>(x >> shift)};
      return portable::Simd::load(&half);
    };
    return sum + part(codes, 0) * part(query, 0) + part(codes, 16) * part(query, 16);
  }
  template <int kGroup>
  static void store_groups(const float (*scores)[4], float* out) {
    for (int t = 0; t < kTileTokens; ++t) {
      for (int q = 0; q < 4; ++q) {
        float& best = out[t / kGroup * 4 + q];
        best = t % kGroup && best > scores[t][q] ? best : scores[t][q];
      }
    }
  }
};

}  // namespace

using S = portable::Simd;
const Kernels kPortable = {
    "portable",       [] { return true; }, attend_head<S>,  score_tile<S, Tile>,
    project<S>,       column_sums<S>,      best_shifted<S>, count_from<S>,
    encode_tokens<S>, decode_tokens<S>,    widen<S>};

}  // namespace kvswap
