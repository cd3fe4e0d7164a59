// An io_uring instance: its shared memory, and the one system call that drives it.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>

namespace kvswap {

// Why a ring could not be had; ENOSYS where the platform has none.
struct RingError {
  int code;
};

// Not thread-safe: whoever owns it decides who pushes and who pops. `enter` alone may be
// called while another thread pushes or pops.
class Ring {
 public:
  // Throws RingError.
  explicit Ring(unsigned entries);
  ~Ring();
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  // Leaves what belongs to the process that made the ring alone: for a child after a fork.
  void abandon() { is_abandoned_ = true; }

  // The caller never pushes more than `entries` that the kernel has not taken.
  void push_vectored(bool is_write, int fd, std::int64_t offset, const iovec* pieces,
                     unsigned count, std::uint64_t tag);
  // Takes back the newest `count` pushed that the kernel has not taken.
  void unpush(unsigned count);
  bool pop(std::uint64_t& tag, int& result);
  // Returns what the kernel took, or -errno.
  int enter(unsigned submit, unsigned wait_for);

 private:
  void map();
  void unmap();

  int fd_ = -1;
  bool is_abandoned_ = false;
  void* queues_ = nullptr;
  std::size_t queues_bytes_ = 0;
  void* sqes_ = nullptr;
  std::size_t sqes_bytes_ = 0;
  unsigned* sq_tail_ = nullptr;
  unsigned sq_mask_ = 0;
  unsigned* cq_head_ = nullptr;
  unsigned* cq_tail_ = nullptr;
  unsigned cq_mask_ = 0;
  void* cqes_ = nullptr;
};

}  // namespace kvswap
