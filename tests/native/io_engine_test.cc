// The I/O engine under threads, short completions and errors; ends with 77 where the kernel has
// no io_uring to test.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

#include "io/crc32c.h"
#include "io/engine.h"

using namespace kvswap;

namespace {

constexpr std::int64_t kRecord = 4096, kRecords = 512, kRows = 64;

#define CHECK(law)                                                   \
  do {                                                               \
    if (!(law)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #law); \
      std::exit(1);                                                  \
    }                                                                \
  } while (false)

std::uint8_t* pages(std::int64_t nbytes) {
  void* found = mmap(nullptr, static_cast<std::size_t>(nbytes), PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  CHECK(found != MAP_FAILED);
  return static_cast<std::uint8_t*>(found);
}

// A file of records, and their checksums.
struct File {
  File() {
    char name[] = "io_engine_test_XXXXXX";
    fd = mkstemp(name);
    CHECK(fd >= 0);
    unlink(name);
    std::uint8_t* all = pages(kRecords * kRecord);
    std::mt19937 random(1);
    for (std::int64_t k = 0; k < kRecords * kRecord; ++k)
      all[k] = static_cast<std::uint8_t>(random());
    CHECK(pwrite(fd, all, kRecords * kRecord, 0) == kRecords * kRecord);
    for (std::int64_t k = 0; k < kRecords; ++k)
      checksums.push_back(record_checksum(all + k * kRecord, kRecord));
    munmap(all, kRecords * kRecord);
  }
  ~File() { close(fd); }
  int fd;
  std::vector<std::uint32_t> checksums;
};

std::shared_ptr<Plan> random_plan(const File& file, std::mt19937& random, std::uint8_t* rows,
                                  std::uint8_t* scratch) {
  const std::int64_t count = 1 + static_cast<std::int64_t>(random() % kRows);
  std::vector<std::int64_t> ids, offsets, places;
  std::vector<std::int16_t> devices(static_cast<std::size_t>(count));
  std::vector<std::uint32_t> checksums;
  for (std::int64_t k = 0; k < count; ++k) {
    ids.push_back(static_cast<std::int64_t>(random() % kRecords));
    offsets.push_back(ids.back() * kRecord);
    places.push_back(k);
    checksums.push_back(file.checksums[static_cast<std::size_t>(ids.back())]);
  }
  Request ask;
  ask.count = count;
  ask.ids = ids.data();
  ask.devices = devices.data();
  ask.offsets = offsets.data();
  ask.rows = places.data();
  ask.checksums = checksums.data();
  ask.memory = rows;
  ask.num_rows = kRows;
  ask.record_bytes = ask.block_bytes = kRecord;
  ask.scratch = scratch;
  ask.gap_bytes = random() % 2 ? 2 * kRecord : 0;
  ask.most_bytes = 1 << 20;
  auto plan = std::make_shared<Plan>();
  CHECK(make_plan(ask, {{file.fd, 0, kRecords * kRecord}}, *plan));
  return plan;
}

void test_checksums() {
  std::mt19937 random(2);
  std::vector<std::uint8_t> data(20000);
  for (auto& byte : data) byte = static_cast<std::uint8_t>(random());
  for (std::size_t length = 0; length < data.size(); length += 1 + random() % 97) {
    const std::size_t begin = random() % (data.size() - length);
    CHECK(crc32c(&data[begin], length, 5) == crc32c_by_table(&data[begin], length, 5));
  }
  CHECK(crc32c("123456789", 9) == 0xe3069283);
}

// Threads share one engine; some poll, some wait, and some wait for what others submitted.
void test_threads(const File& file) {
  Engine engine(8);
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (unsigned seed = 0; seed < 4; ++seed) {
    threads.emplace_back([&, seed] {
      std::mt19937 random(seed);
      std::uint8_t* rows = pages(kRows * kRecord);
      std::uint8_t* scratch = pages(2 * kRecord);
      for (int turn = 0; turn < 100; ++turn) {
        const auto batch = engine.submit(random_plan(file, random, rows, scratch));
        std::thread other([&] { engine.wait_to_the_end(*batch); });
        if (random() % 2) {
          while (!engine.poll(*batch)) std::this_thread::yield();
        } else {
          engine.wait_to_the_end(*batch);
        }
        for (const Progress& progress : batch->progress)
          wrong += progress.outcome != Outcome::kDone;
        other.join();
      }
    });
  }
  for (auto& thread : threads) thread.join();
  engine.close();
  CHECK(wrong == 0);
}

void test_injected_results(const File& file) {
  Engine engine(4);
  std::mt19937 random(3);
  std::uint8_t* rows = pages(kRows * kRecord);
  std::uint8_t* scratch = pages(2 * kRecord);
  for (int turn = 0; turn < 100; ++turn) {
    const bool is_short = turn % 2;
    engine.inject(0, is_short ? 512 : -EIO);
    const auto batch = engine.submit(random_plan(file, random, rows, scratch));
    engine.wait_to_the_end(*batch);
    int failed = 0;
    for (const Progress& progress : batch->progress) {
      failed += progress.outcome == Outcome::kFailed && progress.code == EIO;
      CHECK(progress.outcome == Outcome::kFailed || progress.outcome == Outcome::kDone);
    }
    CHECK(failed == (is_short ? 0 : 1));
  }
}

void test_closing_waits(const File& file) {
  std::mt19937 random(4);
  std::uint8_t* rows = pages(kRows * kRecord);
  std::uint8_t* scratch = pages(2 * kRecord);
  Engine engine(4);
  const auto batch = engine.submit(random_plan(file, random, rows, scratch));
  engine.close();
  engine.close();
  CHECK(engine.poll(*batch));
  bool is_refused = false;
  try {
    engine.submit(random_plan(file, random, rows, scratch));
  } catch (const ClosedError&) {
    is_refused = true;
  }
  CHECK(is_refused);
}

}  // namespace

int main() {
  test_checksums();
  try {
    Engine probe(1);
  } catch (const RingError& error) {
    std::fprintf(stderr, "no io_uring here: errno %d\n", error.code);
    return 77;
  }
  const File file;
  test_threads(file);
  test_injected_results(file);
  test_closing_waits(file);
  return 0;
}
