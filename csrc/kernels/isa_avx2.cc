#include "common/cpu.h"
#include "kernels/attend_head.h"
#include "kernels/code_tokens.h"
#include "kernels/score_rows.h"
#include "kernels/score_tile.h"
#include "kernels/simd_avx2.h"

namespace kvswap {

using S = avx2::Simd;
const Kernels kAvx2 = {
    "avx2",           has_avx2,         attend_head<S>,  score_tile<S, avx2::Tile>,
    project<S>,       column_sums<S>,   best_shifted<S>, count_from<S>,
    encode_tokens<S>, decode_tokens<S>, widen<S>};

}  // namespace kvswap
