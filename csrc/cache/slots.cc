#include "cache/slots.h"

#include <algorithm>
#include <vector>

namespace kvswap {
namespace {

struct Candidate {
  int64_t last_used, slot;
  bool operator<(const Candidate& other) const {
    return last_used != other.last_used ? last_used < other.last_used : slot < other.slot;
  }
};

// The `count` slots unused for longest, of those that this step does not use.
const std::vector<Candidate>& oldest(const SlotTables& tables, int64_t count, int64_t step) {
  thread_local std::vector<Candidate> found;
  found.clear();
  for (int64_t slot = 0; slot < tables.num_slots; ++slot) {
    if (tables.last_used[slot] < step) found.push_back({tables.last_used[slot], slot});
  }
  if (static_cast<int64_t>(found.size()) > count) {
    std::nth_element(found.begin(), found.begin() + count, found.end());
    found.resize(static_cast<size_t>(count));
  }
  return found;
}

}  // namespace

int64_t take_slots(const SlotTables& tables, const int64_t* wanted, int64_t count, int64_t step,
                   int64_t* missing, int64_t* rows) {
  int64_t num_missing = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t row = tables.row_of[wanted[i]];
    if (row < 0) {
      missing[num_missing++] = wanted[i];
    } else {
      tables.last_used[row - tables.first_row] = step;
    }
  }
  if (!num_missing) return 0;
  const std::vector<Candidate>& given = oldest(tables, num_missing, step);
  if (static_cast<int64_t>(given.size()) < num_missing) return -num_missing - 1;
  for (int64_t i = 0; i < num_missing; ++i) {
    const int64_t slot = given[static_cast<size_t>(i)].slot;
    const int64_t evicted = tables.group_in[slot];
    if (evicted >= 0) tables.row_of[evicted] = -1;
    rows[i] = tables.first_row + slot;
    tables.group_in[slot] = missing[i];
    tables.row_of[missing[i]] = static_cast<int32_t>(rows[i]);
    tables.last_used[slot] = step;
  }
  return num_missing;
}

}  // namespace kvswap
