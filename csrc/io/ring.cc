#include "io/ring.h"

#include <cerrno>

#include "io/uring_abi.h"

#if defined(__linux__)

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

namespace kvswap {
namespace {

unsigned load_acquire(const unsigned* at) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }
void store_release(unsigned* at, unsigned value) { __atomic_store_n(at, value, __ATOMIC_RELEASE); }

void* map_part(int fd, std::size_t nbytes, std::uint64_t offset) {
  void* found = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd,
                     static_cast<off_t>(offset));
  if (found == MAP_FAILED) throw RingError{errno};
  // A child must never drive its parent's ring.
  madvise(found, nbytes, MADV_DONTFORK);
  return found;
}

}  // namespace

Ring::Ring(unsigned entries) {
  abi::Params params{};
  fd_ = static_cast<int>(syscall(abi::kSysSetup, entries, &params));
  if (fd_ < 0) throw RingError{errno};
  fcntl(fd_, F_SETFD, FD_CLOEXEC);
  // Before 5.5 completions could be dropped, and arguments had to outlive the submission.
  constexpr unsigned kNeeded = abi::kFeatSingleMmap | abi::kFeatNoDrop | abi::kFeatSubmitStable;
  try {
    if ((params.features & kNeeded) != kNeeded) throw RingError{EOPNOTSUPP};
    queues_bytes_ = std::max(params.sq.array + params.sq_entries * sizeof(unsigned),
                             params.cq.cqes + params.cq_entries * sizeof(abi::Cqe));
    queues_ = map_part(fd_, queues_bytes_, abi::kOffsetSq);
    sqes_bytes_ = params.sq_entries * sizeof(abi::Sqe);
    sqes_ = map_part(fd_, sqes_bytes_, abi::kOffsetSqes);
  } catch (...) {
    unmap();
    throw;
  }
  auto* base = static_cast<char*>(queues_);
  auto at = [base](std::uint32_t offset) { return reinterpret_cast<unsigned*>(base + offset); };
  sq_tail_ = at(params.sq.tail);
  sq_mask_ = *at(params.sq.ring_mask);
  cq_head_ = at(params.cq.head);
  cq_tail_ = at(params.cq.tail);
  cq_mask_ = *at(params.cq.ring_mask);
  cqes_ = base + params.cq.cqes;
  // The indirection is not used: entry k of the queue is always submission k.
  unsigned* order = at(params.sq.array);
  for (unsigned k = 0; k < params.sq_entries; ++k) order[k] = k;
}

Ring::~Ring() { unmap(); }

void Ring::unmap() {
  if (is_abandoned_) return;
  if (sqes_) munmap(sqes_, sqes_bytes_);
  if (queues_) munmap(queues_, queues_bytes_);
  if (fd_ >= 0) close(fd_);
}

void Ring::push_vectored(bool is_write, int fd, std::int64_t offset, const iovec* pieces,
                         unsigned count, std::uint64_t tag) {
  const unsigned tail = *sq_tail_;  // written by us alone
  auto& entry = static_cast<abi::Sqe*>(sqes_)[tail & sq_mask_];
  std::memset(&entry, 0, sizeof(entry));
  entry.opcode = is_write ? abi::kOpWritev : abi::kOpReadv;
  entry.fd = fd;
  entry.offset = static_cast<std::uint64_t>(offset);
  entry.address = reinterpret_cast<std::uint64_t>(pieces);
  entry.length = count;
  entry.user_data = tag;
  store_release(sq_tail_, tail + 1);
}

void Ring::unpush(unsigned count) { store_release(sq_tail_, *sq_tail_ - count); }

bool Ring::pop(std::uint64_t& tag, int& result) {
  const unsigned head = *cq_head_;  // written by us alone
  if (head == load_acquire(cq_tail_)) return false;
  const auto& entry = static_cast<const abi::Cqe*>(cqes_)[head & cq_mask_];
  tag = entry.user_data;
  result = entry.result;
  store_release(cq_head_, head + 1);
  return true;
}

int Ring::enter(unsigned submit, unsigned wait_for) {
  const unsigned flags = wait_for ? abi::kEnterGetEvents : 0;
  const long taken = syscall(abi::kSysEnter, fd_, submit, wait_for, flags, nullptr, 0);
  return taken < 0 ? -errno : static_cast<int>(taken);
}

}  // namespace kvswap

#else

namespace kvswap {

Ring::Ring(unsigned) { throw RingError{ENOSYS}; }
Ring::~Ring() = default;
void Ring::push_vectored(bool, int, std::int64_t, const iovec*, unsigned, std::uint64_t) {}
void Ring::unpush(unsigned) {}
bool Ring::pop(std::uint64_t&, int&) { return false; }
int Ring::enter(unsigned, unsigned) { return -ENOSYS; }

}  // namespace kvswap

#endif
