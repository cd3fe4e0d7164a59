// Which groups of one layer lie in which slots, least recently used out first.
//
// The tables are the caller's, and src/kvswap/cache/reuse.py says what they mean.
#pragma once

#include <cstdint>

namespace kvswap {

struct SlotTables {
  int32_t* row_of;     // [num_groups]: row of the pool, -1 where none
  int64_t* group_in;   // [num_slots]: -1 where empty
  int64_t* last_used;  // [num_slots]: step
  int64_t num_groups, num_slots;
  int64_t first_row;  // of this layer's slots in the pool
};

// Marks the slots of the wanted groups as used in this step. Groups that have none get the
// slots unused for longest, if there are enough that this step does not use; then `missing`
// and `rows` name them and their slots, and their number is returned. Where there are too few
// nothing is given out: `missing` names them and -number - 1 is returned.
int64_t take_slots(const SlotTables& tables, const int64_t* wanted, int64_t count, int64_t step,
                   int64_t* missing, int64_t* rows);

}  // namespace kvswap
