#include "placement/routes.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

namespace kvswap {
namespace {

using Int = std::int64_t;
using Ints = std::vector<Int>;
using Doubles = std::vector<double>;

std::size_t at(Int index) { return static_cast<std::size_t>(index); }

double seconds(const DriveLimits& limits, Int drive, Int nbytes) {
  const Int requests = (nbytes + limits.most_bytes - 1) / limits.most_bytes;
  return std::max(static_cast<double>(requests) / limits.iops[drive],
                  static_cast<double>(nbytes) / limits.bytes_per_s[drive]);
}

// Records, by drive and place, that one request reads from whichever drive it goes to.
struct Pieces {
  Ints begins;      // in the order of the records, and where the last ends
  Ints drives;      // [pieces, copies]
  Doubles seconds;  // likewise
};

class Router {
 public:
  Router(const CopyTable& table, const DriveLimits& limits)
      : table_(table), limits_(limits), order_(at(table.count)) {
    std::iota(order_.begin(), order_.end(), Int{0});
    sort_by_place(order_, [this](Int record) { return record * table_.copies; });
  }

  void choose(Int* picked) {
    cut();
    deal();
    relieve();
    Ints chosen(at(table_.count)), home(at(table_.count));
    for (Int record = 0; record < table_.count; ++record) home[at(record)] = record * table_.copies;
    for (std::size_t piece = 0; piece + 1 < pieces_.begins.size(); ++piece) {
      for (Int k = pieces_.begins[piece]; k < pieces_.begins[piece + 1]; ++k) {
        const Int record = order_[at(k)];
        chosen[at(record)] = record * table_.copies + picked_[piece];
      }
    }
    const bool is_better = end_of(chosen) < end_of(home);
    for (Int record = 0; record < table_.count; ++record)
      picked[record] = is_better ? chosen[at(record)] - record * table_.copies : 0;
  }

 private:
  // Sorts what `cell` finds in the table.
  template <class Cell>
  void sort_by_place(Ints& what, Cell cell) const {
    std::stable_sort(what.begin(), what.end(), [&](Int a, Int b) {
      const Int left = cell(a), right = cell(b);
      const auto on = table_.drives[left], other = table_.drives[right];
      return on != other ? on < other : table_.places[left] < table_.places[right];
    });
  }

  // Whether two records, neighbours by place, are so wherever they have copies.
  bool is_near(Int before, Int after) const {
    for (Int copy = 0; copy < table_.copies; ++copy) {
      const Int left = before * table_.copies + copy, right = after * table_.copies + copy;
      const auto drive = table_.drives[right];
      if (table_.drives[left] != drive) return false;
      if (drive < 0) continue;
      const Int step = table_.places[right] - table_.places[left];
      if (step <= 0 || step > limits_.gap_bytes[drive] / limits_.record_bytes + 1) return false;
    }
    return true;
  }

  void cut() {
    for (Int k = 0; k < table_.count; ++k)
      if (!k || !is_near(order_[at(k - 1)], order_[at(k)])) pieces_.begins.push_back(k);
    pieces_.begins.push_back(table_.count);
    for (std::size_t piece = 0; piece + 1 < pieces_.begins.size(); ++piece) {
      const Int first = order_[at(pieces_.begins[piece])] * table_.copies;
      const Int last = order_[at(pieces_.begins[piece + 1] - 1)] * table_.copies;
      for (Int copy = 0; copy < table_.copies; ++copy) {
        const Int drive = table_.drives[first + copy];
        const Int records = table_.places[last + copy] - table_.places[first + copy] + 1;
        pieces_.drives.push_back(drive);
        pieces_.seconds.push_back(
            drive < 0 ? 0.0 : seconds(limits_, drive, records * limits_.record_bytes));
      }
    }
  }

