// How the bytes of a token are shared among coefficients of different widths.
#pragma once

#include <cstdint>

#include "kernels/scan.h"

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
  Band each[kBands];
  int count;
  int64_t words;  // of a query, in chunks

  const Band* begin() const { return each; }
  const Band* end() const { return each + count; }

  void add(int bits, int64_t num) {
    Band band{bits, 0, num, 0, 0, words};
    band.chunks = (band.length() + 3) / 4;
    if (count) {
      const Band& last = each[count - 1];
      band.first = last.first + last.count;
      band.first_chunk = last.first_chunk + last.chunks;
    }
    words += band.planes() * band.chunks;
    each[count++] = band;
  }
};

// The bands of the coefficients, all of the banded code's even where they are empty; bfloat16 has
// none.
static inline Bands bands_of(const CodedKeys& keys) {
  Bands made{};
  if (keys.code == Code::band) {
    for (int i = 0; i < kBands; ++i) made.add(kBandBits[i], keys.counts[i]);
  } else if (keys.code == Code::int8) {
    made.add(8, keys.rank);
  } else if (keys.code != Code::bf16) {
    made.add(grid_bits(keys.code), keys.rank);
  }
  return made;
}

}  // namespace kvswap
