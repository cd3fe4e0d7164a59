// From records to transfers: checked, sorted by place, joined where adjacent or nearly so.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <vector>

namespace kvswap {

// Where one device's records may lie.
struct Device {
  int fd;
  std::int64_t record_start;    // of the record area in the file
  std::int64_t reserved_bytes;  // of the record area
};

// What is to be moved; arrays of `count` entries, in the caller's order.
struct Request {
  bool is_write = false;
  std::int64_t count = 0;
  const std::int64_t* ids = nullptr;
  const std::int16_t* devices = nullptr;
  const std::int64_t* offsets = nullptr;     // within the record area
  const std::int64_t* rows = nullptr;        // null: record k is row k
  const std::uint32_t* checksums = nullptr;  // expected; null for writes
  std::uint8_t* memory = nullptr;            // rows of one record each
  std::int64_t num_rows = 0;
  std::int64_t record_bytes = 0;
  std::int64_t block_bytes = 0;
  std::uint8_t* scratch = nullptr;  // takes what lies in gaps
  std::int64_t gap_bytes = 0;       // larger gaps are not read through
  std::int64_t most_bytes = 0;      // of one transfer
};

// One vectored call's worth.
struct Transfer {
  int device;
  int fd;
  std::int64_t offset;  // in the file
  std::int64_t nbytes;
  std::int32_t first_record, last_record;
  std::int32_t first_piece, last_piece;
};

struct Record {
  std::int64_t id;
  std::int64_t offset;  // in the file
  std::int64_t row;
  std::uint32_t checksum;
  std::int16_t device;
};

struct Plan {
  bool is_write = false;
  std::uint8_t* memory = nullptr;
  std::int64_t record_bytes = 0;
  std::vector<Record> records;  // by device and offset
  std::vector<Transfer> transfers;
  std::vector<iovec> pieces;

  const std::uint8_t* row(std::int64_t row) const { return memory + row * record_bytes; }
  std::int64_t num_bytes() const;
};

// False where anything does not fit together; whoever asks says what.
bool make_plan(const Request& request, const std::vector<Device>& devices, Plan& plan);

// What a plan moves on one device alone; refers to the same memory.
Plan part_of(const Plan& plan, int device);

}  // namespace kvswap
