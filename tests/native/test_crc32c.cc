// The checksum: bit by bit, by table and by instruction.
#include "check.h"
#include "io/crc32c.h"
#include "random.h"

using namespace kvswap;
using namespace kvswap::test;

namespace {

uint32_t bit_by_bit(const uint8_t* data, size_t nbytes, uint32_t crc) {
  crc = ~crc;
  for (size_t i = 0; i < nbytes; ++i) {
    crc ^= data[i];
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0x82f63b78u : 0);
  }
  return ~crc;
}

}  // namespace

TEST(the_checksum_of_the_digits_is_the_published_one) {
  CHECK(crc32c("123456789", 9) == 0xe3069283u);
  CHECK(crc32c_by_table("123456789", 9) == 0xe3069283u);
  CHECK(crc32c("", 0) == 0);
}

TEST(all_ways_agree_at_any_length_and_alignment) {
  Random random(70);
  std::vector<uint8_t> data(9001);
  for (uint8_t& each : data) each = static_cast<uint8_t>(random.below(256));
  for (const size_t nbytes :
       {1u, 7u, 8u, 9u, 503u, 504u, 505u, 4079u, 4080u, 4096u, 8161u, 8999u}) {
    for (size_t at = 0; at < 3; ++at) {
      const uint32_t crc = static_cast<uint32_t>(random.next());
      const std::vector<uint8_t> exact(data.begin() + static_cast<long>(at),
                                       data.begin() + static_cast<long>(at + nbytes));
      const uint32_t expected = bit_by_bit(exact.data(), nbytes, crc);
      CHECK(crc32c(exact.data(), nbytes, crc) == expected);
      CHECK(crc32c(data.data() + at, nbytes, crc) == expected);
      CHECK(crc32c_by_table(data.data() + at, nbytes, crc) == expected);
    }
  }
}

TEST(a_checksum_goes_on_from_that_of_what_comes_before) {
  Random random(71);
  std::vector<uint8_t> data(5000);
  for (uint8_t& each : data) each = static_cast<uint8_t>(random.below(256));
  for (const size_t cut : {0u, 1u, 777u, 4096u, 5000u}) {
    const uint32_t first = crc32c(data.data(), cut);
    CHECK(crc32c(data.data() + cut, data.size() - cut, first) == crc32c(data.data(), data.size()));
  }
}

TEST(a_record_never_has_the_checksum_that_means_none) {
  CHECK(record_checksum("", 0) == 1);
  CHECK(record_checksum("123456789", 9) == 0xe3069283u);
}
