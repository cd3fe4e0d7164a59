// Numbers for tests, the same on every machine; arrays of exactly their size, so that a
// sanitizer sees what is read or written beside them.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <vector>

#include "kernels/api.h"
#include "kernels/half.h"

namespace kvswap::test {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint64_t next() {
    uint64_t x = state_ += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  }
  int64_t below(int64_t end) { return static_cast<int64_t>(next() % static_cast<uint64_t>(end)); }
  int64_t between(int64_t first, int64_t last) { return first + below(last - first + 1); }
  template <class T>
  T one_of(std::initializer_list<T> all) {
    return all.begin()[below(static_cast<int64_t>(all.size()))];
  }
  // Of mean 0 and deviation 1, nearly normal.
  float normal() {
    double sum = -6;
    for (int i = 0; i < 12; ++i) sum += static_cast<double>(next() >> 11) * 0x1p-53;
    return static_cast<float>(sum);
  }
  // A multiple of 1/8 of few bits: sums and products of some of them are exact.
  float dyadic() { return static_cast<float>(between(-12, 12)) / 8; }

 private:
  uint64_t state_;
};

constexpr std::initializer_list<Code> kAllCodes{Code::rot4, Code::rot2, Code::rot1,
                                                Code::int8, Code::bf16, Code::band};
// Those that spans go with.
constexpr std::initializer_list<Code> kSpannedCodes{Code::rot4, Code::rot2, Code::rot1, Code::int8,
                                                    Code::bf16};

inline size_t item_bytes(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

inline float rounded(float x, Dtype dtype) {
  if (dtype == Dtype::f32) return x;
  if (dtype == Dtype::f16) return from_f16(to_f16(x));
  return std::bit_cast<float>(static_cast<uint32_t>(to_bf16(x)) << 16);
}

// Numbers of some dtype with what they are in float32.
struct Numbers {
  Dtype dtype;
  std::vector<float> plain;
  std::vector<uint8_t> bytes;

  const uint8_t* at(int64_t element) const {
    return bytes.data() + static_cast<size_t>(element) * item_bytes(dtype);
  }
};

template <class F>
Numbers numbers(Dtype dtype, int64_t count, F&& draw) {
  Numbers made{dtype, {}, {}};
  const size_t item = item_bytes(dtype);
  made.plain.resize(static_cast<size_t>(count));
  made.bytes.resize(made.plain.size() * item);
  for (size_t i = 0; i < made.plain.size(); ++i) {
    const float x = rounded(draw(), dtype);
    const uint16_t half = dtype == Dtype::f16 ? to_f16(x) : to_bf16(x);
    made.plain[i] = x;
    std::memcpy(made.bytes.data() + i * item,
                dtype == Dtype::f32 ? static_cast<const void*>(&x) : &half, item);
  }
  return made;
}

template <class F>
std::vector<Bf16> basis_of(int64_t count, F&& draw) {
  std::vector<Bf16> made(static_cast<size_t>(count));
  for (Bf16& each : made) each.bits = to_bf16(draw());
  return made;
}

inline float plain(Bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

// Calls body(kernels) for all that run here but the portable ones.
template <class F>
void each_other(F&& body) {
  for (const Kernels* const* each = all_kernels(); *each; ++each) {
    if (*each != &kPortable && (*each)->is_there()) body(**each);
  }
}

// Calls body(name) for all that run here.
template <class F>
void each_name(F&& body) {
  for (const Kernels* const* each = all_kernels(); *each; ++each) {
    if ((*each)->is_there()) body((*each)->name);
  }
}

}  // namespace kvswap::test
