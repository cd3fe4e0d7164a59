#include "kernels/attend_head.h"
#include "kernels/code_tokens.h"
#include "kernels/score_rows.h"
#include "kernels/score_tile.h"
#include "kernels/simd_neon.h"

namespace kvswap {

using S = neon::Simd;
// Every 64-bit ARM has it.
const Kernels kNeon = {
    "neon",           [] { return true; }, attend_head<S>,  score_tile<S, neon::Tile>,
    project<S>,       column_sums<S>,      best_shifted<S>, count_from<S>,
    encode_tokens<S>, decode_tokens<S>,    widen<S>};

}  // namespace kvswap
