#include "common/cpu.h"
#include "kernels/attend_head.h"
#include "kernels/code_tokens.h"
#include "kernels/score_rows.h"
#include "kernels/score_tile.h"
#include "kernels/simd_avx512.h"

namespace kvswap {

using S = avx512::Simd;
const Kernels kAvx512 = {
    "avx512",         has_avx512,       attend_head<S>,  score_tile<S, avx512::Tile>,
    project<S>,       column_sums<S>,   best_shifted<S>, count_from<S>,
    encode_tokens<S>, decode_tokens<S>, widen<S>};

}  // namespace kvswap
