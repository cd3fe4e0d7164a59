// Copies are chosen so that the drive that ends last ends about as soon as it can.
#include <algorithm>
#include <vector>

#include "check.h"
#include "placement/routes.h"
#include "random.h"

using namespace kvswap;
using namespace kvswap::test;

namespace {

struct Fleet {
  std::vector<double> bytes_per_s, iops;
  std::vector<int64_t> gaps;
  DriveLimits limits() const {
    return {bytes_per_s.data(),
            iops.data(),
            gaps.data(),
            static_cast<int64_t>(iops.size()),
            16384,
            1 << 20};
  }
};

Fleet fleet(Random& random, int64_t drives) {
  Fleet made;
  for (int64_t drive = 0; drive < drives; ++drive) {
    const auto rate = static_cast<double>(random.between(50, 400));
    made.bytes_per_s.push_back(rate * 1e6);
    made.iops.push_back(rate * 25);
    made.gaps.push_back(23616);
  }
  return made;
}

// When the last drive ends where records lie too far apart to be joined.
double end_of(const Fleet& fleet, const std::vector<int16_t>& drives, int64_t copies,
              const std::vector<int64_t>& picked) {
  std::vector<double> busy(fleet.iops.size(), 0.0);
  for (size_t k = 0; k < picked.size(); ++k) {
    const auto cell = k * static_cast<size_t>(copies) + static_cast<size_t>(picked[k]);
    busy[static_cast<size_t>(drives[cell])] += 1 / fleet.iops[static_cast<size_t>(drives[cell])];
  }
  return *std::max_element(busy.begin(), busy.end());
}

// The same where it is soonest, all choices tried.
double best_end(const Fleet& fleet, const std::vector<int16_t>& drives, int64_t copies,
                std::vector<int64_t>& picked, size_t k = 0) {
  if (k == picked.size()) return end_of(fleet, drives, copies, picked);
  double best = 1e9;
  for (picked[k] = 0; picked[k] < copies; ++picked[k]) {
    if (drives[k * static_cast<size_t>(copies) + static_cast<size_t>(picked[k])] < 0) continue;
    best = std::min(best, best_end(fleet, drives, copies, picked, k + 1));
  }
  return best;
}

}  // namespace

TEST(every_record_is_read_from_a_copy_it_has_and_the_last_drive_ends_about_as_soon_as_can_be) {
  Random random(61);
  double sum = 0;
  constexpr int kRounds = 60;
  for (int round = 0; round < kRounds; ++round) {
    const At at{{"round", round}};
    const int64_t num_drives = random.between(2, 4), copies = 2, count = random.between(1, 9);
    const Fleet drives = fleet(random, num_drives);
    std::vector<int16_t> on;
    std::vector<int64_t> places;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t first = random.below(num_drives), second = random.below(num_drives);
      on.push_back(static_cast<int16_t>(first));
      on.push_back(static_cast<int16_t>(second == first ? -1 : second));
      places.push_back(1000 * k);
      places.push_back(1000 * k + 1000000);
    }
    std::vector<int64_t> picked(static_cast<size_t>(count), -1), tried(picked.size(), 0);
    choose_copies({on.data(), places.data(), count, copies}, drives.limits(), picked.data());
    for (size_t k = 0; k < picked.size(); ++k) {
      CHECK(picked[k] >= 0 && picked[k] < copies);
      CHECK(on[2 * k + static_cast<size_t>(picked[k])] >= 0);
    }
    const double ratio = end_of(drives, on, copies, picked) / best_end(drives, on, copies, tried);
    CHECK(ratio > 1 - 1e-9 && ratio < 2);
    sum += ratio;
  }
  CHECK(sum / kRounds < 1.05);
}

TEST(neighbours_at_home_stay_together_and_nothing_is_nothing) {
  Fleet drives;
  drives.bytes_per_s = {1e8, 1e8}, drives.iops = {2500, 2500}, drives.gaps = {23616, 23616};
  const std::vector<int16_t> on{0, 1, 0, 1};
  const std::vector<int64_t> places{5, 0, 6, 40};
  std::vector<int64_t> picked(2, -1);
  choose_copies({on.data(), places.data(), 2, 2}, drives.limits(), picked.data());
  CHECK(picked == (std::vector<int64_t>{0, 0}));
  choose_copies({on.data(), places.data(), 0, 2}, drives.limits(), picked.data());
}
