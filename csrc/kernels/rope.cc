#include "kernels/rope.h"

#include <bit>

#include "kernels/half.h"

namespace kvswap {
namespace {

struct F32 {
  using Item = float;
  static float load(float x) { return x; }
  static float store(float x) { return x; }
};
struct B16 {
  using Item = uint16_t;
  static float load(uint16_t x) { return std::bit_cast<float>(static_cast<uint32_t>(x) << 16); }
  static uint16_t store(float x) { return to_bf16(x); }
};
struct H16 {
  using Item = uint16_t;
  static float load(uint16_t x) { return from_f16(x); }
  static uint16_t store(float x) { return to_f16(x); }
};

template <class T>
float rounded(float x) {
  return T::load(T::store(x));
}

template <class T>
void rotate_dtype(const typename T::Item* x, const typename T::Item* cos,
                  const typename T::Item* sin, int64_t tokens, int64_t heads, int64_t dim,
                  typename T::Item* out) {
  const int64_t half = dim / 2;
  for (int64_t t = 0; t < tokens; ++t, cos += dim, sin += dim) {
    for (int64_t h = 0; h < heads; ++h, x += dim, out += dim) {
      for (int64_t i = 0; i < half; ++i) {
        const float a = T::load(x[i]), b = T::load(x[half + i]);
        const float turned = rounded<T>(-b * T::load(sin[i]));
        out[i] = T::store(rounded<T>(a * T::load(cos[i])) + turned);
        const float other = rounded<T>(a * T::load(sin[half + i]));
        out[half + i] = T::store(rounded<T>(b * T::load(cos[half + i])) + other);
      }
    }
  }
}

template <class T>
void rotate_as(const void* x, const void* cos, const void* sin, int64_t tokens, int64_t heads,
               int64_t dim, void* out) {
  using Item = typename T::Item;
  rotate_dtype<T>(static_cast<const Item*>(x), static_cast<const Item*>(cos),
                  static_cast<const Item*>(sin), tokens, heads, dim, static_cast<Item*>(out));
}

}  // namespace

void rotate(const void* x, const void* cos, const void* sin, int64_t tokens, int64_t heads,
            int64_t dim, Dtype dtype, void* out) {
  switch (dtype) {
    case Dtype::f32: return rotate_as<F32>(x, cos, sin, tokens, heads, dim, out);
    case Dtype::bf16: return rotate_as<B16>(x, cos, sin, tokens, heads, dim, out);
    case Dtype::f16: return rotate_as<H16>(x, cos, sin, tokens, heads, dim, out);
  }
}

}  // namespace kvswap
