#include "io/crc32c.h"

#include <array>
#include <cstring>

#include "common/cpu.h"

#if defined(__x86_64__)
#include <nmmintrin.h>
#define KVSWAP_CRC_TARGET __attribute__((target("sse4.2")))
#elif defined(__aarch64__)
#if !defined(__APPLE__)
#include <sys/auxv.h>
#endif
#if defined(__clang__)
#define KVSWAP_CRC_TARGET __attribute__((target("crc")))
#else
#define KVSWAP_CRC_TARGET __attribute__((target("+crc")))
#endif
#include <arm_acle.h>
#endif

namespace kvswap {
namespace {

constexpr std::uint32_t kPolynomial = 0x82f63b78;  // reflected

// Eight tables: entry [k][b] is byte b followed by k zero bytes.
struct ByteTables {
  std::array<std::array<std::uint32_t, 256>, 8> of{};
  constexpr ByteTables() {
    for (std::uint32_t byte = 0; byte < 256; ++byte) {
      std::uint32_t crc = byte;
      for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? kPolynomial : 0);
      of[0][byte] = crc;
    }
    for (std::size_t k = 1; k < 8; ++k) {
      for (std::size_t byte = 0; byte < 256; ++byte) {
        const std::uint32_t before = of[k - 1][byte];
        of[k][byte] = (before >> 8) ^ of[0][before & 0xff];
      }
    }
  }
};
constexpr ByteTables kTables;

std::uint32_t by_table(const std::uint8_t* data, std::size_t nbytes, std::uint32_t crc) {
  for (; nbytes >= 8; data += 8, nbytes -= 8) {
    const auto low =
        crc ^ (data[0] | data[1] << 8 | data[2] << 16 | static_cast<std::uint32_t>(data[3]) << 24);
    crc = kTables.of[7][low & 0xff] ^ kTables.of[6][low >> 8 & 0xff] ^
          kTables.of[5][low >> 16 & 0xff] ^ kTables.of[4][low >> 24] ^ kTables.of[3][data[4]] ^
          kTables.of[2][data[5]] ^ kTables.of[1][data[6]] ^ kTables.of[0][data[7]];
  }
  for (; nbytes; ++data, --nbytes) crc = (crc >> 8) ^ kTables.of[0][(crc ^ *data) & 0xff];
  return crc;
}

#if defined(KVSWAP_CRC_TARGET)

// The instruction takes three cycles but begins one each cycle, so three stretches run at
// once; what a stretch of zeros does to a checksum is linear and joins them by tables.
class Zeros {
 public:
  explicit Zeros(std::size_t nbytes) {
    const std::array<std::uint8_t, 64> none{};
    for (int bit = 0; bit < 32; ++bit) {
      std::uint32_t crc = 1u << bit;
      for (std::size_t left = nbytes; left;) {
        const std::size_t some = left < none.size() ? left : none.size();
        crc = by_table(none.data(), some, crc);
        left -= some;
      }
      const std::size_t table = static_cast<std::size_t>(bit) / 8;
      for (std::size_t byte = 0; byte < 256; ++byte) {
        if (byte >> (bit % 8) & 1) of_[table][byte] ^= crc;
      }
    }
  }
  std::uint32_t after(std::uint32_t crc) const {
    return of_[0][crc & 0xff] ^ of_[1][crc >> 8 & 0xff] ^ of_[2][crc >> 16 & 0xff] ^
           of_[3][crc >> 24];
  }

 private:
  std::array<std::array<std::uint32_t, 256>, 4> of_{};
};

// A block of 4096 bytes is three long stretches and two words; what is left of others is
// done in short ones.
constexpr std::size_t kLong = 1360, kShort = 168;

KVSWAP_CRC_TARGET inline std::uint32_t word(std::uint32_t crc, const std::uint8_t* data) {
  std::uint64_t value;
  std::memcpy(&value, data, sizeof(value));
#if defined(__x86_64__)
  return static_cast<std::uint32_t>(_mm_crc32_u64(crc, value));
#else
  return __crc32cd(crc, value);
#endif
}

template <std::size_t kStretch>
KVSWAP_CRC_TARGET void in_threes(const std::uint8_t*& data, std::size_t& nbytes,
                                 std::uint32_t& crc) {
  static const Zeros zeros(kStretch);
  for (; nbytes >= 3 * kStretch; data += 3 * kStretch, nbytes -= 3 * kStretch) {
    std::uint32_t first = crc, second = 0, third = 0;
    for (std::size_t at = 0; at < kStretch; at += 8) {
      first = word(first, data + at);
      second = word(second, data + kStretch + at);
      third = word(third, data + 2 * kStretch + at);
    }
    crc = zeros.after(zeros.after(first) ^ second) ^ third;
  }
}

KVSWAP_CRC_TARGET std::uint32_t by_instruction(const std::uint8_t* data, std::size_t nbytes,
                                               std::uint32_t crc) {
  in_threes<kLong>(data, nbytes, crc);
  in_threes<kShort>(data, nbytes, crc);
  for (; nbytes >= 8; data += 8, nbytes -= 8) crc = word(crc, data);
  return by_table(data, nbytes, crc);
}

bool find_instruction() {
#if defined(__x86_64__)
  return has_sse42();
#elif defined(__APPLE__)
  return true;
#else
  return getauxval(AT_HWCAP) & (1ul << 7);  // HWCAP_CRC32
#endif
}

#else
std::uint32_t by_instruction(const std::uint8_t* data, std::size_t nbytes, std::uint32_t crc) {
  return by_table(data, nbytes, crc);
}
bool find_instruction() { return false; }
#endif

}  // namespace

bool has_crc32c_instruction() {
  static const bool found = find_instruction();
  return found;
}

std::uint32_t crc32c(const void* data, std::size_t nbytes, std::uint32_t crc) {
  const auto* bytes = static_cast<const std::uint8_t*>(data);
  return ~(has_crc32c_instruction() ? by_instruction(bytes, nbytes, ~crc)
                                    : by_table(bytes, nbytes, ~crc));
}

std::uint32_t crc32c_by_table(const void* data, std::size_t nbytes, std::uint32_t crc) {
  return ~by_table(static_cast<const std::uint8_t*>(data), nbytes, ~crc);
}

}  // namespace kvswap
