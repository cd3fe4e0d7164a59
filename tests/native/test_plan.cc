// From records to transfers: every record once, where it belongs, and nothing too large.
#include <map>

#include "check.h"
#include "io/plan.h"
#include "random.h"

using namespace kvswap;
using namespace kvswap::test;

namespace {

constexpr int64_t kRecord = 1024, kBlock = 512;

struct Asked {
  std::vector<int64_t> ids, offsets, rows;
  std::vector<int16_t> devices;
  std::vector<uint32_t> checksums;
  std::vector<uint8_t> memory, scratch;
  std::vector<Device> files{{10, 4096, 64 * kRecord}, {11, 0, 64 * kRecord}};
  int64_t gap_bytes = 0, most_bytes = 8 * kRecord;
  bool is_write = false;

  explicit Asked(int64_t count)
      : checksums(static_cast<size_t>(count), 7),
        memory(static_cast<size_t>((count + 3) * kRecord)),
        scratch(8 * kRecord) {}

  Request request() {
    Request ask;
    ask.is_write = is_write;
    ask.count = static_cast<int64_t>(ids.size());
    ask.ids = ids.data();
    ask.devices = devices.data();
    ask.offsets = offsets.data();
    ask.rows = is_write ? nullptr : rows.data();
    ask.checksums = is_write ? nullptr : checksums.data();
    ask.memory = memory.data();
    ask.num_rows = static_cast<int64_t>(memory.size()) / kRecord;
    ask.record_bytes = kRecord;
    ask.block_bytes = kBlock;
    ask.scratch = scratch.data();
    ask.gap_bytes = gap_bytes;
    ask.most_bytes = most_bytes;
    return ask;
  }
  bool plan(Plan& out) { return make_plan(request(), files, out); }
};

Asked some_records(Random& random) {
  const int64_t count = random.between(1, 24);
  Asked asked(count);
  std::map<std::pair<int, int64_t>, bool> taken;
  for (int64_t k = 0; k < count; ++k) {
    const auto device = static_cast<int16_t>(random.below(2));
    const int64_t place = random.below(63);
    if (taken[{device, place}]) continue;
    taken[{device, place}] = true;
    asked.ids.push_back(k);
    asked.devices.push_back(device);
    asked.offsets.push_back(place * kRecord);
    asked.rows.push_back(k);
  }
  if (random.below(2)) {
    for (size_t k = 0; k < asked.rows.size(); ++k)
      asked.rows[k] = static_cast<int64_t>(asked.rows.size() - k);
  }
  asked.gap_bytes = random.one_of<int64_t>({0, kRecord, 4 * kRecord});
  asked.most_bytes = random.one_of<int64_t>({1, 3 * kRecord, 64 * kRecord});
  return asked;
}

// Walks the pieces of a transfer as the kernel would fill them.
void expect_filled(const Asked& asked, const Plan& plan, const Transfer& transfer) {
  int64_t at = transfer.offset;
  std::int32_t record = transfer.first_record;
  for (std::int32_t p = transfer.first_piece; p < transfer.last_piece; ++p) {
    const iovec& piece = plan.pieces[static_cast<size_t>(p)];
    const auto* base = static_cast<const uint8_t*>(piece.iov_base);
    if (base == asked.scratch.data()) {
      CHECK(static_cast<int64_t>(piece.iov_len) <= asked.gap_bytes);
      at += static_cast<int64_t>(piece.iov_len);
      continue;
    }
    CHECK(piece.iov_len % kRecord == 0);
    for (size_t done = 0; done < piece.iov_len; done += kRecord, ++record, at += kRecord) {
      const Record& here = plan.records[static_cast<size_t>(record)];
      CHECK(here.offset == at);
      CHECK(plan.row(here.row) == base + done);
      CHECK(here.device == transfer.device);
    }
  }
  CHECK(record == transfer.last_record);
  CHECK(at == transfer.offset + transfer.nbytes);
  CHECK(transfer.nbytes <= std::max(asked.most_bytes, kRecord));
}

}  // namespace

