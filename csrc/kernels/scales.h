// The scale of a coded token of one head, which its own codes spell.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>

namespace kvswap {

static constexpr uint32_t kScaleBase = 106;  // exponent of the first ones, as float32 has it

// Eight bits, five of them the exponent: 0 is 0, 255 is no number.
static constexpr auto kScales = [] {
  std::array<float, 256> made{};
  for (uint32_t byte = 1; byte < 255; ++byte) {
    made[byte] = std::bit_cast<float>((byte << 20) + (kScaleBase << 23));
  }
  made[255] = std::numeric_limits<float>::quiet_NaN();
  return made;
}();

// Bit i of the scale is the lowest bit of byte i: the product brings all eight to the top.
static inline float scale_of(const void* codes) {
  uint64_t first;
  std::memcpy(&first, codes, sizeof(first));
  return kScales[((first & 0x0101010101010101u) * 0x0102040810204080u) >> 56];
}

}  // namespace kvswap
