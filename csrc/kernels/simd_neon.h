// Four floats at a time: ARM, without extensions.
#pragma once

#include <arm_neon.h>

#include <cstring>

#include "kernels/simd_portable.h"

namespace kvswap {
namespace {
namespace neon {

struct Simd {
  using Reg = float32x4_t;
  static constexpr int kLanes = 4;
  static constexpr int kVectors = 8;
  static constexpr int kRows = 2;

  static Reg zero() { return vdupq_n_f32(0.0f); }
  static Reg set1(float x) { return vdupq_n_f32(x); }
  static Reg load(const float* p) { return vld1q_f32(p); }
  static Reg load(const Bf16* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16));
  }
  static Reg load(const F16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))); }
  static uint8x8_t load_four(const void* p) {
    uint32_t four;
    std::memcpy(&four, p, 4);
    return vreinterpret_u8_u32(vdup_n_u32(four));
  }
  static Reg load(const int8_t* p) {
    const int16x8_t wide = vmovl_s8(vreinterpret_s8_u8(load_four(p)));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
  }
  static void load(const Nibbles* p, Reg* low, Reg* high) {
    const uint32x4_t wide = vmovl_u16(vget_low_u16(vmovl_u8(load_four(p))));
    *low = levels(vandq_u32(wide, vdupq_n_u32(15)));
    *high = levels(vshrq_n_u32(wide, 4));
  }
  // The four bytes of each level are looked up.
  static Reg levels(uint32x4_t codes) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(kLevels);
    const uint8x16x4_t table = {
        {vld1q_u8(bytes), vld1q_u8(bytes + 16), vld1q_u8(bytes + 32), vld1q_u8(bytes + 48)}};
    const uint32x4_t at = vmlaq_u32(vdupq_n_u32(0x03020100), codes, vdupq_n_u32(0x04040404));
    return vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(at)));
  }
  static void store(float* p, Reg x) { vst1q_f32(p, x); }
  static Reg add(Reg a, Reg b) { return vaddq_f32(a, b); }
  static Reg sub(Reg a, Reg b) { return vsubq_f32(a, b); }
  static Reg mul(Reg a, Reg b) { return vmulq_f32(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return vfmaq_f32(c, a, b); }
  static Reg max(Reg a, Reg b) { return vmaxq_f32(a, b); }
  static Reg min(Reg a, Reg b) { return vminq_f32(a, b); }
  static Reg round(Reg x) { return vrndnq_f32(x); }
  static float sum(Reg x) { return vaddvq_f32(x); }
  static Reg reaches(Reg x, Reg least) {  // 1 or 0
    return vreinterpretq_f32_u32(vandq_u32(vcgeq_f32(x, least), vreinterpretq_u32_f32(set1(1))));
  }
  static int num_from(Reg x, Reg least) {
    return -vaddvq_s32(vreinterpretq_s32_u32(vcgeq_f32(x, least)));
  }
  static float largest(Reg x) { return vmaxvq_f32(x); }

  static Reg exp(Reg x) {
    const uint32x4_t tiny = vcltq_f32(x, set1(-87.0f));
    x = vmaxq_f32(x, set1(-87.0f));
    const Reg whole = vrndnq_f32(vmulq_f32(x, set1(1.44269504088896341f)));
    Reg rest = vfmaq_f32(x, whole, set1(-0.693359375f));
    rest = vfmaq_f32(rest, whole, set1(2.12194440e-4f));
    Reg y = set1(1.0f / 720);
    y = vfmaq_f32(set1(1.0f / 120), y, rest);
    y = vfmaq_f32(set1(1.0f / 24), y, rest);
    y = vfmaq_f32(set1(1.0f / 6), y, rest);
    y = vfmaq_f32(set1(0.5f), y, rest);
    y = vfmaq_f32(set1(1.0f), y, rest);
    y = vfmaq_f32(set1(1.0f), y, rest);
    const int32x4_t power = vshlq_n_s32(vcvtq_s32_f32(whole), 23);
    const uint32x4_t scaled = vreinterpretq_u32_s32(vaddq_s32(vreinterpretq_s32_f32(y), power));
    return vreinterpretq_f32_u32(vbicq_u32(scaled, tiny));
  }
};

