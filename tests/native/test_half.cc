// Sixteen-bit floats: there and back, and what does not fit.
#include "check.h"
#include "random.h"

using namespace kvswap;
using namespace kvswap::test;

TEST(every_half_float_survives_the_way_through_float32) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const At at{{"bits", bits}};
    const float wide = from_f16(static_cast<uint16_t>(bits));
    if (std::isnan(wide)) {
      CHECK(std::isnan(from_f16(to_f16(wide))));
    } else {
      CHECK(to_f16(wide) == bits);
    }
  }
}

TEST(every_brain_float_survives_the_way_through_float32) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const At at{{"bits", bits}};
    const float wide = plain(Bf16{static_cast<uint16_t>(bits)});
    if (std::isnan(wide)) {
      CHECK(std::isnan(plain(Bf16{to_bf16(wide)})));
    } else {
      CHECK(to_bf16(wide) == bits);
    }
  }
}

TEST(rounding_goes_to_the_nearest_and_of_two_to_the_even_one) {
  CHECK(to_f16(1.0f + 0x1p-11f) == to_f16(1.0f));
  CHECK(to_f16(1.0f + 3 * 0x1p-11f) == to_f16(1.0f + 0x1p-9f));
  CHECK(to_f16(0x1p-25f) == 0);
  CHECK(to_f16(0x1.8p-24f) == 2);
  CHECK(to_bf16(1.0f + 0x1p-8f) == to_bf16(1.0f));
  CHECK(to_bf16(1.0f + 3 * 0x1p-8f) == to_bf16(1.0f + 0x1p-6f));
  Random random(1);
  for (int i = 0; i < 20000; ++i) {
    const float x = random.normal() *
                    static_cast<float>(std::ldexp(1.0, static_cast<int>(random.between(-30, 14))));
    const float found = from_f16(to_f16(x)), below = from_f16(static_cast<uint16_t>(to_f16(x) - 1));
    if (std::fabs(x) > 0x1p-14f) CHECK(std::fabs(found - x) <= std::fabs(x - below));
    CHECK(std::fabs(found - x) <= std::max(std::fabs(x) * 0x1p-11f, 0x1p-25f));
    CHECK(std::fabs(rounded(x, Dtype::bf16) - x) <= std::fabs(x) * 0x1p-8f);
  }
}

TEST(what_is_too_large_is_infinite_and_what_is_no_number_stays_none) {
  for (const float sign : {1.0f, -1.0f}) {
    for (const float x : {65520.0f, 1e9f, 3e38f, kInfinity}) {
      CHECK(from_f16(to_f16(sign * x)) == sign * kInfinity);
    }
    CHECK(from_f16(to_f16(sign * 65519.0f)) == sign * 65504.0f);
    CHECK(rounded(sign * kInfinity, Dtype::bf16) == sign * kInfinity);
  }
  for (const uint32_t bits : {0x7fffffffu, 0xffffffffu, 0x7f800001u, 0x7fc00000u}) {
    CHECK(std::isnan(rounded(std::bit_cast<float>(bits), Dtype::bf16)));
    CHECK(std::isnan(from_f16(to_f16(std::bit_cast<float>(bits)))));
  }
}
