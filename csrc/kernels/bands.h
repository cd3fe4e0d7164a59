// How the bytes of a token are shared among coefficients of different widths.
#pragma once

#include <cstdint>

#include "kernels/api.h"

namespace kvswap {

// Coefficients of so many bits each, in chunks of their own. A byte holds one of each plane, the
// first in its lowest bits: planes are equal parts of the band, of which the last may be short.
struct Band {
  int bits;
  int64_t first, count;         // coefficients
  int64_t first_chunk, chunks;  // of four bytes of a token
  int64_t first_words;          // of a query, in chunks

  int planes() const { return 8 / bits; }
  int64_t length() const { return (count + planes() - 1) / planes(); }
  int top() const { return (1 << bits) - 1; }
};

struct Bands {
  Band each[2];
  int count;
  int64_t words;  // of a query, in chunks

  const Band* begin() const { return each; }
  const Band* end() const { return each + count; }
};

// Of the banded code those that have four bits: a third, rounded up to a multiple of eight.
static inline int64_t wide_count(int64_t rank) {
  const int64_t third = (rank + 2) / 3, eights = (third + 7) / 8 * 8;
  return eights < rank ? eights : rank;
}

// The bands of a code's coefficients; bfloat16 has none.
static inline Bands bands_of(Code code, int64_t rank) {
  Bands made{};
  const auto add = [&](int bits, int64_t first, int64_t count) {
    Band band{bits, first, count, 0, 0, made.words};
    band.chunks = (band.length() + 3) / 4;
    if (made.count) {
      const Band& last = made.each[made.count - 1];
      band.first_chunk = last.first_chunk + last.chunks;
    }
    made.words += band.planes() * band.chunks;
    made.each[made.count++] = band;
  };
  if (code == Code::band) {
    const int64_t wide = wide_count(rank);
    add(4, 0, wide);
    if (wide < rank) add(2, wide, rank - wide);
  } else if (code == Code::int8) {
    add(8, 0, rank);
  } else if (code != Code::bf16) {
    add(grid_bits(code), 0, rank);
  }
  return made;
}

}  // namespace kvswap
