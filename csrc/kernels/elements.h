// The elements of a token's row, whatever they are stored as.
//
// Included by the isa_*.cc files alone, each with its own `Simd`.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/api.h"

namespace kvswap {
namespace {

// A row has one or several parts of equal length; a load gives a register of each.
template <class S, class T>
struct Elements {
  static constexpr int kParts = 1;
  static void load(const T* p, typename S::Reg* out) { out[0] = S::load(p); }
};
template <class S>
struct Elements<S, Nibbles> {
  static constexpr int kParts = 2;
  static void load(const Nibbles* p, typename S::Reg* out) { S::load(p, out, out + 1); }
};

// Whether rows are codes, which are turned and have a scale.
template <class T>
constexpr bool kIsCoded = std::is_same_v<T, int8_t> || std::is_same_v<T, Nibbles>;

// Calls body<T>() with what a codec's rows are made of.
template <class F>
void with_codes(Codec codec, F&& body) {
  switch (codec) {
    case Codec::raw: return;
    case Codec::int8: return body.template operator()<int8_t>();
    case Codec::rot4: return body.template operator()<Nibbles>();
  }
}

}  // namespace
}  // namespace kvswap
