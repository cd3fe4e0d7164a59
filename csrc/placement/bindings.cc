#include "placement/bindings.h"

#include <stdexcept>

#include "common/arrays.h"
#include "placement/routes.h"

namespace nb = nanobind;

namespace kvswap {
namespace {

// The limits of a store's drives; the arrays are kept alive with it.
class CopyChooser {
 public:
  CopyChooser(Array<const double> bytes_per_s, Array<const double> iops,
              Array<const int64_t> gap_bytes, int64_t record_bytes, int64_t most_bytes)
      : bytes_per_s_(bytes_per_s), iops_(iops), gap_bytes_(gap_bytes) {
    const size_t count = iops.shape(0);
    if (bytes_per_s.shape(0) != count || gap_bytes.shape(0) != count || !count) {
      throw std::invalid_argument("limits must be of the same drives, one at least");
    }
    if (record_bytes < 1 || most_bytes < 1) {
      throw std::invalid_argument("records and requests must hold a byte");
    }
    limits_ = {bytes_per_s.data(),          iops.data(),  gap_bytes.data(),
               static_cast<int64_t>(count), record_bytes, most_bytes};
  }

  void choose(Matrix<const int16_t> drives, Matrix<const int64_t> places,
              Array<int64_t> picked) const {
    const size_t count = drives.shape(0), copies = drives.shape(1);
    if (places.shape(0) != count || places.shape(1) != copies || picked.shape(0) != count) {
      throw std::invalid_argument("drives, places and picked must be of the same records");
    }
    for (size_t k = 0; k < count * copies; ++k) {
      const int64_t drive = drives.data()[k];
      if (drive >= limits_.count || drive < (k % copies ? -1 : 0)) {
        throw std::invalid_argument("drives must be those with limits, and the first not missing");
      }
    }
    const CopyTable table{drives.data(), places.data(), static_cast<int64_t>(count),
                          static_cast<int64_t>(copies)};
    choose_copies(table, limits_, picked.data());
  }

 private:
  Array<const double> bytes_per_s_, iops_;
  Array<const int64_t> gap_bytes_;
  DriveLimits limits_;
};

}  // namespace

void bind_placement(nb::module_& m) {
  nb::class_<CopyChooser>(m, "CopyChooser", "Chooses from which copy each record is read.")
      .def(nb::init<Array<const double>, Array<const double>, Array<const int64_t>, int64_t,
                    int64_t>(),
           nb::arg("bytes_per_s"), nb::arg("iops"), nb::arg("gap_bytes"), nb::arg("record_bytes"),
           nb::arg("most_bytes"))
      .def("choose", &CopyChooser::choose, nb::arg("drives"), nb::arg("places"),
           nb::arg("picked").noconvert());
}

}  // namespace kvswap
