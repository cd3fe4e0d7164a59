// Reads and writes through io_uring, where the kernel has it.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <string>
#include <thread>

#include "check.h"
#include "io/crc32c.h"
#include "io/engine.h"
#include "random.h"

using namespace kvswap;
using namespace kvswap::test;

namespace {

constexpr int64_t kRecord = 4096, kRecords = 48;

std::unique_ptr<Engine> engine_of(unsigned depth) {
  try {
    return std::make_unique<Engine>(depth);
  } catch (const RingError& error) {
    throw Skip{"no io_uring here, errno " + std::to_string(error.code)};
  }
}

// A file of random records, gone with this.
class File {
 public:
  File() : data_(kRecords * kRecord) {
    const char* folder = std::getenv("TMPDIR");
    std::string path = std::string(folder ? folder : "/tmp") + "/kvswap-native-XXXXXX";
    fd = mkstemp(path.data());
    CHECK(fd >= 0);
    unlink(path.c_str());
    Random random(90);
    for (uint8_t& each : data_) each = static_cast<uint8_t>(random.next());
    CHECK(pwrite(fd, data_.data(), data_.size(), 0) == static_cast<ssize_t>(data_.size()));
  }
  ~File() { ::close(fd); }
  File(const File&) = delete;
  const uint8_t* record(int64_t k) const { return data_.data() + k * kRecord; }

  int fd;

 private:
  std::vector<uint8_t> data_;
};

// Records of a file, each into a row of its own.
struct Ask {
  std::vector<int64_t> ids, offsets, rows;
  std::vector<int16_t> devices;
  std::vector<uint32_t> checksums;
  std::vector<uint8_t> memory;
  bool is_write = false;

  Ask(const File& file, const std::vector<int64_t>& records)
      : ids(records), devices(records.size(), 0), memory(records.size() * kRecord) {
    for (size_t k = 0; k < records.size(); ++k) {
      offsets.push_back(records[k] * kRecord);
      rows.push_back(static_cast<int64_t>(k));
      checksums.push_back(record_checksum(file.record(records[k]), kRecord));
    }
  }
  std::shared_ptr<Plan> plan(int fd, int64_t most_bytes = 4 * kRecord) {
    Request ask;
    ask.is_write = is_write;
    ask.count = static_cast<int64_t>(ids.size());
    ask.ids = ids.data();
    ask.devices = devices.data();
    ask.offsets = offsets.data();
    ask.rows = is_write ? nullptr : rows.data();
    ask.checksums = is_write ? nullptr : checksums.data();
    ask.memory = memory.data();
    ask.num_rows = ask.count;
    ask.record_bytes = kRecord;
    ask.block_bytes = 512;
    ask.most_bytes = most_bytes;
    auto made = std::make_shared<Plan>();
    CHECK(make_plan(ask, {{fd, 0, 2 * kRecords * kRecord}}, *made));
    return made;
  }
  bool holds(const File& file) const {
    for (size_t k = 0; k < ids.size(); ++k) {
      const uint8_t* row = memory.data() + k * kRecord;
      if (!std::equal(row, row + kRecord, file.record(ids[k]))) return false;
    }
    return true;
  }
};

std::vector<int64_t> shuffled(uint64_t seed) {
  Random random(seed);
  std::vector<int64_t> made;
  for (int64_t k = 0; k < kRecords; ++k) made.push_back(k);
  for (size_t i = made.size(); i > 1; --i) {
    std::swap(made[i - 1], made[static_cast<size_t>(random.below(static_cast<int64_t>(i)))]);
  }
  return made;
}

bool all_are(const Batch& batch, Outcome outcome) {
  return std::all_of(batch.progress.begin(), batch.progress.end(),
                     [&](const Progress& each) { return each.outcome == outcome; });
}

}  // namespace

TEST(a_ring_that_cannot_be_had_says_why) {
  try {
    Ring ring(0);
    CHECK(false);
  } catch (const RingError& error) {
    CHECK(error.code > 0);
  }
}

TEST(all_records_arrive_each_in_its_row_deeper_than_the_queue) {
  const File file;
  for (const unsigned depth : {1u, 3u, 64u}) {
    const auto engine = engine_of(depth);
    Ask ask(file, shuffled(depth));
    const auto batch = engine->submit(ask.plan(file.fd, kRecord));
    engine->wait_to_the_end(*batch);
    CHECK(all_are(*batch, Outcome::kDone));
    CHECK(ask.holds(file));
  }
}

