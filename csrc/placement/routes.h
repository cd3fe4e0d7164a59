// From which of its copies each record is read, so that the drive that ends last ends soonest.
//
// The same as src/kvswap/placement/retrieval.py does in Python, which says how and why.
#pragma once

#include <cstdint>

namespace kvswap {

// What records are read from; arrays of `count` entries.
struct DriveLimits {
  const double* bytes_per_s;
  const double* iops;
  const std::int64_t* gap_bytes;  // that are read through
  std::int64_t count;
  std::int64_t record_bytes, most_bytes;  // of a record, and of a request
};

// Where records may be read from; arrays of [count, copies].
struct CopyTable {
  const std::int16_t* drives;  // -1 where there is no such copy; the first always is
  const std::int64_t* places;  // records before it on that drive
  std::int64_t count, copies;
};

// Puts the number of the chosen copy of each record into `picked`.
void choose_copies(const CopyTable& table, const DriveLimits& limits, std::int64_t* picked);

}  // namespace kvswap
