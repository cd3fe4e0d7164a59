// Dot products of coded keys with queries, a tile of sixteen tokens at a time.
//
// Included by the isa_*.cc files alone, each with its own `Simd` and `Tile`.
#pragma once

#include <utility>

#include "kernels/api.h"

namespace kvswap {
namespace {

// One plane's products with every query, of grid codes.
template <class Tile, int kBits, int kPlane, int kQueries>
void add_plane(typename Tile::Codes codes, const uint32_t* query, typename Tile::Sum* sums) {
  const auto plane = Tile::template plane<kBits, kPlane>(codes);
  for (int q = 0; q < kQueries; ++q) {
    sums[q] = Tile::dot_small(sums[q], plane, Tile::spread(query[q]));
  }
}

template <class Tile, int kBits, int kQueries, int... kPlanes>
void add_planes(typename Tile::Codes codes, const uint32_t* query, int64_t plane_words,
                typename Tile::Sum* sums, std::integer_sequence<int, kPlanes...>) {
  (add_plane<Tile, kBits, kPlanes, kQueries>(codes, query + kPlanes * plane_words, sums), ...);
}

// Chunks whose coefficients have so many bits each.
template <class Tile, int kBits, int kQueries>
void add_grid(const uint8_t* codes, int64_t chunks, const uint32_t* query,
              typename Tile::Sum* sums) {
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    add_planes<Tile, kBits, kQueries>(Tile::load(codes + chunk * 64), query + chunk * kMaxQueries,
                                      chunks * kMaxQueries, sums,
                                      std::make_integer_sequence<int, 8 / kBits>());
  }
}

// Chunks of a byte each coefficient.
template <class Tile, int kQueries>
void add_bytes(const uint8_t* codes, int64_t chunks, const uint32_t* query,
               typename Tile::Sum* sums) {
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const auto bytes = Tile::load(codes + chunk * 64);
    const uint32_t* word = query + chunk * kMaxQueries;
    for (int q = 0; q < kQueries; ++q) {
      sums[q] = Tile::dot(sums[q], bytes, Tile::spread(word[q]));
    }
  }
}

// Integer codes: product sums of every token and query, as floats times the token's scale.
template <class S, class Tile, Code kCode, int kQueries>
void multiply(const TileScore& a, int first, typename S::Reg (*out)[kQueries]) {
  constexpr int kParts = Tile::kParts, kBytes = 64 / Tile::kParts;
  const uint32_t* query = a.query + first;
  for (int part = 0; part < kParts; ++part) {
    typename Tile::Sum sums[kQueries];
    for (int q = 0; q < kQueries; ++q) sums[q] = Tile::start(a.start[first + q]);
    const uint8_t* codes = a.codes + part * kBytes;
    if constexpr (kCode == Code::band) {
      const int64_t *chunks = a.band_chunks, first_word = chunks[0] + 2 * chunks[1];
      add_bytes<Tile, kQueries>(codes, chunks[0], query, sums);
      add_grid<Tile, 4, kQueries>(codes + chunks[0] * 64, chunks[1],
                                  query + chunks[0] * kMaxQueries, sums);
      add_grid<Tile, 2, kQueries>(codes + (chunks[0] + chunks[1]) * 64, chunks[2],
                                  query + first_word * kMaxQueries, sums);
    } else if constexpr (grid_bits(kCode) > 0) {
      add_grid<Tile, grid_bits(kCode), kQueries>(codes, a.chunks, query, sums);
    } else {
      add_bytes<Tile, kQueries>(codes, a.chunks, query, sums);
    }
    for (int q = 0; q < kQueries; ++q) out[part][q] = Tile::to_float(sums[q]);
    const auto scale = S::load(reinterpret_cast<const F16*>(a.scale) + part * S::kLanes);
    for (int q = 0; q < kQueries; ++q) out[part][q] = S::mul(out[part][q], scale);
  }
}

template <class S, class Tile, int kQueries>
void multiply_bf16(const TileScore& a, int first, typename S::Reg (*out)[kQueries]) {
  constexpr int kParts = Tile::kParts, kBytes = 64 / Tile::kParts;
  for (int part = 0; part < kParts; ++part) {
    typename S::Reg sums[kQueries];
    for (int q = 0; q < kQueries; ++q) sums[q] = S::zero();
    for (int64_t chunk = 0; chunk < a.chunks; ++chunk) {
      const uint32_t* query = a.query + chunk * kMaxQueries + first;
      const auto codes = Tile::load(a.codes + chunk * 64 + part * kBytes);
      for (int q = 0; q < kQueries; ++q) {
        sums[q] = Tile::dot_bf16(sums[q], codes, Tile::spread(query[q]));
      }
    }
    for (int q = 0; q < kQueries; ++q) out[part][q] = sums[q];
  }
}

template <class S, class Tile, Code kCode, int kGroup, int kQuads>
void score_quads(const TileScore& a, int quad) {
  constexpr int kQueries = 4 * kQuads;
  typename S::Reg scores[Tile::kParts][kQueries];
  if constexpr (kCode == Code::bf16) {
    multiply_bf16<S, Tile, kQueries>(a, 4 * quad, scores);
  } else {
    multiply<S, Tile, kCode, kQueries>(a, 4 * quad, scores);
  }
  for (int i = 0; i < kQuads; ++i) {
    typename S::Reg four[Tile::kParts][4];
    for (int part = 0; part < Tile::kParts; ++part) {
      for (int q = 0; q < 4; ++q) four[part][q] = scores[part][4 * i + q];
    }
    Tile::template store_groups<kGroup>(four, a.out + (quad + i) * (kTileTokens / kGroup) * 4);
  }
}

template <class S, class Tile, Code kCode, int kGroup>
void score_groups(const TileScore& a) {
  int quad = 0;
  if constexpr (Tile::kQuads >= 4) {
    for (; quad + 4 <= a.num_quads; quad += 4) score_quads<S, Tile, kCode, kGroup, 4>(a, quad);
    for (; quad + 2 <= a.num_quads; quad += 2) score_quads<S, Tile, kCode, kGroup, 2>(a, quad);
  }
  for (; quad < a.num_quads; ++quad) score_quads<S, Tile, kCode, kGroup, 1>(a, quad);
}

template <class S, class Tile, Code kCode>
void score_code(const TileScore& a) {
  switch (a.group_size) {
    case 1: return score_groups<S, Tile, kCode, 1>(a);
    case 2: return score_groups<S, Tile, kCode, 2>(a);
    case 4: return score_groups<S, Tile, kCode, 4>(a);
    case 8: return score_groups<S, Tile, kCode, 8>(a);
    default: return score_groups<S, Tile, kCode, 16>(a);
  }
}

template <class S, class Tile>
void score_tile(Code code, const TileScore& a) {
  switch (code) {
    case Code::rot4: return score_code<S, Tile, Code::rot4>(a);
    case Code::rot2: return score_code<S, Tile, Code::rot2>(a);
    case Code::rot1: return score_code<S, Tile, Code::rot1>(a);
    case Code::int8: return score_code<S, Tile, Code::int8>(a);
    case Code::band: return score_code<S, Tile, Code::band>(a);
    case Code::bf16: return score_code<S, Tile, Code::bf16>(a);
  }
}

}  // namespace
}  // namespace kvswap