TEST(what_is_written_can_be_read_with_its_checksums) {
  const File file;
  const auto engine = engine_of(8);
  Ask out(file, shuffled(1));
  for (size_t k = 0; k < out.ids.size(); ++k) {
    std::copy_n(file.record(out.ids[k]), kRecord, out.memory.data() + k * kRecord);
  }
  out.is_write = true;
  CHECK(ftruncate(file.fd, 0) == 0);
  const auto written = engine->submit(out.plan(file.fd));
  engine->wait_to_the_end(*written);
  CHECK(all_are(*written, Outcome::kDone));
  CHECK(written->checksums.size() == out.ids.size());
  Ask in(file, shuffled(2));
  const auto read = engine->submit(in.plan(file.fd));
  engine->wait_to_the_end(*read);
  CHECK(all_are(*read, Outcome::kDone));
  CHECK(in.holds(file));
}

TEST(a_record_that_was_changed_is_corrupt_and_named) {
  const File file;
  const auto engine = engine_of(4);
  CHECK(pwrite(file.fd, "x", 1, 5 * kRecord + 17) == 1);
  Ask ask(file, {4, 5, 6});
  const auto plan = ask.plan(file.fd);
  const auto batch = engine->submit(plan);
  engine->wait_to_the_end(*batch);
  CHECK(batch->progress[0].outcome == Outcome::kCorrupt);
  CHECK(plan->records[static_cast<size_t>(batch->progress[0].record)].id == 5);
}

TEST(a_file_that_ends_too_soon_is_truncated_with_its_length) {
  const File file;
  const auto engine = engine_of(4);
  CHECK(ftruncate(file.fd, 2 * kRecord + 100) == 0);
  Ask ask(file, {1, 2, 3});
  const auto batch = engine->submit(ask.plan(file.fd));
  engine->wait_to_the_end(*batch);
  CHECK(batch->progress[0].outcome == Outcome::kTruncated);
  CHECK(batch->progress[0].file_bytes == 2 * kRecord + 100);
}

TEST(a_short_transfer_goes_on_where_it_stopped) {
  const File file;
  for (const int moved : {1, 100, 4096, 5000}) {
    const At at{{"moved", moved}};
    const auto engine = engine_of(4);
    engine->inject(0, moved);
    Ask ask(file, {7, 3, 4, 5, 6});
    const auto batch = engine->submit(ask.plan(file.fd, 8 * kRecord));
    engine->wait_to_the_end(*batch);
    CHECK(all_are(*batch, Outcome::kDone));
    CHECK(ask.holds(file));
  }
}

TEST(a_passing_failure_is_tried_again_and_another_is_told) {
  const File file;
  const auto engine = engine_of(4);
  for (const int code : {EAGAIN, EINTR, EIO}) {
    const At at{{"errno", code}};
    engine->inject(0, -code);
    Ask ask(file, {9});
    const auto batch = engine->submit(ask.plan(file.fd));
    engine->wait_to_the_end(*batch);
    CHECK(batch->progress[0].outcome == (code == EIO ? Outcome::kFailed : Outcome::kDone));
    CHECK(batch->progress[0].code == (code == EIO ? EIO : 0));
  }
}

TEST(a_descriptor_that_is_none_is_told) {
  const File file;
  const auto engine = engine_of(4);
  Ask ask(file, {1, 9});
  const auto batch = engine->submit(ask.plan(1 << 20));
  engine->wait_to_the_end(*batch);
  CHECK(all_are(*batch, Outcome::kFailed));
  CHECK(batch->progress[0].code == EBADF);
}

TEST(nothing_to_move_has_ended_at_once) {
  const auto engine = engine_of(2);
  const auto batch = engine->submit(std::make_shared<Plan>());
  CHECK(batch->has_ended);
  CHECK(engine->poll(*batch));
}

TEST(several_threads_may_submit_and_wait_at_once) {
  const File file;
  const auto engine = engine_of(4);
  std::vector<std::thread> threads;
  std::vector<int> right(4);
  for (size_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (uint64_t round = 0; round < 6; ++round) {
        Ask first(file, shuffled(10 * t + round)), second(file, shuffled(100 + t));
        const auto a = engine->submit(first.plan(file.fd, kRecord));
        const auto b = engine->submit(second.plan(file.fd));
        engine->wait_to_the_end(*b);
        while (!engine->poll(*a)) std::this_thread::yield();
        right[t] += all_are(*a, Outcome::kDone) && first.holds(file) && second.holds(file);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK((right == std::vector<int>{6, 6, 6, 6}));
}

TEST(closing_waits_for_what_is_in_flight_and_ends_submissions) {
  const File file;
  const auto engine = engine_of(2);
  Ask ask(file, shuffled(5));
  const auto batch = engine->submit(ask.plan(file.fd, kRecord));
  engine->close();
  engine->close();
  engine->wait_to_the_end(*batch);
  CHECK(ask.holds(file));
  try {
    engine->submit(ask.plan(file.fd));
    CHECK(false);
  } catch (const ClosedError&) {
  }
}