  // Gives single copies to their drives first, then the longest pieces to where they end soonest.
  void deal() {
    const auto count = static_cast<Int>(pieces_.begins.size()) - 1;
    loads_.assign(at(limits_.count), 0.0);
    held_.assign(at(limits_.count), {});
    picked_.assign(at(count), 0);
    Ints shared, copies(at(count));
    for (Int piece = 0; piece < count; ++piece) {
      const Int first = piece * table_.copies;
      for (Int copy = 0; copy < table_.copies; ++copy)
        copies[at(piece)] += pieces_.drives[at(first + copy)] >= 0;
      if (copies[at(piece)] == 1) {
        loads_[at(pieces_.drives[at(first)])] += pieces_.seconds[at(first)];
      } else {
        shared.push_back(piece);
      }
    }
    std::stable_sort(shared.begin(), shared.end(), [&](Int a, Int b) {
      if (copies[at(a)] != copies[at(b)]) return copies[at(a)] < copies[at(b)];
      return pieces_.seconds[at(a * table_.copies)] > pieces_.seconds[at(b * table_.copies)];
    });
    for (const Int piece : shared) {
      double least = std::numeric_limits<double>::infinity();
      for (Int copy = 0; copy < table_.copies; ++copy) {
        const Int cell = piece * table_.copies + copy, drive = pieces_.drives[at(cell)];
        if (drive < 0 || loads_[at(drive)] + pieces_.seconds[at(cell)] >= least) continue;
        least = loads_[at(drive)] + pieces_.seconds[at(cell)];
        picked_[at(piece)] = copy;
      }
      const auto drive = at(pieces_.drives[at(piece * table_.copies + picked_[at(piece)])]);
      loads_[drive] = least;
      held_[drive].push_back(piece);
    }
    num_shared_ = shared.size();
  }

  // Moves pieces from the drive that ends last, as long as it so ends sooner.
  void relieve() {
    for (std::size_t turn = 0; turn < num_shared_; ++turn) {
      const auto last = at(std::max_element(loads_.begin(), loads_.end()) - loads_.begin());
      Int best = -1, best_copy = 0;
      double end = loads_[last] * (1 - 1e-9);
      for (const Int piece : held_[last]) {
        for (Int copy = 0; copy < table_.copies; ++copy) {
          const Int cell = piece * table_.copies + copy, drive = pieces_.drives[at(cell)];
          if (drive < 0 || loads_[at(drive)] + pieces_.seconds[at(cell)] >= end) continue;
          best = piece, best_copy = copy;
          end = loads_[at(drive)] + pieces_.seconds[at(cell)];
        }
      }
      if (best < 0) return;
      loads_[last] -= pieces_.seconds[at(best * table_.copies + picked_[at(best)])];
      const auto drive = at(pieces_.drives[at(best * table_.copies + best_copy)]);
      loads_[drive] = end;
      held_[last].erase(std::find(held_[last].begin(), held_[last].end(), best));
      held_[drive].push_back(best);
      picked_[at(best)] = best_copy;
    }
  }

  // When the last drive ends where each record is read from one cell of the table.
  double end_of(Ints cells) const {
    sort_by_place(cells, [](Int cell) { return cell; });
    Doubles busy(at(limits_.count), 0.0);
    for (std::size_t k = 0; k < cells.size();) {
      const Int first = cells[k], drive = table_.drives[first];
      Int last = first;
      for (++k; k < cells.size() && table_.drives[cells[k]] == drive; ++k) {
        const Int gap = (table_.places[cells[k]] - table_.places[last] - 1) * limits_.record_bytes;
        if (gap > limits_.gap_bytes[drive]) break;
        last = cells[k];
      }
      const Int records = table_.places[last] - table_.places[first] + 1;
      busy[at(drive)] += seconds(limits_, drive, records * limits_.record_bytes);
    }
    return busy.empty() ? 0.0 : *std::max_element(busy.begin(), busy.end());
  }

  const CopyTable& table_;
  const DriveLimits& limits_;
  Ints order_;
  Pieces pieces_;
  Doubles loads_;
  std::vector<Ints> held_;
  Ints picked_;
  std::size_t num_shared_ = 0;
};

}  // namespace

void choose_copies(const CopyTable& table, const DriveLimits& limits, std::int64_t* picked) {
  if (table.count) Router(table, limits).choose(picked);
}

}  // namespace kvswap
