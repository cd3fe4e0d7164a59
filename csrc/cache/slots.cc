#include "cache/slots.h"

#include <algorithm>
#include <vector>

namespace kvswap {
namespace {

struct Candidate {
  float priority;
  int64_t last_used, row;
  bool operator<(const Candidate& other) const {
    if (priority != other.priority) return priority < other.priority;
    return last_used != other.last_used ? last_used < other.last_used : row < other.row;
  }
};

float priority_of(const SlotTables& tables, int64_t row) {
  const int64_t group = tables.group_in[row];
  if (group < 0) return -1.0f;
  return tables.priority ? tables.priority[group] : 0.0f;
}

// The `count` slots that go first, of those that this step does not use, by their rows.
const std::vector<Candidate>& lowest(const SlotTables& tables, int64_t count, int64_t step) {
  thread_local std::vector<Candidate> found;
  found.clear();
  for (int64_t i = 0; i < tables.num_rows; ++i) {
    const int64_t row = tables.rows[i], last_used = tables.last_used[row];
    if (last_used < step) found.push_back({priority_of(tables, row), last_used, row});
  }
  if (static_cast<int64_t>(found.size()) > count) {
    std::nth_element(found.begin(), found.begin() + count, found.end());
    found.resize(static_cast<size_t>(count));
  }
  // Which group lies where must not depend on how the lowest are found.
  std::sort(found.begin(), found.end(),
            [](const Candidate& one, const Candidate& other) { return one.row < other.row; });
  return found;
}

}  // namespace

int64_t take_slots(const SlotTables& tables, const Wanted& wanted, int64_t* missing,
                   int64_t* given) {
  int64_t num_missing = 0;
  for (int64_t i = 0; i < wanted.count; ++i) {
    const int64_t group = wanted.groups[i];
    const int32_t row = tables.row_of[group];
    if (tables.priority) tables.priority[group] += wanted.weight;
    if (row < 0) {
      missing[num_missing++] = group;
    } else {
      tables.last_used[row] = wanted.step;
    }
  }
  if (!num_missing) return 0;
  const std::vector<Candidate>& found = lowest(tables, num_missing, wanted.step);
  if (static_cast<int64_t>(found.size()) < num_missing) return -num_missing - 1;
  for (int64_t i = 0; i < num_missing; ++i) {
    const int64_t row = found[static_cast<size_t>(i)].row, evicted = tables.group_in[row];
    if (evicted >= 0) tables.row_of[evicted] = -1;
    given[i] = row;
    tables.group_in[row] = missing[i];
    tables.row_of[missing[i]] = static_cast<int32_t>(row);
    tables.last_used[row] = wanted.step;
  }
  return num_missing;
}

}  // namespace kvswap
