// Which groups of one layer lie in which slots, and which of them go first.
//
// The tables are the caller's, and src/kvswap/cache/reuse/buffer.py says what they mean.
#pragma once

#include <cstdint>

namespace kvswap {

struct SlotTables {
  int32_t* row_of;      // [num_groups]: row of the pool, -1 where none
  int64_t* group_in;    // of every row: -1 where empty
  int64_t* last_used;   // of every row: step
  float* priority;      // [num_groups], or null where all are alike
  const int32_t* rows;  // [num_rows]: the layer's own, ascending
  int64_t num_groups, num_rows;
};

// One layer's selection.
struct Wanted {
  const int64_t* groups;
  int64_t count, step;
  float weight;  // added to the priority of each
};

// Marks the slots of the wanted groups as used in this step. Groups that have none get slots, if
// there are enough that this step does not use: empty ones first, then those of the lowest
// priority, of these those unused for longest, of these the first. Then `missing` and `given`
// name the groups and their slots, which ascend, and their number is returned. Where there are
// too few nothing is given out: `missing` names them and -number - 1 is returned.
int64_t take_slots(const SlotTables& tables, const Wanted& wanted, int64_t* missing,
                   int64_t* given);

}  // namespace kvswap
