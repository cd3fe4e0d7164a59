// The slot table against a plain model of which groups go first.
#include <algorithm>
#include <map>
#include <set>
#include <tuple>

#include "cache/slots.h"
#include "check.h"
#include "random.h"

using namespace kvswap;
using namespace kvswap::test;

namespace {

// One layer's slots are every other row of a pool.
struct Tables {
  std::vector<int32_t> row_of, rows;
  std::vector<int64_t> group_in, last_used;
  std::vector<float> priority;
  bool has_priority;

  Tables(int64_t groups, int64_t slots, bool with_priority)
      : row_of(static_cast<size_t>(groups), -1),
        group_in(static_cast<size_t>(2 * slots), -1),
        last_used(static_cast<size_t>(2 * slots), -1),
        priority(static_cast<size_t>(groups), 0.0f),
        has_priority(with_priority) {
    for (int64_t i = 0; i < slots; ++i) rows.push_back(static_cast<int32_t>(2 * i + 1));
  }
  SlotTables view() {
    return {row_of.data(),
            group_in.data(),
            last_used.data(),
            has_priority ? priority.data() : nullptr,
            rows.data(),
            static_cast<int64_t>(row_of.size()),
            static_cast<int64_t>(rows.size())};
  }
  int64_t take(const std::vector<int64_t>& groups, int64_t step, float weight = 1.0f) {
    missing.assign(groups.size(), -1);
    given.assign(groups.size(), -1);
    const Wanted wanted{groups.data(), static_cast<int64_t>(groups.size()), step, weight};
    return take_slots(view(), wanted, missing.data(), given.data());
  }
  int32_t row(int64_t group) const { return row_of[static_cast<size_t>(group)]; }

  std::vector<int64_t> missing, given;
};

}  // namespace

TEST(the_lowest_go_first_then_those_unused_for_longest_and_nothing_in_use_ever_does) {
  Random random(60);
  for (int round = 0; round < 80; ++round) {
    const int64_t groups = random.between(1, 30), slots = random.between(1, 12);
    Tables tables(groups, slots, round % 2);
    std::map<int64_t, int64_t> held;      // group: step of its last use
    std::map<int64_t, float> priorities;  // of all groups ever asked for
    for (int64_t step = 1; step < 40; ++step) {
      const At at{{"round", round}, {"step", step}};
      std::set<int64_t> wanted;
      for (int64_t i = random.between(0, slots + 2); i > 0; --i)
        wanted.insert(random.below(groups));
      const std::vector<int64_t> asked(wanted.begin(), wanted.end());
      std::vector<int64_t> absent;
      const float weight = round % 2 ? static_cast<float>(random.between(0, 3)) : 0.0f;
      for (const int64_t group : asked) {
        priorities[group] += weight;
        if (held.count(group)) {
          held[group] = step;
        } else {
          absent.push_back(group);
        }
      }
      const int64_t found = tables.take(asked, step, weight);
      const auto num_absent = static_cast<int64_t>(absent.size());
      const bool fits = static_cast<int64_t>(asked.size()) <= slots;
      CHECK(found == (fits ? num_absent : -num_absent - 1));
      tables.missing.resize(absent.size());
      CHECK(tables.missing == absent);
      if (!fits) continue;
      tables.given.resize(absent.size());
      CHECK(std::is_sorted(tables.given.begin(), tables.given.end()));
      CHECK(std::set<int64_t>(tables.given.begin(), tables.given.end()).size() == absent.size());
      for (size_t i = 0; i < absent.size(); ++i) {
        CHECK(tables.given[i] % 2 == 1 && tables.given[i] < 2 * slots);
        CHECK(tables.row(absent[i]) == tables.given[i]);
      }
      using Key = std::pair<float, int64_t>;
      Key highest_gone{-1.0f, -1}, lowest_left{1e9f, step};
      for (const auto& [group, used] : held) {
        const Key key{priorities[group], used};
        if (tables.row(group) < 0) {
          CHECK(used < step);
          highest_gone = std::max(highest_gone, key);
        } else {
          CHECK(tables.group_in[static_cast<size_t>(tables.row(group))] == group);
          if (used < step) lowest_left = std::min(lowest_left, key);
        }
      }
      CHECK(highest_gone <= lowest_left);
      std::erase_if(held, [&](const auto& each) { return tables.row(each.first) < 0; });
      for (const int64_t group : absent) held[group] = step;
      CHECK(static_cast<int64_t>(held.size()) <= slots);
    }
  }
}

TEST(slots_that_are_empty_are_given_before_any_group_goes) {
  for (const bool with_priority : {false, true}) {
    Tables tables(9, 4, with_priority);
    CHECK(tables.take({5}, 1, 0.0f) == 1);
    CHECK(tables.take({1, 2, 3}, 2, 0.0f) == 3);
    CHECK(tables.row(5) >= 0);
  }
}

TEST(where_there_are_too_few_nothing_is_given_out) {
  Tables tables(9, 2, true);
  tables.take({5, 6}, 1);
  CHECK(tables.take({5, 1, 2}, 2) == -3);
  CHECK(tables.missing[0] == 1 && tables.missing[1] == 2);
  CHECK(tables.row(5) >= 0 && tables.row(6) >= 0);
  CHECK(tables.row(1) < 0 && tables.row(2) < 0);
}
