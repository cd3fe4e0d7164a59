// What a kernel is given, and the table of an instruction set's kernels.
//
// The plain torch code of src/kvswap/kernels defines what each one computes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvswap {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// How a record holds a head's tokens: as they are, or turned and then in eight or four bits.
enum class Codec : int { raw = 0, int8 = 1, rot4 = 2 };

// Two numbers of four bits; of a row's first half in the low bits, of its second in the high.
struct Nibbles {
  uint8_t both;
};

// What the codes stand for: J. Max, Quantizing for minimum distortion, IRE Trans. IT-6, 1960,
// table I. Those from 8 on are the sizes of the others.
static constexpr float kLevels[16] = {-2.733f,  -2.069f,  -1.618f, -1.256f, -0.9424f, -0.6568f,
                                      -0.3881f, -0.1284f, 0.1284f, 0.3881f, 0.6568f,  0.9424f,
                                      1.256f,   1.618f,   2.069f,  2.733f};

// The orthogonal matrix that coded tokens are turned by: elements are multiplied by factors,
// then by a symmetric matrix, which is Hadamard's of ones where none is given.
struct Rotation {
  const float* factors = nullptr;  // [head_dim]
  const float* matrix = nullptr;   // [head_dim][head_dim]
};

// What is taken off a KV head's keys and values before they are turned; null for nothing.
struct Centre {
  const float* keys = nullptr;    // [head_dim]
  const float* values = nullptr;  // [head_dim]
};

// Tokens whose keys and values lie one after another, of one KV head.
struct Segment {
  const void* keys;
  const void* values;
  int64_t count;                     // tokens
  int64_t key_stride, value_stride;  // elements from one token to the next
};

// Attention of one KV head's query rows to all its segments, of which the first are coded.
struct AttendHead {
  const Segment* segments;
  int64_t num_segments;
  int64_t num_tokens;  // of all segments
  int64_t head_dim;
  const void* const* query;  // num_rows pointers to [head_dim], dtype
  int64_t num_rows;
  const int64_t* hidden;  // num_rows: newest tokens that the row does not see; null for none
  float scaling;
  float softcap;  // 0 for none
  Dtype dtype;
  float* const* out;                            // num_rows pointers to [head_dim]
  float* lse;                                   // [num_rows]
  float* scratch;                               // scratch_floats(num_rows, num_tokens, head_dim)
  int64_t num_coded = 0, num_coded_tokens = 0;  // segments, and their tokens
  Codec codec = Codec::raw;                     // theirs
  Rotation rotation{};
  Centre centre{};
};

static constexpr int64_t padded_tokens(int64_t num_tokens) { return (num_tokens + 15) / 16 * 16; }
static constexpr int64_t scratch_floats(int64_t num_rows, int64_t num_tokens, int64_t head_dim) {
  return num_rows * (padded_tokens(num_tokens) + 2 * head_dim) + head_dim;
}

// One head's tokens, to be coded or decoded.
struct CodedTokens {
  Codec codec;  // not raw
  Rotation rotation;
  int64_t head_dim, count;
  Dtype dtype;          // of the tokens
  int64_t stride;       // elements from one token to the next
  const float* centre;  // [head_dim]; null for none
  float* scratch;       // [3 * head_dim]
};

// -- codes of keys ------------------------------------------------------------------------

constexpr int kTileTokens = 16;
constexpr int kMaxQueries = 16;  // scored together

enum class Code : int { rot4 = 0, int8 = 1, bf16 = 2, rot2 = 3, rot1 = 4, band = 5 };

// Bits of every coefficient on a grid; 0 for codes that have no grid, or more than one.
static constexpr int grid_bits(Code code) {
  switch (code) {
    case Code::rot4: return 4;
    case Code::rot2: return 2;
    case Code::rot1: return 1;
    default: return 0;
  }
}

static constexpr bool has_scale(Code code) { return code != Code::bf16; }

// The banded code has coefficients of so many bits each, one band after the other.
constexpr int kBands = 3;
constexpr int kBandBits[kBands] = {8, 4, 2};

// A byte of grid codes holds one coefficient of each plane, the first in its lowest bits: planes
// are equal parts of the coefficients, in order, of which the last ones may be short.
static constexpr int planes_of(Code code) { return grid_bits(code) ? 8 / grid_bits(code) : 1; }
static constexpr int64_t plane_length(Code code, int64_t rank) {
  return (rank + planes_of(code) - 1) / planes_of(code);
}

// A grid's levels are its codes less half of this.
static constexpr int grid_top(Code code) { return (1 << grid_bits(code)) - 1; }

// A tile holds sixteen tokens: [chunks][16 tokens][4 bytes], so that one register holds the
// same four bytes of every token. Queries come in fours, and so do their scores: a tile's are
// [quads][groups of the tile][4 queries].
struct TileScore {
  const uint8_t* codes;         // the tile
  int64_t chunks;               // of four bytes of a token
  int64_t band_chunks[kBands];  // for band: so many of each band
  int num_quads;                // at most kMaxQueries / 4
  // Grids: [planes][chunks][kMaxQueries] of four int8.
  // int8: [chunks][kMaxQueries] of four int8. band: as int8, then two grids.
  // bf16: [chunks][kMaxQueries] of two bfloat16.
  const uint32_t* query;
  const int32_t* start;   // [kMaxQueries]: product sums begin here; not for bf16
  const uint16_t* scale;  // [16] float16, a token each; not for bf16
  int group_size;         // 1, 2, 4, 8 or 16
  float* out;
};

// Rows of scores, each of `length` floats: [rows][length].
struct ScoreRows {
  const float* scores;
  int64_t num_rows;
  int64_t length;
  const float* scale;  // [length]
};

struct Kernels {
  const char* name;
  bool (*is_there)();
  void (*attend_head)(const AttendHead&);
  void (*score_tile)(Code, const TileScore&);
  // out[rank] += sum over i of x[i] * basis[i][rank]
  void (*project)(const float* x, int64_t count, const Bf16* basis, int64_t rank, float* out);
  // Of each column: the largest scaled score, the sum of exponentials relative to it, and the sum
  // of those times what they are the exponentials of.
  void (*column_sums)(const ScoreRows&, float* largest, float* sum, float* product);
  // best[row][i] = the larger of itself and scaled scores less shift, over columns
  // i, i + best_length, i + 2 * best_length, ...
  void (*best_shifted)(const ScoreRows&, const float* shift, int64_t best_length, float* best);
  // How many are at least as large.
  int64_t (*count_from)(const float* x, int64_t count, float least);
  void (*encode_tokens)(const CodedTokens&, const void* tokens, uint8_t* codes);
  void (*decode_tokens)(const CodedTokens&, const uint8_t* codes, void* tokens);
  // To float32.
  void (*widen)(const void* x, Dtype dtype, int64_t count, float* out);
};

// The kernels in use; `use_kernels` returns false where the name is unknown or not there.
const Kernels& kernels();
bool use_kernels(const char* name);

// All that were built, best first, ended by null.
const Kernels* const* all_kernels();

extern const Kernels kPortable, kAvx2, kAvx512, kAvx512Bf16, kNeon;

}  // namespace kvswap
