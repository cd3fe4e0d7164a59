#include "kernels/top.h"

#include <algorithm>
#include <bit>
#include <vector>

namespace kvswap {
namespace {

// In the order of the floats; what is no number comes first.
uint32_t ordered(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return 0;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

constexpr int kShifts[] = {21, 10, 0};
constexpr uint32_t kMasks[] = {0x7ff, 0x7ff, 0x3ff};

// The count-th largest key, found eleven bits at a time; `above` keys are larger.
uint32_t threshold(const std::vector<uint32_t>& keys, int64_t count, int64_t& above) {
  uint32_t prefix = 0, known = 0;
  above = 0;
  for (int pass = 0; pass < 3; ++pass) {
    int64_t histogram[2048] = {};
    for (const uint32_t key : keys) {
      if ((key & known) == prefix) ++histogram[(key >> kShifts[pass]) & kMasks[pass]];
    }
    uint32_t digit = kMasks[pass];
    while (above + histogram[digit] < count) above += histogram[digit--];
    prefix |= digit << kShifts[pass];
    known |= kMasks[pass] << kShifts[pass];
  }
  return prefix;
}

}  // namespace

void top_positions(const float* scores, int64_t num_scores, int64_t count, const int64_t* pinned,
                   int64_t num_pinned, int64_t* out) {
  if (count <= 0) return;
  thread_local std::vector<uint32_t> keys;
  keys.resize(static_cast<size_t>(num_scores));
  // One below the largest, which is the pinned ones' alone.
  for (int64_t i = 0; i < num_scores; ++i) {
    keys[static_cast<size_t>(i)] = std::min(ordered(scores[i]), 0xfffffffeu);
  }
  for (int64_t i = 0; i < num_pinned; ++i) keys[static_cast<size_t>(pinned[i])] = 0xffffffffu;
  int64_t above = 0;
  const uint32_t least = threshold(keys, count, above);
  int64_t equal = count - above;
  for (int64_t i = 0; i < num_scores; ++i) {
    const uint32_t key = keys[static_cast<size_t>(i)];
    if (key > least || (key == least && equal-- > 0)) *out++ = i;
  }
}

}  // namespace kvswap
