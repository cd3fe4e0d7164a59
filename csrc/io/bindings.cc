#include "io/bindings.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>

#include <cerrno>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "io/crc32c.h"
#include "io/engine.h"
#include "io/pacer.h"
#include "io/plan.h"

namespace nb = nanobind;

namespace kvswap {
namespace {

// The memory of an array, held for as long as this lives.
class View {
 public:
  View() = default;
  View(nb::handle object, const char* formats, Py_ssize_t item_bytes, int flags) {
    if (PyObject_GetBuffer(object.ptr(), &view_, flags | PyBUF_FORMAT | PyBUF_C_CONTIGUOUS)) {
      PyErr_Clear();
      return;
    }
    is_held_ = true;
    is_good_ = view_.itemsize == item_bytes && view_.format && view_.format[0] &&
               !view_.format[1] && std::strchr(formats, view_.format[0]);
  }
  View(View&& other) noexcept { *this = std::move(other); }
  View& operator=(View&& other) noexcept {
    std::swap(view_, other.view_);
    std::swap(is_held_, other.is_held_);
    std::swap(is_good_, other.is_good_);
    return *this;
  }
  ~View() {
    if (is_held_) PyBuffer_Release(&view_);
  }
  bool has(int ndim, std::int64_t count) const {
    return is_good_ && view_.ndim == ndim && view_.shape[0] == count;
  }
  bool is_good() const { return is_good_; }
  const Py_buffer& operator*() const { return view_; }
  template <class T>
  T* data() const {
    return static_cast<T*>(view_.buf);
  }

