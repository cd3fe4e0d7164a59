// What the processor at hand can do.
#pragma once

namespace kvswap {

bool has_avx2();
bool has_avx512();
bool has_avx512_bf16();
bool has_sse42();

}  // namespace kvswap
