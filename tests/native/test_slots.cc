// The slot table against a plain model of least recently used.
#include <map>
#include <set>

#include "cache/slots.h"
#include "check.h"
#include "random.h"

using namespace kvswap;
using namespace kvswap::test;

namespace {

struct Tables {
  std::vector<int32_t> row_of;
  std::vector<int64_t> group_in, last_used;
  int64_t first_row;

  Tables(int64_t groups, int64_t slots, int64_t first)
      : row_of(static_cast<size_t>(groups), -1),
        group_in(static_cast<size_t>(slots), -1),
        last_used(static_cast<size_t>(slots), -1),
        first_row(first) {}
  SlotTables view() {
    return {row_of.data(),
            group_in.data(),
            last_used.data(),
            static_cast<int64_t>(row_of.size()),
            static_cast<int64_t>(group_in.size()),
            first_row};
  }
  int64_t slot_of(int64_t group) const { return row_of[static_cast<size_t>(group)] - first_row; }
};

}  // namespace

TEST(what_was_unused_for_longest_goes_first_and_nothing_in_use_ever_does) {
  Random random(60);
  for (int round = 0; round < 60; ++round) {
    const int64_t groups = random.between(1, 30), slots = random.between(1, 12);
    Tables tables(groups, slots, random.one_of<int64_t>({0, 7}) * slots);
    std::map<int64_t, int64_t> held;  // group: step of its last use
    for (int64_t step = 1; step < 40; ++step) {
      const At at{{"round", round}, {"step", step}};
      std::set<int64_t> wanted;
      for (int64_t i = random.between(0, slots + 2); i > 0; --i)
        wanted.insert(random.below(groups));
      std::vector<int64_t> asked(wanted.begin(), wanted.end()), absent;
      for (const int64_t group : asked) {
        if (held.count(group)) {
          held[group] = step;
        } else {
          absent.push_back(group);
        }
      }
      std::vector<int64_t> missing(asked.size()), rows(asked.size());
      const int64_t found =
          take_slots(tables.view(), asked.data(), static_cast<int64_t>(asked.size()), step,
                     missing.data(), rows.data());
      const auto num_absent = static_cast<int64_t>(absent.size());
      const bool fits = static_cast<int64_t>(asked.size()) <= slots;
      CHECK(found == (fits ? num_absent : -num_absent - 1));
      missing.resize(absent.size());
      CHECK(missing == absent);
      if (!fits) continue;
      rows.resize(absent.size());
      CHECK(std::set<int64_t>(rows.begin(), rows.end()).size() == rows.size());
      for (size_t i = 0; i < absent.size(); ++i) {
        CHECK(rows[i] >= tables.first_row && rows[i] < tables.first_row + slots);
        CHECK(tables.row_of[static_cast<size_t>(absent[i])] == rows[i]);
      }
      std::vector<int64_t> gone;
      int64_t oldest_left = step;
      for (const auto& [group, used] : held) {
        if (tables.slot_of(group) < 0) {
          gone.push_back(used);
        } else {
          CHECK(tables.group_in[static_cast<size_t>(tables.slot_of(group))] == group);
          oldest_left = std::min(oldest_left, used);
        }
      }
      for (const int64_t used : gone) CHECK(used < step && used <= oldest_left);
      std::erase_if(held, [&](const auto& each) { return tables.slot_of(each.first) < 0; });
      for (const int64_t group : absent) held[group] = step;
      CHECK(static_cast<int64_t>(held.size()) <= slots);
    }
  }
}

TEST(slots_that_are_empty_are_given_before_any_group_goes) {
  Tables tables(9, 4, 0);
  std::vector<int64_t> missing(4), rows(4);
  const int64_t first[] = {5}, second[] = {1, 2, 3};
  CHECK(take_slots(tables.view(), first, 1, 1, missing.data(), rows.data()) == 1);
  CHECK(take_slots(tables.view(), second, 3, 2, missing.data(), rows.data()) == 3);
  CHECK(tables.row_of[5] >= 0);
}

TEST(where_there_are_too_few_nothing_is_given_out) {
  Tables tables(9, 2, 0);
  std::vector<int64_t> missing(3), rows(3);
  const int64_t held[] = {5, 6}, wanted[] = {5, 1, 2};
  take_slots(tables.view(), held, 2, 1, missing.data(), rows.data());
  CHECK(take_slots(tables.view(), wanted, 3, 2, missing.data(), rows.data()) == -3);
  CHECK(missing[0] == 1 && missing[1] == 2);
  CHECK(tables.row_of[5] >= 0 && tables.row_of[6] >= 0);
  CHECK(tables.row_of[1] < 0 && tables.row_of[2] < 0);
}