 private:
  Py_buffer view_{};
  bool is_held_ = false, is_good_ = false;
};

// Bytes whose checksum costs less than giving the interpreter's lock away and back.
constexpr std::int64_t kBrief = 65536;

View ints(nb::handle object) { return View(object, "lq", 8, 0); }

// A plan, and the memory that it is about, which parts of the plan share.
struct PlanHandle {
  std::shared_ptr<Plan> plan = std::make_shared<Plan>();
  std::shared_ptr<const View> memory, scratch;
};

std::vector<Device> devices_of(nb::tuple files) {
  std::vector<Device> devices;
  for (nb::handle file : files) {
    auto fields = nb::cast<nb::tuple>(file);
    devices.push_back({nb::cast<int>(fields[0]), nb::cast<std::int64_t>(fields[1]),
                       nb::cast<std::int64_t>(fields[2])});
  }
  return devices;
}

// What a device can use: whole records in one piece, on a boundary of pages or blocks.
bool can_hold(const View& memory, std::int64_t record_bytes, bool is_write) {
  if (!memory.is_good() || (*memory).ndim != 2 || (*memory).shape[1] != record_bytes) return false;
  const std::int64_t unit = std::min<std::int64_t>(record_bytes & -record_bytes, 4096);
  return reinterpret_cast<std::uintptr_t>((*memory).buf) % static_cast<std::uintptr_t>(unit) == 0 &&
         (is_write || !(*memory).readonly);
}

// Takes the checksums of some records out of the table of all; false where one is not in it.
bool look_up(const View& table, const View& ids, std::vector<std::uint32_t>& out) {
  if (!table.is_good() || (*table).ndim != 1) return false;
  for (Py_ssize_t k = 0; k < (*ids).shape[0]; ++k) {
    const std::int64_t id = ids.data<std::int64_t>()[k];
    if (id < 0 || id >= (*table).shape[0]) return false;
    out.push_back(table.data<std::uint32_t>()[id]);
  }
  return true;
}

std::unique_ptr<PlanHandle> plan(nb::handle ids, nb::handle devices, nb::handle offsets,
                                 nb::handle rows, nb::handle checksums, nb::handle memory,
                                 nb::handle scratch, nb::tuple files, std::int64_t record_bytes,
                                 std::int64_t block_bytes, std::int64_t gap_bytes,
                                 std::int64_t most_bytes, bool is_write) {
  auto made = std::make_unique<PlanHandle>();
  made->memory = std::make_shared<View>(memory, "B", 1, 0);
  made->scratch = std::make_shared<View>(scratch, "B", 1, 0);
  const View id(ints(ids)), offset(ints(offsets)), device(devices, "h", 2, 0);
  if (!id.is_good() || (*id).ndim != 1) return nullptr;
  Request ask;
  ask.count = (*id).shape[0];
  if (!offset.has(1, ask.count) || !device.has(1, ask.count)) return nullptr;
  if (!can_hold(*made->memory, record_bytes, is_write)) return nullptr;
  View row;
  std::vector<std::uint32_t> expected;
  if (is_write) {
    if ((**made->memory).shape[0] != ask.count) return nullptr;
  } else {
    row = ints(rows);
    if (!row.has(1, ask.count)) return nullptr;
    if (!look_up(View(checksums, "IL", 4, 0), id, expected)) return nullptr;
    ask.rows = row.data<std::int64_t>();
    ask.checksums = expected.data();
    ask.gap_bytes = made->scratch->is_good() ? std::min(gap_bytes, (**made->scratch).len) : 0;
  }
  ask.is_write = is_write;
  ask.ids = id.data<std::int64_t>();
  ask.offsets = offset.data<std::int64_t>();
  ask.devices = device.data<std::int16_t>();
  ask.memory = made->memory->data<std::uint8_t>();
  ask.num_rows = (**made->memory).shape[0];
  ask.scratch = made->scratch->data<std::uint8_t>();
  ask.record_bytes = record_bytes;
  ask.block_bytes = block_bytes;
  ask.most_bytes = most_bytes;
  if (!make_plan(ask, devices_of(files), *made->plan)) return nullptr;
  return made;
}

std::unique_ptr<PlanHandle> part(const PlanHandle& handle, int device) {
  auto made = std::make_unique<PlanHandle>();
  *made->plan = part_of(*handle.plan, device);
  made->memory = handle.memory;
  made->scratch = handle.scratch;
  return made;
}

nb::list record_column(const PlanHandle& handle, const std::string& name) {
  nb::list out;
  for (const Record& record : handle.plan->records) {
    if (name == "ids") out.append(record.id);
    if (name == "rows") out.append(record.row);
    if (name == "offsets") out.append(record.offset);
    if (name == "checksums") out.append(record.checksum);
  }
  return out;
}

nb::list transfers(const PlanHandle& handle) {
  nb::list out;
  for (const Transfer& transfer : handle.plan->transfers)
    out.append(nb::make_tuple(transfer.device, transfer.offset, transfer.nbytes,
                              transfer.first_record, transfer.last_record));
  return out;
}

nb::object check_transfer(const PlanHandle& handle, std::int32_t transfer) {
  if (transfer < 0 || static_cast<std::size_t>(transfer) >= handle.plan->transfers.size())
    throw nb::index_error();
  std::int32_t record;
  std::uint32_t found;
  const auto check = [&] { return check_records(*handle.plan, transfer, record, found); };
  bool is_right;
  if (handle.plan->transfers[static_cast<std::size_t>(transfer)].nbytes <= kBrief) {
    is_right = check();
  } else {
    nb::gil_scoped_release unlocked;
    is_right = check();
  }
  if (is_right) return nb::none();
  return nb::make_tuple(record, found);
}

// Work in flight; what it was made of is kept until it has ended.
class TicketHandle {
 public:
  TicketHandle(std::shared_ptr<Engine> engine, std::shared_ptr<Batch> batch, nb::object plan)
      : engine_(std::move(engine)), batch_(std::move(batch)), plan_(std::move(plan)) {}
  TicketHandle(const TicketHandle&) = delete;
  ~TicketHandle() {
    if (batch_->has_ended) return;
    if (engine_->is_forked()) {  // the parent's business; its memory may be in use there
      plan_.release();
      return;
    }
    nb::gil_scoped_release unlocked;
    engine_->wait_to_the_end(*batch_);
  }

  bool done() {
    nb::gil_scoped_release unlocked;
    return engine_->poll(*batch_);
  }

  void wait() {
    for (;;) {
      bool has_ended;
      {
        nb::gil_scoped_release unlocked;
        has_ended = engine_->wait(*batch_);
      }
      if (has_ended) return;
      if (PyErr_CheckSignals()) {
        nb::python_error error;
        {
          nb::gil_scoped_release unlocked;
          engine_->wait_to_the_end(*batch_);
        }
        throw error;
      }
    }
  }

  nb::tuple outcome() const {
    if (!batch_->has_ended) throw nb::value_error("the ticket is still in flight");
    std::int64_t num_done = 0, nbytes = 0;
    nb::list failures;
    for (std::size_t k = 0; k < batch_->progress.size(); ++k) {
      const Progress& progress = batch_->progress[k];
      const bool has_moved =
          progress.outcome == Outcome::kDone || progress.outcome == Outcome::kCorrupt;
      if (has_moved) {
        num_done += 1;
        nbytes += batch_->plan->transfers[k].nbytes;
      }
      if (progress.outcome != Outcome::kDone) failures.append(failure(k, progress));
    }
    return nb::make_tuple(num_done, nbytes, failures);
  }

