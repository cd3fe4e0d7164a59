// The scale of a coded token of one head, which its own codes spell.
//
// A row's first four words of eight bytes, or all that it has, are the spelling ones. Their bytes
// in a column, with all the codes in them, have an odd number of odd codes where the scale's bit
// of that number is one.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>

namespace kvswap {

static constexpr uint32_t kScaleBase = 108;  // exponent of the first ones, as float32 has it

// Eight bits, five of them the exponent: 0 is 0, 255 is no number.
static constexpr auto kScales = [] {
  std::array<float, 256> made{};
  for (uint32_t byte = 1; byte < 255; ++byte) {
    made[byte] = std::bit_cast<float>((byte << 20) + (kScaleBase << 23));
  }
  made[255] = std::numeric_limits<float>::quiet_NaN();
  return made;
}();

static constexpr int64_t kSpellingWords = 4;
static constexpr int64_t spelling_words(int64_t row_bytes) {
  return row_bytes < 8 * kSpellingWords ? row_bytes / 8 : kSpellingWords;
}

// The number of the scale of a row with one code in a byte, or with two. The product brings the
// lowest bits of all eight bytes to the top.
template <int kCodesInByte>
uint64_t scale_number(const void* codes, int64_t row_bytes) {
  uint64_t words[kSpellingWords] = {};
  if (row_bytes >= 8 * kSpellingWords) {
    std::memcpy(words, codes, sizeof(words));
  } else {
    std::memcpy(words, codes, static_cast<size_t>(8 * spelling_words(row_bytes)));
  }
  uint64_t odd = words[0] ^ words[1] ^ words[2] ^ words[3];
  if constexpr (kCodesInByte == 2) odd ^= odd >> 4;
  return ((odd & 0x0101010101010101u) * 0x0102040810204080u) >> 56;
}

template <int kCodesInByte>
float scale_of(const void* codes, int64_t row_bytes) {
  return kScales[scale_number<kCodesInByte>(codes, row_bytes)];
}

}  // namespace kvswap
