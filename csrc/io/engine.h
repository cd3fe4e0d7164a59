// Reads and writes through one io_uring, submitted and reaped by the threads that call.
//
// No thread of its own: a submission is pushed by whoever submits, and completions are taken
// from the shared queue by whoever waits or asks. Only one thread at a time takes them; others
// that wait are woken by it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "io/plan.h"
#include "io/ring.h"

namespace kvswap {

enum class Outcome : std::uint8_t {
  kInFlight,
  kLanded,
  kDone,
  kFailed,
  kTruncated,
  kStuck,
  kCorrupt
};

// What became of one transfer.
struct Progress {
  std::int64_t moved = 0;
  Outcome outcome = Outcome::kInFlight;
  int attempts = 0;
  int code = 0;                 // errno
  std::int64_t file_bytes = 0;  // of a truncated file
  std::int32_t record = -1;     // the corrupt one
  std::uint32_t found = 0;      // its checksum
};

// Transfers of one submission. Members are the engine's until the batch has ended.
struct Batch {
  explicit Batch(std::shared_ptr<const Plan> made);

  std::shared_ptr<const Plan> plan;
  std::vector<Progress> progress;
  std::vector<std::uint32_t> checksums;  // of written records, by place
  std::vector<std::int32_t> landed;      // moved, and not yet checked
  std::size_t unlanded;
  std::size_t unchecked;
  std::atomic<bool> has_ended;
};

struct ForkedError : std::runtime_error {
  ForkedError() : std::runtime_error("made by another process") {}
};
struct ClosedError : std::runtime_error {
  ClosedError() : std::runtime_error("closed") {}
};

class Engine {
 public:
  // Throws RingError.
  explicit Engine(unsigned depth);
  ~Engine();

  // Throws ForkedError, ClosedError.
  std::shared_ptr<Batch> submit(std::shared_ptr<const Plan> plan);
  // Whether nothing of it is in flight; takes what has completed. False in a forked child.
  bool poll(Batch& batch);
  // Waits until it has ended. False where a signal, or a moment without news, came first.
  // Throws ForkedError.
  bool wait(Batch& batch);
  void wait_to_the_end(Batch& batch);
  // Waits for everything in flight and gives the ring back; safe to call again.
  void close();
  bool is_forked() const;

  // For tests: the completion after `countdown` others has this result instead.
  void inject(int countdown, int result);

 private:
  struct Work {
    std::shared_ptr<Batch> batch;
    std::int32_t transfer = 0;
  };
  struct Place {
    Work work;
    std::vector<iovec> pieces;  // of a transfer that goes on after a short one
  };

  void pump();
  void push(std::size_t place);
  bool flush();
  void fail_queued(int code);
  void reap();
  void block(std::unique_lock<std::mutex>& lock, bool& was_interrupted);
  void land(std::size_t place, int result);
  void end_transfer(const Work& work, Outcome outcome);
  void check(Batch& batch, const std::vector<std::int32_t>& landed);
  bool check_some(Batch& batch, std::unique_lock<std::mutex>& lock);

  const int owner_;
  std::unique_ptr<Ring> ring_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool has_reaper_ = false;
  bool is_closed_ = false;
  unsigned queued_ = 0;  // pushed, and not taken by the kernel
  std::vector<Place> places_;
  std::vector<std::size_t> free_;
  std::vector<std::size_t> pushed_;  // places of what is queued, oldest first
  std::deque<Work> waiting_;
  int countdown_ = -1;
  int injected_ = 0;
};

// Compares or computes the checksums of one transfer's records; on the first that differs
// returns false and names it.
bool check_records(const Plan& plan, std::int32_t transfer, std::int32_t& record,
                   std::uint32_t& found);

}  // namespace kvswap
