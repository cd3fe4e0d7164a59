#include <cstring>

#include "common/cpu.h"
#include "kernels/attend_head.h"
#include "kernels/code_tokens.h"
#include "kernels/score_rows.h"
#include "kernels/score_tile.h"
#include "kernels/simd_avx512.h"

namespace kvswap {
namespace {

struct Simd : avx512::Simd {};

struct Tile : avx512::Tile {
  static __m512 dot_bf16(__m512 sum, Codes codes, Codes query) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(codes),
                            reinterpret_cast<__m512bh>(query));
  }
};

// Keys and queries are multiplied as they are, 32 at a time.
template <>
struct Dot<Simd, Bf16> {
  static void prepare(const Bf16* query, int64_t head_dim, float* row) {
    std::memcpy(row, query, static_cast<size_t>(head_dim) * sizeof(Bf16));
  }
  static __m512bh load(const Bf16* p, __mmask32 mask) {
    return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(mask, p));
  }
  template <int Rows>
  static void run(const Bf16* key, const float* rows, int64_t head_dim, float* out) {
    __m512 sums[Rows];
    for (int r = 0; r < Rows; ++r) sums[r] = _mm512_setzero_ps();
    for (int64_t i = 0; i < head_dim; i += 32) {
      const int64_t left = head_dim - i;
      const __mmask32 mask = left >= 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
      const __m512bh k = load(key + i, mask);
      for (int r = 0; r < Rows; ++r) {
        const Bf16* row = reinterpret_cast<const Bf16*>(rows + r * head_dim);
        sums[r] = _mm512_dpbf16_ps(sums[r], k, load(row + i, mask));
      }
    }
    for (int r = 0; r < Rows; ++r) out[r] = _mm512_reduce_add_ps(sums[r]);
  }
};

}  // namespace

const Kernels kAvx512Bf16 = {"avx512_bf16",          has_avx512_bf16,  attend_head<Simd>,
                             score_tile<Simd, Tile>, project<Simd>,    column_sums<Simd>,
                             best_shifted<Simd>,     count_from<Simd>, encode_tokens<Simd>,
                             decode_tokens<Simd>,    widen<Simd>};

}  // namespace kvswap
