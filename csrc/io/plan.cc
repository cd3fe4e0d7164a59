#include "io/plan.h"

#include <algorithm>

namespace kvswap {
namespace {

constexpr std::int64_t kMostPieces = 1024;  // IOV_MAX wherever this runs

bool collect(const Request& ask, const std::vector<Device>& devices, std::vector<Record>& out) {
  out.resize(static_cast<std::size_t>(ask.count));
  const std::int64_t unaligned = ask.block_bytes - 1;
  for (std::int64_t k = 0; k < ask.count; ++k) {
    const int device = ask.devices[k];
    const std::int64_t offset = ask.offsets[k], row = ask.rows ? ask.rows[k] : k;
    if (device < 0 || device >= static_cast<int>(devices.size())) return false;
    const Device& file = devices[static_cast<std::size_t>(device)];
    if (offset < 0 || (offset & unaligned) || offset > file.reserved_bytes - ask.record_bytes)
      return false;
    if (row < 0 || row >= ask.num_rows || ask.ids[k] < 0) return false;
    const std::uint32_t checksum = ask.checksums ? ask.checksums[k] : 0;
    if (ask.checksums && !checksum) return false;
    out[static_cast<std::size_t>(k)] = {ask.ids[k], file.record_start + offset, row, checksum,
                                        static_cast<std::int16_t>(device)};
  }
  return true;
}

// Adds a record, and what lies between it and the one before, to the last transfer.
void extend(const Request& ask, Plan& plan, Transfer& last, std::int64_t gap, std::int64_t row) {
  std::uint8_t* at = ask.memory + row * ask.record_bytes;
  const auto nbytes = static_cast<std::size_t>(ask.record_bytes);
  if (gap) plan.pieces.push_back({ask.scratch, static_cast<std::size_t>(gap)});
  const bool has_pieces = static_cast<std::size_t>(last.first_piece) < plan.pieces.size();
  iovec* before = has_pieces ? &plan.pieces.back() : nullptr;
  if (before && static_cast<std::uint8_t*>(before->iov_base) + before->iov_len == at && !gap) {
    before->iov_len += nbytes;
  } else {
    plan.pieces.push_back({at, nbytes});
  }
  last.nbytes += gap + ask.record_bytes;
  last.last_record += 1;
  last.last_piece = static_cast<std::int32_t>(plan.pieces.size());
}

void join(const Request& ask, const std::vector<Device>& devices, Plan& plan) {
  const std::int64_t most = std::max(ask.most_bytes, ask.record_bytes);
  std::int32_t k = 0;
  for (const Record& record : plan.records) {
    std::int64_t gap = -1;
    if (k) {
      const Transfer& last = plan.transfers.back();
      gap = record.offset - (last.offset + last.nbytes);
      const Record& before = plan.records[static_cast<std::size_t>(k) - 1];
      const bool follows = !gap && record.row == before.row + 1;
      const std::int64_t more = gap ? 2 : follows ? 0 : 1;
      const bool joins = last.device == record.device && gap >= 0 && gap <= ask.gap_bytes &&
                         last.nbytes + gap + ask.record_bytes <= most &&
                         last.last_piece - last.first_piece + more <= kMostPieces;
      if (!joins) gap = -1;
    }
    if (gap < 0) {
      const auto piece = static_cast<std::int32_t>(plan.pieces.size());
      const int fd = devices[static_cast<std::size_t>(record.device)].fd;
      plan.transfers.push_back({record.device, fd, record.offset, 0, k, k, piece, piece});
      gap = 0;
    }
    extend(ask, plan, plan.transfers.back(), gap, record.row);
    ++k;
  }
}

}  // namespace

std::int64_t Plan::num_bytes() const {
  std::int64_t sum = 0;
  for (const Transfer& transfer : transfers) sum += transfer.nbytes;
  return sum;
}

bool make_plan(const Request& request, const std::vector<Device>& devices, Plan& plan) {
  plan.is_write = request.is_write;
  plan.memory = request.memory;
  plan.record_bytes = request.record_bytes;
  if (!collect(request, devices, plan.records)) return false;
  std::stable_sort(plan.records.begin(), plan.records.end(), [](const Record& a, const Record& b) {
    return a.device != b.device ? a.device < b.device : a.offset < b.offset;
  });
  plan.pieces.reserve(plan.records.size());
  join(request, devices, plan);
  return true;
}

Plan part_of(const Plan& plan, int device) {
  Plan part;
  part.is_write = plan.is_write;
  part.memory = plan.memory;
  part.record_bytes = plan.record_bytes;
  for (const Transfer& transfer : plan.transfers) {
    if (transfer.device != device) continue;
    const auto record = static_cast<std::int32_t>(part.records.size()) - transfer.first_record;
    const auto piece = static_cast<std::int32_t>(part.pieces.size()) - transfer.first_piece;
    part.records.insert(part.records.end(), plan.records.begin() + transfer.first_record,
                        plan.records.begin() + transfer.last_record);
    part.pieces.insert(part.pieces.end(), plan.pieces.begin() + transfer.first_piece,
                       plan.pieces.begin() + transfer.last_piece);
    part.transfers.push_back(transfer);
    Transfer& mine = part.transfers.back();
    mine.first_record += record;
    mine.last_record += record;
    mine.first_piece += piece;
    mine.last_piece += piece;
  }
  return part;
}

}  // namespace kvswap
