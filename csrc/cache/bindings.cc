#include "cache/bindings.h"

#include <nanobind/ndarray.h>

#include <stdexcept>

#include "cache/slots.h"

namespace nb = nanobind;

namespace kvswap {
namespace {

template <class T>
using Array = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// The tables of all layers; the arrays are kept alive by whoever made this.
class SlotTable {
 public:
  SlotTable(Matrix<int32_t> row_of, Matrix<int64_t> group_in, Matrix<int64_t> last_used)
      : row_of_(row_of), group_in_(group_in), last_used_(last_used) {}

  int64_t take(int64_t layer, Array<const int64_t> wanted, int64_t step, Array<int64_t> missing,
               Array<int64_t> rows) const {
    const auto count = static_cast<int64_t>(wanted.shape(0));
    const SlotTables tables = of_layer(layer);
    if (static_cast<int64_t>(missing.shape(0)) < count ||
        static_cast<int64_t>(rows.shape(0)) < count) {
      throw std::invalid_argument("missing and rows must have room for all wanted groups");
    }
    for (int64_t i = 0; i < count; ++i) {
      if (wanted.data()[i] < 0 || wanted.data()[i] >= tables.num_groups) {
        throw std::invalid_argument("wanted groups must be those of the tables");
      }
    }
    return take_slots(tables, wanted.data(), count, step, missing.data(), rows.data());
  }

 private:
  SlotTables of_layer(int64_t layer) const {
    if (layer < 0 || layer >= static_cast<int64_t>(row_of_.shape(0))) {
      throw std::invalid_argument("layer must be one of the tables'");
    }
    const auto groups = static_cast<int64_t>(row_of_.shape(1));
    const auto slots = static_cast<int64_t>(group_in_.shape(1));
    return {row_of_.data() + layer * groups,
            group_in_.data() + layer * slots,
            last_used_.data() + layer * slots,
            groups,
            slots,
            layer * slots};
  }

  Matrix<int32_t> row_of_;
  Matrix<int64_t> group_in_, last_used_;
};

}  // namespace

void bind_cache(nb::module_& m) {
  nb::class_<SlotTable>(m, "SlotTable", "Which groups lie in which slots, of all layers.")
      .def(nb::init<Matrix<int32_t>, Matrix<int64_t>, Matrix<int64_t>>(),
           // What is written to must be the caller's own, not a copy of another type.
           nb::arg("row_of").noconvert(), nb::arg("group_in").noconvert(),
           nb::arg("last_used").noconvert())
      .def("take", &SlotTable::take, nb::arg("layer_idx"), nb::arg("wanted"), nb::arg("step"),
           nb::arg("missing").noconvert(), nb::arg("rows").noconvert());
}

}  // namespace kvswap
