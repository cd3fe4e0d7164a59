// CRC-32C (Castagnoli), with the processor's instruction where it has one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvswap {

// Goes on from `crc`, the checksum of what comes before; 0 at the start.
std::uint32_t crc32c(const void* data, std::size_t nbytes, std::uint32_t crc = 0);

// As a table of checksums holds it: 0 means never written, so 0 is 1.
inline std::uint32_t record_checksum(const void* data, std::size_t nbytes) {
  const std::uint32_t found = crc32c(data, nbytes);
  return found ? found : 1;
}

// Without the instruction: what the other must agree with.
std::uint32_t crc32c_by_table(const void* data, std::size_t nbytes, std::uint32_t crc = 0);

bool has_crc32c_instruction();

}  // namespace kvswap
