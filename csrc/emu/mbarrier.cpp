// mbarriers, bulk copies, and the fence between the proxies. Lanes arrive and wait alone, so this is where knowledge
// is of lanes and not of whole warps.
#include "state.h"

namespace hypenet::emu {
namespace {

constexpr uint64_t kContents = 0x6d62617272696572;  // of an initialised mbarrier; a kernel must not change it
constexpr int kMaxArrivals = (1 << 20) - 1;

uint32_t check_address(const std::string& what, const void* bar) {
  if (!is_shared(bar)) fail(what + ": the mbarrier is not in shared memory");
  const uint32_t offset = shared_offset(bar);
  if (offset % 8 != 0) fail(what + ": misaligned mbarrier at " + place(bar) + ", not a multiple of 8");
  return offset;
}

MbarrierState& find(const std::string& what, void* bar) {
  const uint32_t offset = check_address(what, bar);
  for (auto& state : machine.mbarriers) {
    if (state->offset != offset) continue;
    if (!state->fenced) {
      fail(what + ": " + name_thread(state->thread) + " initialised the mbarrier at " + place(bar) +
           " and called no fence_mbarrier_init since");
    }
    check_shared(offset, sizeof kContents, Access::kRead);
    uint64_t contents;
    std::memcpy(&contents, bar, sizeof contents);
    if (contents != kContents) fail(what + ": the mbarrier at " + place(bar) + " was overwritten");
    return *state;
  }
  fail(what + ": no mbarrier at " + place(bar) + ", init_mbarrier has not run");
}

int index_of(const MbarrierState& bar) {
  int index = 0;
  while (machine.mbarriers[index].get() != &bar) ++index;
  return index;
}

// Adds the accesses of the running thread, and its knowledge of others, to those that a phase makes known.
void record(Arrivals& arrivals, Thread& self) {
  const Warp& warp = *machine.warp;
  LaneTimes &until = arrivals.until[self.warp], &fenced = arrivals.fenced[self.warp];
  if ((arrivals.warps >> self.warp & 1) == 0) {
    arrivals.warps |= 1u << self.warp;
    until.fill(0), fenced.fill(0);
  }
  // Other lanes' accesses before the last sync_warp happened before this one's arrival.
  const Known& common = warp.known.fenced[self.warp];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    until[lane] = std::max(until[lane], warp.now - 1);
    const Time fenced_before = common.lanes >> lane & 1 ? std::max(common.all, common.some) : common.all;
    fenced[lane] = std::max(fenced[lane], fenced_before);
  }
  learn(arrivals.known, knowledge(self));
  fenced[self.lane] = self.fenced;
  until[self.lane] = tick(self);
}

void end_phase(MbarrierState& bar) {
  Arrivals& arrivals = bar.arrivals;
  for (uint32_t rest = arrivals.warps; rest != 0; rest &= rest - 1) {
    const int w = std::countr_zero(rest);
    arrivals.known.seen[w] = either(arrivals.known.seen[w], known_of(arrivals.until[w]));
    arrivals.known.fenced[w] = either(arrivals.known.fenced[w], known_of(arrivals.fenced[w]));
  }
  learn(bar.known, arrivals.known);
  const Time landed = bar.start + static_cast<Time>(bar.phase);
  bar.known.seen[kFirstMbarrier + index_of(bar)] = {landed, 0, 0};
  machine.clock = std::max(machine.clock, landed + 1);
  arrivals.warps = 0, arrivals.known = {};
  ++bar.phase;
  bar.missing = bar.count;
  for (const int waiting : bar.waiting) {
    Thread& thread = machine.threads[waiting];
    thread.mbarrier = -1;
    learn_alone(thread, bar.known);
    run_again(thread);
  }
  bar.waiting.clear();
}

void check_phase(MbarrierState& bar) {
  if (bar.missing > 0) return;
  if (bar.missing_bytes < 0) {
    fail(describe(bar) + ": copy_bulk brought " + std::to_string(-bar.missing_bytes) +
         " more bytes than arrive_expect announced");
  }
  if (bar.missing_bytes == 0) end_phase(bar);
}

void arrive_with(const char* what, void* bar, int bytes) {
  MbarrierState& state = find(what, bar);
  if (bytes < 0 || bytes > kMaxArrivals) {
    fail(std::string(what) + ": cannot announce " + std::to_string(bytes) + " bytes");
  }
  if (state.missing == 0) fail(std::string(what) + ": more arrivals than its count at " + describe(state));
  record(state.arrivals, *machine.current);
  state.missing_bytes += bytes;
  --state.missing;
  check_phase(state);
}

}  // namespace

