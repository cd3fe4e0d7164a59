#include "io/engine.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <thread>

#include "io/crc32c.h"

namespace kvswap {
namespace {

constexpr int kMostAttempts = 1000;  // of a transfer that is to be tried again
constexpr unsigned kBurst = 8;       // the device begins with these while the next are prepared
constexpr auto kMoment = std::chrono::milliseconds(20);
constexpr auto kPause = std::chrono::milliseconds(1);

bool is_passing(int code) { return code == EAGAIN || code == EINTR || code == ECANCELED; }

std::int64_t file_bytes(int fd) {
  struct stat state{};
  return fstat(fd, &state) ? 0 : static_cast<std::int64_t>(state.st_size);
}

// What is left of some pieces after their first bytes.
void skip(const iovec* first, const iovec* last, std::int64_t moved, std::vector<iovec>& out) {
  out.clear();
  for (; first != last; ++first) {
    const auto length = static_cast<std::int64_t>(first->iov_len);
    if (moved < length) {
      auto* base = static_cast<char*>(first->iov_base) + moved;
      out.push_back({base, static_cast<std::size_t>(length - moved)});
    }
    moved = std::max<std::int64_t>(0, moved - length);
  }
}

}  // namespace

bool check_records(const Plan& plan, std::int32_t transfer, std::int32_t& record,
                   std::uint32_t& found) {
  const Transfer& moved = plan.transfers[static_cast<std::size_t>(transfer)];
  for (record = moved.first_record; record < moved.last_record; ++record) {
    const Record& mine = plan.records[static_cast<std::size_t>(record)];
    found = record_checksum(plan.row(mine.row), static_cast<std::size_t>(plan.record_bytes));
    if (found != mine.checksum) return false;
  }
  return true;
}

Batch::Batch(std::shared_ptr<const Plan> made)
    : plan(std::move(made)),
      progress(plan->transfers.size()),
      unlanded(plan->transfers.size()),
      unchecked(plan->transfers.size()),
      has_ended(plan->transfers.empty()) {}

Engine::Engine(unsigned depth)
    : owner_(getpid()), ring_(std::make_unique<Ring>(depth)), places_(depth) {
  for (std::size_t place = depth; place-- > 0;) free_.push_back(place);
}

Engine::~Engine() {
  if (is_forked()) {
    if (ring_) ring_->abandon();
  } else {
    close();
  }
}

bool Engine::is_forked() const { return getpid() != owner_; }

std::shared_ptr<Batch> Engine::submit(std::shared_ptr<const Plan> plan) {
  if (is_forked()) throw ForkedError();
  auto batch = std::make_shared<Batch>(std::move(plan));
  {
    std::lock_guard lock(mutex_);
    if (is_closed_) throw ClosedError();
    for (std::size_t k = 0; k < batch->progress.size(); ++k)
      waiting_.push_back({batch, static_cast<std::int32_t>(k)});
    pump();
  }
  if (batch->plan->is_write) {  // while the device is busy; nobody else has the batch yet
    for (const Record& record : batch->plan->records) {
      const auto nbytes = static_cast<std::size_t>(batch->plan->record_bytes);
      batch->checksums.push_back(record_checksum(batch->plan->row(record.row), nbytes));
    }
  }
  return batch;
}

bool Engine::poll(Batch& batch) {
  if (batch.has_ended) return true;
  if (is_forked()) return false;
  std::unique_lock lock(mutex_);
  if (!has_reaper_) reap();
  while (check_some(batch, lock)) {
  }
  return batch.has_ended;
}

bool Engine::wait(Batch& batch) {
  if (batch.has_ended) return true;
  if (is_forked()) throw ForkedError();
  std::unique_lock lock(mutex_);
  if (!has_reaper_) reap();
  bool was_interrupted = false;
  while (!batch.has_ended) {
    if (check_some(batch, lock)) continue;
    if (was_interrupted) return false;
    block(lock, was_interrupted);
  }
  return true;
}

void Engine::wait_to_the_end(Batch& batch) {
  while (!wait(batch)) {
  }
}

void Engine::close() {
  if (is_forked()) return;
  std::unique_lock lock(mutex_);
  is_closed_ = true;
  bool ignored = false;
  while (ring_ && (has_reaper_ || free_.size() < places_.size() || !waiting_.empty()))
    block(lock, ignored);
  ring_.reset();
}

void Engine::inject(int countdown, int result) {
  std::lock_guard lock(mutex_);
  countdown_ = countdown;
  injected_ = result;
}

// Gives the kernel as much as the depth allows.
void Engine::pump() {
  while (!waiting_.empty() && !free_.empty()) {
    const std::size_t place = free_.back();
    free_.pop_back();
    places_[place].work = std::move(waiting_.front());
    waiting_.pop_front();
    push(place);
    while (queued_ >= kBurst && !flush()) {
    }
  }
  while (!flush()) {
  }
}

void Engine::push(std::size_t place) {
  Place& here = places_[place];
  const Plan& plan = *here.work.batch->plan;
  const auto index = static_cast<std::size_t>(here.work.transfer);
  const Transfer& transfer = plan.transfers[index];
  const std::int64_t moved = here.work.batch->progress[index].moved;
  const iovec* first = plan.pieces.data() + transfer.first_piece;
  auto count = static_cast<unsigned>(transfer.last_piece - transfer.first_piece);
  if (moved) {
    skip(first, first + count, moved, here.pieces);
    first = here.pieces.data();
    count = static_cast<unsigned>(here.pieces.size());
  }
  ring_->push_vectored(plan.is_write, transfer.fd, transfer.offset + moved, first, count, place);
  pushed_.push_back(place);
  ++queued_;
}

// Hands over what is queued; false where that is to be tried again now.
bool Engine::flush() {
  if (!queued_) return true;
  const int taken = ring_->enter(queued_, 0);
  if (taken > 0) {
    queued_ -= static_cast<unsigned>(taken);
    pushed_.erase(pushed_.begin(), pushed_.begin() + taken);
    return !queued_;
  }
  if (taken == -EINTR) return false;
  const bool is_busy = taken == 0 || taken == -EAGAIN || taken == -EBUSY;
  const std::size_t taken_before = places_.size() - free_.size() - queued_;
  if (is_busy && taken_before) return true;  // again when one of those has completed
  fail_queued(taken ? -taken : EIO);
  return true;
}

void Engine::fail_queued(int code) {
  ring_->unpush(queued_);
  queued_ = 0;
  for (const std::size_t place : pushed_) {
    Work work = std::move(places_[place].work);
    free_.push_back(place);
    work.batch->progress[static_cast<std::size_t>(work.transfer)].code = code;
    end_transfer(work, Outcome::kFailed);
  }
  pushed_.clear();
}

void Engine::reap() {
  if (!ring_) return;
  std::uint64_t place;
  int result;
  bool has_news = false;
  while (ring_->pop(place, result)) {
    land(static_cast<std::size_t>(place), result);
    has_news = true;
  }
  if (has_news || queued_) pump();
  if (has_news) changed_.notify_all();
}

// Waits, unlocked, until there is news; takes it if no other thread is doing so.
void Engine::block(std::unique_lock<std::mutex>& lock, bool& was_interrupted) {
  if (has_reaper_ || free_.size() == places_.size()) {
    if (changed_.wait_for(lock, kMoment) == std::cv_status::timeout) was_interrupted = true;
    return;
  }
  has_reaper_ = true;
  lock.unlock();
  const int taken = ring_->enter(0, 1);
  if (taken < 0 && taken != -EINTR) std::this_thread::sleep_for(kPause);
  lock.lock();
  has_reaper_ = false;
  reap();
  changed_.notify_all();
  was_interrupted = was_interrupted || taken == -EINTR;
}

// A completion: the transfer has ended, or goes on.
void Engine::land(std::size_t place, int result) {
  Work work = std::move(places_[place].work);
  free_.push_back(place);
  if (countdown_ >= 0 && countdown_-- == 0)
    result = injected_ < 0 || result < 0 ? injected_ : std::min(result, injected_);
  const auto index = static_cast<std::size_t>(work.transfer);
  const Plan& plan = *work.batch->plan;
  const Transfer& transfer = plan.transfers[index];
  Progress& progress = work.batch->progress[index];
  if (result < 0) {
    if (is_passing(-result) && ++progress.attempts < kMostAttempts) {
      waiting_.push_front(std::move(work));
      return;
    }
    progress.code = -result;
    end_transfer(work, Outcome::kFailed);
    return;
  }
  progress.moved += result;
  if (progress.moved >= transfer.nbytes) {
    end_transfer(work, Outcome::kLanded);
    return;
  }
  if (plan.is_write) {
    if (result == 0) {
      end_transfer(work, Outcome::kStuck);
      return;
    }
  } else {
    // At the end of the file direct I/O may stop between blocks, where going on is EINVAL.
    progress.file_bytes = file_bytes(transfer.fd);
    if (result == 0 || progress.file_bytes < transfer.offset + transfer.nbytes) {
      end_transfer(work, Outcome::kTruncated);
      return;
    }
  }
  waiting_.push_front(std::move(work));
}

void Engine::end_transfer(const Work& work, Outcome outcome) {
  Batch& batch = *work.batch;
  batch.progress[static_cast<std::size_t>(work.transfer)].outcome = outcome;
  batch.landed.push_back(work.transfer);
  --batch.unlanded;
}

// Checks what has landed, unlocked; false where nothing has.
bool Engine::check_some(Batch& batch, std::unique_lock<std::mutex>& lock) {
  if (batch.landed.empty()) return false;
  std::vector<std::int32_t> landed;
  landed.swap(batch.landed);
  lock.unlock();
  check(batch, landed);
  lock.lock();
  batch.unchecked -= landed.size();
  if (!batch.unchecked) {
    batch.has_ended = true;
    changed_.notify_all();
  }
  return true;
}

void Engine::check(Batch& batch, const std::vector<std::int32_t>& landed) {
  for (const std::int32_t transfer : landed) {
    Progress& progress = batch.progress[static_cast<std::size_t>(transfer)];
    if (progress.outcome != Outcome::kLanded) continue;
    const bool is_right = batch.plan->is_write ||
                          check_records(*batch.plan, transfer, progress.record, progress.found);
    progress.outcome = is_right ? Outcome::kDone : Outcome::kCorrupt;
  }
}

}  // namespace kvswap