TEST(every_record_is_moved_once_to_its_own_row) {
  Random random(80);
  for (int round = 0; round < 300; ++round) {
    const At at{{"round", round}};
    Asked asked = some_records(random);
    Plan plan;
    CHECK(asked.plan(plan));
    CHECK(plan.records.size() == asked.ids.size());
    std::int32_t next = 0, piece = 0;
    int64_t sum = 0;
    for (const Transfer& transfer : plan.transfers) {
      CHECK(transfer.first_record == next && transfer.first_piece == piece);
      CHECK(transfer.fd == asked.files[static_cast<size_t>(transfer.device)].fd);
      expect_filled(asked, plan, transfer);
      next = transfer.last_record;
      piece = transfer.last_piece;
      sum += transfer.nbytes;
    }
    CHECK(static_cast<size_t>(next) == plan.records.size());
    CHECK(plan.num_bytes() == sum);
  }
}

TEST(parts_of_a_plan_are_what_it_moves_on_each_device) {
  Random random(81);
  for (int round = 0; round < 100; ++round) {
    const At at{{"round", round}};
    Asked asked = some_records(random);
    Plan plan;
    CHECK(asked.plan(plan));
    size_t record = 0, transfer = 0;
    for (int device = 0; device < static_cast<int>(asked.files.size()); ++device) {
      const Plan part = part_of(plan, device);
      std::int32_t next = 0, piece = 0;
      for (const Transfer& mine : part.transfers) {
        const Transfer& whole = plan.transfers[transfer++];
        CHECK(mine.device == device && mine.fd == whole.fd);
        CHECK(mine.offset == whole.offset && mine.nbytes == whole.nbytes);
        CHECK(mine.first_record == next && mine.first_piece == piece);
        expect_filled(asked, part, mine);
        next = mine.last_record;
        piece = mine.last_piece;
      }
      CHECK(static_cast<size_t>(next) == part.records.size());
      CHECK(static_cast<size_t>(piece) == part.pieces.size());
      for (const Record& mine : part.records) {
        const Record& whole = plan.records[record++];
        CHECK(mine.id == whole.id && mine.row == whole.row && mine.checksum == whole.checksum);
      }
    }
    CHECK(record == plan.records.size() && transfer == plan.transfers.size());
  }
}

TEST(neighbours_in_place_and_in_memory_are_one_piece) {
  Asked asked(4);
  asked.ids = {3, 1, 2, 0};
  asked.devices = {0, 0, 0, 0};
  asked.offsets = {3 * kRecord, 1 * kRecord, 2 * kRecord, 0};
  asked.rows = {3, 1, 2, 0};
  Plan plan;
  CHECK(asked.plan(plan));
  CHECK(plan.transfers.size() == 1 && plan.pieces.size() == 1);
  CHECK(plan.transfers[0].offset == 4096 && plan.transfers[0].nbytes == 4 * kRecord);
}

TEST(no_transfer_has_more_pieces_than_a_call_may_have) {
  Asked asked(3000);
  asked.files[0].reserved_bytes = 4000 * kRecord;
  asked.most_bytes = 4000 * kRecord;
  for (int64_t k = 0; k < 3000; ++k) {
    asked.ids.push_back(k);
    asked.devices.push_back(0);
    asked.offsets.push_back(k * kRecord);
    asked.rows.push_back(2999 - k);
  }
  Plan plan;
  CHECK(asked.plan(plan));
  for (const Transfer& transfer : plan.transfers)
    CHECK(transfer.last_piece - transfer.first_piece <= 1024);
  CHECK(plan.transfers.size() == 3);
}

TEST(what_does_not_fit_together_is_refused) {
  const auto refused = [](auto&& spoil) {
    Asked asked(1);
    asked.ids = {0};
    asked.devices = {0};
    asked.offsets = {kRecord};
    asked.rows = {0};
    Plan good, bad;
    CHECK(asked.plan(good));
    spoil(asked);
    CHECK(!asked.plan(bad));
  };
  refused([](Asked& a) { a.ids[0] = -1; });
  refused([](Asked& a) { a.devices[0] = 2; });
  refused([](Asked& a) { a.devices[0] = -1; });
  refused([](Asked& a) { a.offsets[0] = 100; });
  refused([](Asked& a) { a.offsets[0] = -kRecord; });
  refused([](Asked& a) { a.offsets[0] = 64 * kRecord; });
  refused([](Asked& a) { a.rows[0] = -1; });
  refused([](Asked& a) { a.rows[0] = 4; });
  refused([](Asked& a) { a.checksums[0] = 0; });
}