// One lane a token, four registers a tile.
struct Tile {
  static constexpr int kParts = 4;
  static constexpr int kQuads = 1;
  using Codes = uint8x16_t;
  using Sum = int32x4_t;

  static Sum start(int32_t at) { return vdupq_n_s32(at); }
  static Codes load(const uint8_t* p) { return vld1q_u8(p); }
  template <int kBits, int kPlane>
  static Codes plane(Codes codes) {
    if constexpr (kPlane > 0) codes = vshrq_n_u8(codes, kBits * kPlane);
    return vandq_u8(codes, vdupq_n_u8((1 << kBits) - 1));
  }
  static Codes spread(uint32_t query) { return vreinterpretq_u8_u32(vdupq_n_u32(query)); }

  // Nibbles are small enough to be signed.
  static Sum products(Codes nibbles, Codes query) {
    const int8x16_t x = vreinterpretq_s8_u8(nibbles), y = vreinterpretq_s8_u8(query);
    const int32x4_t first = vpaddlq_s16(vmull_s8(vget_low_s8(x), vget_low_s8(y)));
    const int32x4_t second = vpaddlq_s16(vmull_high_s8(x, y));
    return vpaddq_s32(first, second);
  }
  static Sum dot_small(Sum sum, Codes codes, Codes query) {
    return vaddq_s32(sum, products(codes, query));
  }
  static Sum dot(Sum sum, Codes codes, Codes query) {
    const int32x4_t large = vshlq_n_s32(products(plane<4, 1>(codes), query), 4);
    return vaddq_s32(sum, vaddq_s32(products(plane<4, 0>(codes), query), large));
  }
  static float32x4_t to_float(Sum sum) { return vcvtq_f32_s32(sum); }

  static float32x4_t dot_bf16(float32x4_t sum, Codes codes, Codes query) {
    const uint32x4_t x = vreinterpretq_u32_u8(codes);
    const uint32x4_t y = vreinterpretq_u32_u8(query);
    const uint32x4_t mask = vdupq_n_u32(0xffff0000u);
    const auto odd = [&](uint32x4_t z) { return vreinterpretq_f32_u32(vandq_u32(z, mask)); };
    const auto even = [](uint32x4_t z) { return vreinterpretq_f32_u32(vshlq_n_u32(z, 16)); };
    return vfmaq_f32(vfmaq_f32(sum, even(x), even(y)), odd(x), odd(y));
  }

  template <int kGroup>
  static void store_groups(const float32x4_t (*scores)[4], float* out) {
    float32x4_t best[kParts];
    for (int part = 0; part < kParts; ++part) {
      const float32x4_t* x = scores[part];
      if constexpr (kGroup == 1) {
        vst4q_f32(out + 16 * part, (float32x4x4_t{{x[0], x[1], x[2], x[3]}}));
        continue;
      }
      // Neighbours meet, then pairs; each register is four tokens.
      const float32x4_t a = vpmaxq_f32(x[0], x[1]), b = vpmaxq_f32(x[2], x[3]);
      if constexpr (kGroup == 2) {
        vst1q_f32(out + 8 * part, vuzp1q_f32(a, b));
        vst1q_f32(out + 8 * part + 4, vuzp2q_f32(a, b));
        continue;
      }
      best[part] = vpmaxq_f32(a, b);
      if constexpr (kGroup == 4) vst1q_f32(out + 4 * part, best[part]);
    }
    if constexpr (kGroup >= 8) {
      const float32x4_t a = vmaxq_f32(best[0], best[1]), b = vmaxq_f32(best[2], best[3]);
      if constexpr (kGroup == 8) {
        vst1q_f32(out, a);
        vst1q_f32(out + 4, b);
      } else {
        vst1q_f32(out, vmaxq_f32(a, b));
      }
    }
  }
};

}  // namespace neon
}  // namespace
}  // namespace kvswap