  nb::bytes checksums() const {
    return nb::bytes(reinterpret_cast<const char*>(batch_->checksums.data()),
                     batch_->checksums.size() * sizeof(std::uint32_t));
  }

 private:
  static nb::tuple failure(std::size_t transfer, const Progress& progress) {
    const char* kind = "device";
    std::int64_t value = progress.code;
    if (progress.outcome == Outcome::kTruncated) {
      kind = "truncated";
      value = progress.file_bytes;
    } else if (progress.outcome == Outcome::kStuck) {
      kind = "stuck";
    } else if (progress.outcome == Outcome::kCorrupt) {
      kind = "corrupt";
      value = progress.found;
    }
    return nb::make_tuple(transfer, kind, value, progress.moved, progress.record);
  }

  std::shared_ptr<Engine> engine_;
  std::shared_ptr<Batch> batch_;
  nb::object plan_;
};

struct EngineHandle {
  explicit EngineHandle(unsigned depth) {
    try {
      engine = std::make_shared<Engine>(depth);
    } catch (const RingError& error) {
      errno = error.code;
      PyErr_SetFromErrno(PyExc_OSError);
      throw nb::python_error();
    }
  }
  std::shared_ptr<Engine> engine;
};

std::unique_ptr<TicketHandle> submit(EngineHandle& handle, nb::object plan) {
  auto made = nb::cast<PlanHandle&>(plan).plan;
  std::shared_ptr<Batch> batch;
  {
    nb::gil_scoped_release unlocked;
    batch = handle.engine->submit(std::move(made));
  }
  return std::make_unique<TicketHandle>(handle.engine, std::move(batch), std::move(plan));
}

void close(EngineHandle& handle) {
  nb::gil_scoped_release unlocked;
  handle.engine->close();
}

void hold_until(std::int64_t moment_ns) {
  for (;;) {
    bool is_over;
    {
      nb::gil_scoped_release unlocked;
      is_over = sleep_until(moment_ns);
    }
    if (is_over) return;
    if (PyErr_CheckSignals()) throw nb::python_error();
  }
}

std::uint32_t checksum(nb::handle data, std::uint32_t crc) {
  Py_buffer view;
  if (PyObject_GetBuffer(data.ptr(), &view, PyBUF_C_CONTIGUOUS)) throw nb::python_error();
  const std::uint32_t found = crc32c(view.buf, static_cast<std::size_t>(view.len), crc);
  PyBuffer_Release(&view);
  return found;
}

}  // namespace

void bind_io(nb::module_& module) {
  using namespace nb::literals;
  nb::exception<ForkedError>(module, "ForkedError");
  nb::exception<ClosedError>(module, "ClosedError");
  nb::class_<PlanHandle>(module, "Plan")
      .def("transfers", &transfers)
      .def("column", &record_column, "name"_a)
      .def("check", &check_transfer, "transfer"_a)
      .def("part", &part, "device"_a)
      .def("__len__", [](const PlanHandle& self) { return self.plan->transfers.size(); });
  module.def("plan", &plan, "ids"_a, "devices"_a, "offsets"_a, "rows"_a.none(),
             "checksums"_a.none(), "memory"_a, "scratch"_a, "files"_a, "record_bytes"_a,
             "block_bytes"_a, "gap_bytes"_a, "most_bytes"_a, "is_write"_a);
  nb::class_<TicketHandle>(module, "Ticket")
      .def("done", &TicketHandle::done)
      .def("wait", &TicketHandle::wait)
      .def("outcome", &TicketHandle::outcome)
      .def("checksums", &TicketHandle::checksums);
  nb::class_<EngineHandle>(module, "Engine")
      .def(nb::init<unsigned>(), "depth"_a)
      .def("submit", &submit, "plan"_a)
      .def("close", &close)
      .def(
          "inject",
          [](EngineHandle& self, int countdown, int result) {
            self.engine->inject(countdown, result);
          },
          "countdown"_a, "result"_a);
  nb::class_<Pacer>(module, "Pacer")
      .def(nb::init<double, double>(), "bytes_per_s"_a, "iops"_a)
      .def(
          "charge", [](Pacer& self, const PlanHandle& handle) { return self.charge(*handle.plan); },
          "plan"_a);
  module.def("hold_until", &hold_until, "moment_ns"_a);
  module.def("now_ns", &now_ns);
  module.def("crc32c", &checksum, "data"_a, "crc"_a = 0);
  module.def("has_crc32c_instruction", &has_crc32c_instruction);
}

}  // namespace kvswap
