// The part of the io_uring kernel interface that the ring uses, by the kernel's own numbers.
//
// A header of our own: wheels are built where the system's headers are older than the kernels
// they run on. Layouts and values are fixed by the kernel's promise to user space.
#pragma once

#if defined(__linux__)

#include <cstdint>

namespace kvswap::abi {

// The same on every architecture that has them.
constexpr long kSysSetup = 425;
constexpr long kSysEnter = 426;

constexpr std::uint64_t kOffsetSq = 0;
constexpr std::uint64_t kOffsetCq = 0x8000000;
constexpr std::uint64_t kOffsetSqes = 0x10000000;

constexpr std::uint32_t kFeatSingleMmap = 1u << 0;
constexpr std::uint32_t kFeatNoDrop = 1u << 1;
constexpr std::uint32_t kFeatSubmitStable = 1u << 2;

constexpr std::uint32_t kEnterGetEvents = 1u << 0;

constexpr std::uint8_t kOpReadv = 1;
constexpr std::uint8_t kOpWritev = 2;

struct SqOffsets {
  std::uint32_t head, tail, ring_mask, ring_entries, flags, dropped, array, reserved;
  std::uint64_t user_addr;
};

struct CqOffsets {
  std::uint32_t head, tail, ring_mask, ring_entries, overflow, cqes, flags, reserved;
  std::uint64_t user_addr;
};

struct Params {
  std::uint32_t sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle, features, wq_fd;
  std::uint32_t reserved[3];
  SqOffsets sq;
  CqOffsets cq;
};

struct Sqe {
  std::uint8_t opcode, flags;
  std::uint16_t ioprio;
  std::int32_t fd;
  std::uint64_t offset, address;
  std::uint32_t length, rw_flags;
  std::uint64_t user_data;
  std::uint16_t buffer_index, personality;
  std::int32_t splice_fd;
  std::uint64_t padding[2];
};

struct Cqe {
  std::uint64_t user_data;
  std::int32_t result;
  std::uint32_t flags;
};

static_assert(sizeof(Params) == 120);
static_assert(sizeof(Sqe) == 64);
static_assert(sizeof(Cqe) == 16);

}  // namespace kvswap::abi

#endif
