#include "cache/bindings.h"

#include <nanobind/stl/optional.h>

#include <optional>
#include <stdexcept>

#include "cache/slots.h"
#include "common/arrays.h"

namespace nb = nanobind;

namespace kvswap {
namespace {

template <class T>
bool all_below(const Array<const T>& values, int64_t end) {
  for (size_t i = 0; i < values.shape(0); ++i) {
    if (values.data()[i] < 0 || values.data()[i] >= end) return false;
  }
  return true;
}

// The tables of all layers; the arrays are kept alive by whoever made this.
class SlotTable {
 public:
  SlotTable(Matrix<int32_t> row_of, Array<int64_t> group_in, Array<int64_t> last_used,
            std::optional<Matrix<float>> priority)
      : row_of_(row_of), group_in_(group_in), last_used_(last_used), priority_(priority) {
    const bool alike = !priority || (priority->shape(0) == row_of.shape(0) &&
                                     priority->shape(1) == row_of.shape(1));
    if (!alike || group_in.shape(0) != last_used.shape(0)) {
      throw std::invalid_argument("tables must be of the same groups and rows");
    }
  }

  int64_t take(int64_t layer, Array<const int32_t> rows, Array<const int64_t> wanted, int64_t step,
               float weight, Array<int64_t> missing, Array<int64_t> given) const {
    if (layer < 0 || layer >= static_cast<int64_t>(row_of_.shape(0))) {
      throw std::invalid_argument("layer must be one of the tables'");
    }
    if (missing.shape(0) < wanted.shape(0) || given.shape(0) < wanted.shape(0)) {
      throw std::invalid_argument("missing and given must have room for all wanted groups");
    }
    const auto num_groups = static_cast<int64_t>(row_of_.shape(1));
    if (!all_below(wanted, num_groups)) {
      throw std::invalid_argument("wanted groups must be those of the tables");
    }
    if (!all_below(rows, static_cast<int64_t>(group_in_.shape(0)))) {
      throw std::invalid_argument("rows must be those of the tables");
    }
    const SlotTables tables{row_of_.data() + layer * num_groups,
                            group_in_.data(),
                            last_used_.data(),
                            priority_ ? priority_->data() + layer * num_groups : nullptr,
                            rows.data(),
                            num_groups,
                            static_cast<int64_t>(rows.shape(0))};
    const Wanted selection{wanted.data(), static_cast<int64_t>(wanted.shape(0)), step, weight};
    return take_slots(tables, selection, missing.data(), given.data());
  }

 private:
  Matrix<int32_t> row_of_;
  Array<int64_t> group_in_, last_used_;
  std::optional<Matrix<float>> priority_;
};

}  // namespace

void bind_cache(nb::module_& m) {
  nb::class_<SlotTable>(m, "SlotTable", "Which groups lie in which slots, of all layers.")
      .def(
          nb::init<Matrix<int32_t>, Array<int64_t>, Array<int64_t>, std::optional<Matrix<float>>>(),
          // What is written to must be the caller's own, not a copy of another type.
          nb::arg("row_of").noconvert(), nb::arg("group_in").noconvert(),
          nb::arg("last_used").noconvert(), nb::arg("priority").noconvert().none())
      .def("take", &SlotTable::take, nb::arg("layer_idx"), nb::arg("rows"), nb::arg("wanted"),
           nb::arg("step"), nb::arg("weight"), nb::arg("missing").noconvert(),
           nb::arg("given").noconvert());
}

}  // namespace kvswap
