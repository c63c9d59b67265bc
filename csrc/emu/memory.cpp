#include "memory.h"

#include <algorithm>
#include <limits>

namespace hypenet::emu {
namespace {

// The addresses of a tensor's first byte and of the byte past its last one.
std::pair<uintptr_t, uintptr_t> span(const Tensor& x) {
  int64_t first = 0, last = 0;
  for (size_t i = 0; i < x.shape.size(); ++i) {
    if (x.shape[i] == 0) return {x.address, x.address};
    const int64_t reach = (x.shape[i] - 1) * x.strides[i];
    (reach < 0 ? first : last) += reach;
  }
  const auto bytes = static_cast<int64_t>(x.element_bytes);
  return {x.address + first * bytes, x.address + (last + 1) * bytes};
}

// Calls visit(address, bytes) for every contiguous run of a tensor.
template <class Visit>
void for_each_run(const Tensor& x, size_t dim, uintptr_t address, const Visit& visit) {
  const bool last = dim + 1 == x.shape.size();
  if (dim == x.shape.size()) return visit(address, x.element_bytes);
  if (last && (x.strides[dim] == 1 || x.shape[dim] == 1))
    return visit(address, x.shape[dim] * x.element_bytes);
  for (int64_t i = 0; i < x.shape[dim]; ++i) {
    for_each_run(x, dim + 1, address + i * x.strides[dim] * static_cast<int64_t>(x.element_bytes), visit);
  }
}

}  // namespace

Problem Shadow::after_write(const Write& last, const Accessor& by) const {
  if (last.time < launch_start_) return Problem::kNone;
  if (last.time < block_start_) return Problem::kOtherBlockWrote;
  if (last.pending) return Problem::kPending;
  const int actor = last.thread / kMaxWarps, lane = last.thread % kMaxWarps;
  const bool ordered =
      actor == by.warp ? lane == by.lane || last.time < by.synced : by.seen[actor].covers(last.time, lane);
  return ordered ? Problem::kNone : Problem::kRaceWithWrite;
}

Finding Shadow::finding(Problem problem, size_t granule) const {
  const Write& last = writes_[granule];
  return {problem, granule * kGranule, last.thread / kMaxWarps, last.thread % kMaxWarps, last.time};
}

Finding Shadow::after_reads(size_t granule, const Accessor& by) {
  for (int warp = 0; warp < std::ssize(reads_); ++warp) {
    const Read last = reads_[warp][granule];
    const Time time = last / 64;
    const int lane = static_cast<int>(last % 64);
    if (time < launch_start_ || last == 0) continue;
    if (time < block_start_) return {Problem::kOtherBlockRead, granule * kGranule, warp, lane, time};
    const bool ordered =
        warp == by.warp ? lane == by.lane || time < by.synced : by.seen[warp].covers(time, lane);
    if (!ordered) return {Problem::kRaceWithRead, granule * kGranule, warp, lane, time};
  }
  for (int group = 0; group < std::ssize(group_reads_); ++group) {
    const Time time = group_reads_[group][granule];
    if (time >= launch_start_ && time > by.seen[kFirstWarpgroup + group].all) {
      return {Problem::kRaceWithRead, granule * kGranule, kFirstWarpgroup + group, 0, time};
    }
  }
  if (earlier_reads_[granule] >= launch_start_ && earlier_reads_[granule] != 0) {
    return {Problem::kOtherBlockRead, granule * kGranule, 0, kManyLanes, 0};
  }
  return {};
}

Finding Shadow::read(size_t offset, size_t bytes, const Accessor& by, bool must_be_written) {
  const size_t begin = offset / kGranule, end = (offset + bytes - 1) / kGranule + 1;
  Read* mine = reads_[by.warp].data();
  const Write* known = nullptr;
  for (size_t i = begin; i < end; ++i) {
    const Write& last = writes_[i];
    if (known == nullptr || !(last == *known)) {
      if (must_be_written && last.time < block_start_) return {Problem::kUnwritten, i * kGranule};
      if (last.time != 0 && (bytes > 1 || last.pending)) {
        const Problem problem = after_write(last, by);
        if (problem != Problem::kNone) return finding(problem, i);
      }
      known = &last;
    }
    if (bytes == 1) continue;
    const Read before = mine[i];
    const Time time = before / 64;
    if (time >= by.synced && before % 64 != static_cast<Read>(by.lane)) {
      mine[i] = std::max(time, by.now) * 64 + kManyLanes;
    } else if (time != by.now) {
      if (time >= launch_start_ && time < block_start_) earlier_reads_[i] = time;
      mine[i] = by.now * 64 + static_cast<Read>(by.lane);
    }
  }
  return {};
}

Finding Shadow::write(size_t offset, size_t bytes, const Accessor& by, bool pending, bool lands) {
  const size_t begin = offset / kGranule, end = (offset + bytes - 1) / kGranule + 1;
  const auto thread = static_cast<uint16_t>(by.warp * kMaxWarps + by.lane);
  const bool check = bytes > 1 && !lands;
  for (size_t i = begin; i < end; ++i) {
    const Write& last = writes_[i];
    if (check && last.time != 0) {
      const Problem problem = after_write(last, by);
      if (problem != Problem::kNone) return finding(problem, i);
    }
    if (check) {
      const Finding finding = after_reads(i, by);
      if (finding.problem != Problem::kNone) return finding;
    }
    writes_[i] = {by.now, thread, pending};
  }
  return {};
}

Finding Shadow::read_by_group(size_t offset, size_t bytes, const GroupReader& by) {
  while (std::ssize(group_reads_) <= by.group) group_reads_.emplace_back(num_granules_);
  for (size_t i = offset / kGranule; i < (offset + bytes) / kGranule; ++i) {
    const Write& last = writes_[i];
    if (last.time < block_start_) return {Problem::kUnwritten, i * kGranule};
    if (last.pending) return finding(Problem::kPending, i);
    if (!by.known.seen[last.thread / kMaxWarps].covers(last.time, last.thread % kMaxWarps)) {
      return finding(Problem::kRaceWithWrite, i);
    }
    group_reads_[by.group][i] = by.now;
  }
  return unfenced(offset, bytes, by.known.fenced.data());
}

Finding Shadow::unfenced(size_t offset, size_t bytes, const Known* fenced) const {
  for (size_t i = offset / kGranule; i < (offset + bytes) / kGranule; ++i) {
    const Write& last = writes_[i];
    const int actor = last.thread / kMaxWarps;
    if (last.time < block_start_ || actor >= kMaxWarps) continue;
    if (!fenced[actor].covers(last.time, last.thread % kMaxWarps)) return finding(Problem::kNotFenced, i);
  }
  return {};
}

void Shadow::land_bulk(size_t offset, size_t bytes, int actor, Time now) {
  const auto thread = static_cast<uint16_t>(actor * kMaxWarps);
  for (size_t i = offset / kGranule; i < (offset + bytes) / kGranule; ++i) writes_[i] = {now, thread, 0};
}

void GlobalMemory::set(std::vector<Tensor> tensors) {
  tensors_ = std::move(tensors);
  ranges_.clear();
  last_ = nullptr;
  std::vector<std::pair<uintptr_t, uintptr_t>> spans;
  for (const Tensor& x : tensors_) {
    if (const auto s = span(x); s.first < s.second) spans.push_back(s);
  }
  std::sort(spans.begin(), spans.end());
  for (size_t i = 0; i < spans.size();) {
    auto [begin, end] = spans[i];
    while (++i < spans.size() && spans[i].first < end) end = std::max(end, spans[i].second);
    begin -= begin % kGranule;
    const size_t bytes = end - begin;
    ranges_.push_back({begin, end, std::vector<uint8_t>((bytes + kGranule - 1) / kGranule), Shadow(bytes)});
  }
  for (const Tensor& x : tensors_) {
    const auto bits = static_cast<uint8_t>(kReadable | (x.writable ? kWritable : 0));
    Range* range = find(x.address);
    if (range == nullptr) continue;
    for_each_run(x, 0, x.address, [&](uintptr_t address, size_t bytes) {
      const size_t begin = (address - range->begin) / kGranule;
      const size_t end = (address - range->begin + bytes + kGranule - 1) / kGranule;
      for (size_t i = begin; i < end; ++i) range->allowed[i] |= bits;
    });
  }
}

void GlobalMemory::forget() {
  for (Range& range : ranges_) range.shadow = Shadow(range.end - range.begin);
}

bool GlobalMemory::allows(const Range& range, uintptr_t address, size_t bytes, bool writes) const {
  const uint8_t asked = writes ? kWritable : kReadable;
  if (bytes > range.end - address) return false;
  const size_t begin = (address - range.begin) / kGranule;
  const size_t end = (address - range.begin + bytes - 1) / kGranule + 1;
  uint8_t all = asked;
  for (size_t i = begin; i < end; ++i) all &= range.allowed[i];
  return all != 0;
}

std::string GlobalMemory::describe(uintptr_t address) const {
  const Tensor* nearest = nullptr;
  uintptr_t least = std::numeric_limits<uintptr_t>::max();
  for (const Tensor& x : tensors_) {
    const auto [begin, end] = span(x);
    const uintptr_t distance = address < begin ? begin - address : address < end ? 0 : address - end + 1;
    if (distance < least) least = distance, nearest = &x;
  }
  if (nearest == nullptr) return "global memory, of which the kernel has none";
  const auto [begin, end] = span(*nearest);
  const auto offset = static_cast<int64_t>(address - nearest->address);
  const std::string place =
      nearest->name + (offset < 0 ? " - " : " + ") + std::to_string(std::abs(offset)) + " bytes";
  return place + (address < begin ? ", before its start" : address < end ? "" : ", past its end");
}

}  // namespace hypenet::emu