std::string describe(const MbarrierState& bar) {
  std::string text = "the mbarrier at " + place(machine.shared + bar.offset) + ": phase " +
                     std::to_string(bar.phase) + ", " + std::to_string(bar.count - bar.missing) + " of " +
                     std::to_string(bar.count) + " arrivals";
  if (bar.missing_bytes > 0) text += ", " + std::to_string(bar.missing_bytes) + " bytes missing";
  return text;
}

void init_mbarrier(void* bar, int count) {
  Machine& m = machine;
  const uint32_t offset = check_address("init_mbarrier", bar);
  if (count < 1 || count > kMaxArrivals) {
    fail("init_mbarrier: cannot count " + std::to_string(count) + " arrivals");
  }
  check_shared(offset, sizeof kContents, Access::kWrite);
  for (const auto& other : m.mbarriers) {
    if (other->offset == offset) fail("init_mbarrier: a second time for " + describe(*other));
  }
  if (m.mbarriers.size() == kMaxMbarriers) fail("init_mbarrier: more mbarriers than the emulator has");
  std::memcpy(bar, &kContents, sizeof kContents);
  auto state = std::make_unique<MbarrierState>();
  state->offset = offset, state->thread = m.current->index;
  state->count = state->missing = count;
  state->start = ++m.clock;
  m.mbarriers.push_back(std::move(state));
}

void fence_mbarrier_init() {
  for (auto& state : machine.mbarriers) state->fenced |= state->thread == machine.current->index;
}

void arrive_mbarrier(void* bar) { arrive_with("arrive", bar, 0); }

void arrive_expect(void* bar, int bytes) { arrive_with("arrive_expect", bar, bytes); }

void wait_mbarrier(void* bar, int parity) {
  MbarrierState& state = find("wait", bar);
  if (parity != 0 && parity != 1) fail("wait: parity must be 0 or 1, got " + std::to_string(parity));
  Thread& self = *machine.current;
  if (state.phase % 2 != parity) {
    learn_alone(self, state.known);
    if (give_way()) wait();
    return;
  }
  self.mbarrier = index_of(state);
  state.waiting.push_back(self.index);
  stop_running(*machine.warp, self.lane);
  wait();
}

void fence_async_proxy() {
  Thread& self = *machine.current;
  machine.warp->has_fences = true;
  self.fenced = tick(self);
}

void copy_bulk(void* shared, const void* global, int bytes, void* bar) {
  Machine& m = machine;
  MbarrierState& state = find("copy_bulk", bar);
  if (!is_shared(shared)) fail("copy_bulk: the destination is not in shared memory");
  if (bytes <= 0 || bytes % 16 != 0) {
    fail("copy_bulk: not a multiple of 16: " + std::to_string(bytes) + " bytes");
  }
  const uint32_t offset = shared_offset(shared);
  const auto size = static_cast<size_t>(bytes);
  for (const void* address : {static_cast<const void*>(shared), global}) {
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0) {
      fail("copy_bulk: misaligned address " + place(address) + ", not a multiple of 16");
    }
  }
  check_global(global, size, Access::kRead);
  check_shared_bounds(offset, size, Access::kWrite);
  // Its own fence counts for what this thread wrote, those of others as far as it knows of them.
  Thread& self = *m.current;
  auto fenced = knowledge(self).fenced;
  fenced[self.warp] = either(fenced[self.warp], {0, self.fenced, 1u << self.lane});
  judge(m.shared_shadow.unfenced(offset, size, fenced.data()), shared, size, Access::kWrite, m.shared);
  judge(m.shared_shadow.write(offset, size, m.accessor(), true, false), shared, size, Access::kWrite,
        m.shared);
  m.bulk_copies.push_back({index_of(state), self.index, offset, global, bytes});
}

void land_bulk_copy() {
  Machine& m = machine;
  const auto next = m.bulk_copies.begin() + static_cast<std::ptrdiff_t>(draw(m.bulk_copies.size()));
  const BulkCopy copy = *next;
  m.bulk_copies.erase(next);
  MbarrierState& bar = *m.mbarriers[copy.mbarrier];
  const auto size = static_cast<size_t>(copy.bytes);
  std::memcpy(m.shared + copy.offset, copy.from, size);
  m.shared_shadow.land_bulk(copy.offset, size, kFirstMbarrier + copy.mbarrier,
                            bar.start + static_cast<Time>(bar.phase));
  bar.missing_bytes -= copy.bytes;
  check_phase(bar);
}

}  // namespace hypenet::emu
