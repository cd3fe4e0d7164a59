// One float at a time: what every processor can do, and what the others are tested against.
//
// Here and in the other headers of this folder that hold code everything is in an unnamed
// namespace: each isa_*.cc must keep its own copy, compiled for its own instruction set.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "kernels/api.h"
#include "kernels/half.h"

namespace kvswap {
namespace {
namespace portable {

struct Simd {
  using Reg = float;
  static constexpr int kLanes = 1;
  static constexpr int kVectors = 4;  // registers of one row in the weighted sum
  static constexpr int kRows = 2;     // rows of it at once

  static Reg zero() { return 0.0f; }
  static Reg set1(float x) { return x; }
  static Reg load(const float* p) { return *p; }
  static Reg load(const Bf16* p) {
    return std::bit_cast<float>(static_cast<uint32_t>(p->bits) << 16);
  }
  static Reg load(const F16* p) { return from_f16(p->bits); }
  static Reg load(const int8_t* p) { return *p; }
  // Four bits each, as levels -7.5 to 7.5.
  static void load(const Nibbles* p, Reg* low, Reg* high) {
    *low = kLevels[p->both & 15];
    *high = kLevels[p->both >> 4];
  }
  static void store(float* p, Reg x) { *p = x; }
  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg sub(Reg a, Reg b) { return a - b; }
  static Reg mul(Reg a, Reg b) { return a * b; }
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static Reg max(Reg a, Reg b) { return a > b ? a : b; }
  static Reg min(Reg a, Reg b) { return a < b ? a : b; }
  static Reg round(Reg x) { return std::nearbyint(x); }  // of two nearest the even one
  static float sum(Reg x) { return x; }
  static Reg reaches(Reg x, Reg least) { return x >= least; }
  static int num_from(Reg x, Reg least) { return x >= least; }
  static float largest(Reg x) { return x; }
  static Reg exp(Reg x) { return std::exp(x); }
};

}  // namespace portable
}  // namespace
}  // namespace kvswap
