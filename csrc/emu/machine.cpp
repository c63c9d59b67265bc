// Threads, barriers, launches. A block's threads are fibers of one host thread; blocks run one after another.
// The order of blocks, and which warp and lane runs next, are random (seeded).
#include "machine.h"

#include <dlfcn.h>
#include <execinfo.h>

#include <algorithm>
#include <numeric>

#include "state.h"

namespace hypenet::emu {

Machine machine;
uintptr_t stack_bottom = 0;
bool registers_watched = false;

namespace {

constexpr int kStayOneIn = 4;  // a warp that can go on gives way to another one time in so many
constexpr int kLandOneIn = 8;  // at a switch, a bulk copy lands one time in so many
constexpr double kBankStorm = 4.0;
constexpr int64_t kBankStormAccesses = 32;

void resume(void** from, Thread& next) {
  machine.current = &next;
  machine.warp = &machine.warps[next.warp];
  stack_bottom = reinterpret_cast<uintptr_t>(machine.stacks.bottom(next.index));
  watch_registers(next);
  hypenet_emu_switch(from, next.top);
}

void leave_to_host(void** from) {
  stack_bottom = 0;
  hypenet_emu_switch(from, machine.host);
}

// Returns the next thread to run; null if none can.
Thread* pick() {
  Machine& m = machine;
  if (!m.bulk_copies.empty() && draw(kLandOneIn) == 0) land_bulk_copy();
  if (m.warp->runnable == 0 || draw(kStayOneIn) == 0) {
    while (m.runnable_warps == 0) {
      if (m.bulk_copies.empty()) return nullptr;
      land_bulk_copy();
    }
    const auto start = static_cast<uint32_t>(draw(32));
    const auto turned = std::rotr(m.runnable_warps, static_cast<int>(start));
    m.warp = &m.warps[(std::countr_zero(turned) + start) % 32];
  }
  Warp& warp = *m.warp;
  const auto turned = std::rotr(warp.runnable, static_cast<int>(warp.order));
  const int lane = static_cast<int>((std::countr_zero(turned) + warp.order) % 32);
  return &m.threads[(&warp - m.warps) * kWarpSize + lane];
}

void make_runnable(Warp& warp) {
  warp.runnable = ~warp.exited;
  warp.order = static_cast<uint32_t>(draw(32));
  machine.runnable_warps |= 1u << (&warp - machine.warps);
}

std::string count_of(int count, const char* noun) {
  return std::to_string(count) + " " + noun + (count == 1 ? "" : "s");
}

std::string whereabouts(const Thread& thread) {
  const Warp& warp = machine.warps[thread.warp];
  if (thread.exited) return "exited";
  if (thread.mbarrier >= 0) return "waiting for " + describe(*machine.mbarriers[thread.mbarrier]);
  if (thread.barrier == 0) return "waiting at sync_block";
  if (thread.barrier > 0) {
    const Barrier& barrier = machine.barriers[thread.barrier];
    return "waiting at sync_group(" + std::to_string(thread.barrier) + ", " +
           std::to_string(barrier.expected) + "), where " + count_of(barrier.arrived, "thread") + " arrived";
  }
  const int wanted = machine.warpgroups[thread.warp / 4].wanted_registers;
  if (wanted > 0) {
    return "waiting at set_max_registers_up<" + std::to_string(wanted) + ">, for registers of others";
  }
  if (warp.collective.arrived >> thread.lane & 1) return std::string("waiting at ") + warp.collective.what;
  return "running";
}

// Those who wait learn what all who arrived know.
void complete(int index) {
  Machine& m = machine;
  Barrier& barrier = m.barriers[index];
  Knowledge known{};
  if (barrier.announced != nullptr) known = *barrier.announced;
  for (int w = 0; w < m.num_warps; ++w) {
    if ((barrier.warps >> w & 1) == 0) continue;
    Warp& warp = m.warps[w];
    if (warp.at_barrier != kAllLanes) {
      fail("divergent barrier: " + whereabouts(*m.current) + ", but not all lanes of warp " +
           std::to_string(w) + " are there" + list_threads());
    }
    unite_lanes(warp);
    learn(known, warp.known);
  }
  for (int w = 0; w < m.num_warps; ++w) {
    if (barrier.warps >> w & 1) known.seen[w] = {m.warps[w].latest, 0, 0};
  }
  for (int w = 0; w < m.num_warps; ++w) {
    if ((barrier.warps >> w & 1) == 0) continue;
    Warp& warp = m.warps[w];
    warp.known = known, warp.at_barrier = 0;
    advance(warp);
    for (int lane = 0; lane < kWarpSize; ++lane) m.threads[w * kWarpSize + lane].barrier = -1;
    make_runnable(warp);
  }
  barrier = {};
}

// `arrivals` threads are about to arrive at a named barrier.
void check_group(const char* what, int index, int num_threads, int arrivals) {
  const std::string call =
      std::string(what) + "(" + std::to_string(index) + ", " + std::to_string(num_threads) + ")";
  if (index < 1 || index >= kMaxBarriers) fail(call + ": no barrier " + std::to_string(index));
  if (num_threads <= 0 || num_threads % kWarpSize != 0) {
    fail(call + ": the number of threads must be a multiple of 32");
  }
  const Barrier& barrier = machine.barriers[index];
  if (barrier.arrived != 0 && barrier.expected != num_threads) {
    fail(call + ", where others wait for " + count_of(barrier.expected, "thread"));
  }
  if (barrier.arrived + arrivals > num_threads) {
    fail(call + ": more arrivals than that, " + count_of(barrier.arrived, "thread") + " arrived before");
  }
}

void wait_at_barrier(int index, int num_threads) {
  Machine& m = machine;
  Thread& self = *m.current;
  Warp& warp = *m.warp;
  Barrier& barrier = m.barriers[index];
  if (warp.collective.arrived != 0) {
    fail("divergent barrier: this thread arrives at a barrier, other lanes of its warp do not" +
         list_threads());
  }
  for (uint32_t others = warp.at_barrier; others != 0; others &= others - 1) {
    const Thread& other = m.threads[self.warp * kWarpSize + std::countr_zero(others)];
    if (other.barrier != index) {
      fail("divergent barrier: " + name_thread(other.index) + " of the same warp is " + whereabouts(other) +
           ", this one arrives at barrier " + std::to_string(index));
    }
  }
  if (warp.exited != 0 || (index == 0 && m.num_exited > 0)) {
    fail("divergent barrier: this thread arrives at one after others have exited" + list_threads());
  }
  self.barrier = index;
  warp.at_barrier |= 1u << self.lane;
  barrier.warps |= 1u << self.warp;
  barrier.expected = num_threads;
  if (++barrier.arrived == num_threads) {
    complete(index);
    if (!give_way()) return;  // this thread goes on first, or not
  } else {
    stop_running(warp, self.lane);
  }
  wait();
}

// When the last thread exits.
void check_end_of_block() {
  const Machine& m = machine;
  for (int i = 1; i < kMaxBarriers; ++i) {
    if (m.barriers[i].arrived == 0) continue;
    fail("the kernel ends with " + count_of(m.barriers[i].arrived, "arrival") + " of " +
         std::to_string(m.barriers[i].expected) + " at barrier " + std::to_string(i) +
         ", which nobody completes");
  }
  if (!m.bulk_copies.empty()) {
    fail("the kernel ends while a copy_bulk of " + name_thread(m.bulk_copies[0].thread) +
         " is under way: nobody waited for it");
  }
}

void exit_thread() {
  Machine& m = machine;
  Thread& self = *m.current;
  Warp& warp = *m.warp;
  self.exited = true;
  ++m.num_exited;
  warp.exited |= 1u << self.lane;
  if (warp.collective.arrived != 0 || warp.at_barrier != 0 || m.barriers[0].arrived != 0 ||
      m.warpgroups[self.warp / 4].arrived != 0) {
    fail("divergent: this thread exits, while others wait for it" + list_threads());
  }
  if (!self.accumulators.empty()) fail("exits while its wgmma are under way: no wait_wgmma since");
  if (m.num_exited == m.launch->num_threads) check_end_of_block();
  stop_running(warp, self.lane);
  Thread* next = pick();
  if (next != nullptr) resume(&self.top, *next);
  if (m.num_exited < m.launch->num_threads) fail("deadlock: nobody can go on" + list_threads());
  leave_to_host(&self.top);
}

void run_thread() {
  machine.launch->call(machine.launch->kernel, machine.launch->params);
  exit_thread();
}

// Advances the clock. Before it overflows it is reset, and all recorded accesses are discarded.
void start_clock(Time& clock) {
  Machine& m = machine;
  if (++clock > kLastTime / 2) {
    clock = 1;
    m.shared_shadow = Shadow(kMaxShared);
    m.global.forget();
    for (auto& range : m.global.ranges()) range.shadow.start_launch(clock, m.num_warps);
  }
}

void run_block(int64_t block) {
  Machine& m = machine;
  const int num_threads = m.launch->num_threads;
  start_clock(m.clock);
  m.block = block;
  m.num_exited = 0;
  m.runnable_warps = 0;
  std::memset(m.shared, 0xff, m.launch->shared_bytes);  // NaN in every format
  m.shared_shadow.start_launch(m.clock, m.num_warps);
  m.shared_shadow.start_block(m.clock);
  for (auto& range : m.global.ranges()) range.shadow.start_block(m.clock);
  for (Barrier& barrier : m.barriers) barrier = {};
  m.mbarriers.clear(), m.bulk_copies.clear();
  for (int w = 0; w < m.num_warps; ++w) {
    Warp& warp = m.warps[w];
    warp.exited = warp.at_barrier = warp.collective.arrived = 0;
    warp.known = {};
    warp.now = warp.latest = m.clock;
    warp.has_fences = false, warp.lanes_that_know_more = 0;
    make_runnable(warp);
  }
  start_warpgroups();
  for (int i = 0; i < num_threads; ++i) {
    Thread& thread = m.threads[i];
    thread.index = i, thread.warp = i / kWarpSize, thread.lane = i % kWarpSize;
    thread.barrier = thread.mbarrier = -1, thread.exited = thread.knows_more = false, thread.num_groups = 0;
    thread.now = thread.fenced = 0;
    thread.copies.clear(), thread.accumulators.clear(), thread.operands.clear(), thread.written.clear();
    thread.top = m.stacks.prepare(i, run_thread);
  }
  m.warp = &m.warps[0];
  resume(&m.host, *pick());
}

// The offset in this module's file of a code address, for addr2line.
uintptr_t file_offset(const void* code) {
  Dl_info info;
  dladdr(code, &info);
  return reinterpret_cast<uintptr_t>(code) - reinterpret_cast<uintptr_t>(info.dli_fbase);
}

// The call stack of the running thread, innermost first, up to the kernel.
std::vector<uintptr_t> call_chain() {
  constexpr int kOutside = 3;  // call_kernel, run_thread, hypenet_emu_start
  void* frames[64];
  const int count = backtrace(frames, 64) - kOutside;
  std::vector<uintptr_t> chain;
  for (int i = 0; i < count; ++i) chain.push_back(file_offset(static_cast<std::byte*>(frames[i]) - 1));
  return chain;
}

std::string reason_not_to_run(const Launch& launch) {
  const int threads = launch.num_threads;
  if (threads <= 0 || threads > kMaxThreads || threads % kWarpSize != 0) {
    return "a block must have 32 to 1024 threads, whole warps, got " + std::to_string(threads);
  }
  if (launch.shared_bytes > static_cast<size_t>(machine.max_shared_bytes)) {
    return "a block has at most " + std::to_string(machine.max_shared_bytes) +
           " bytes of shared memory, got " + std::to_string(launch.shared_bytes) +
           ": less shared memory than the kernel needs";
  }
  return "";
}

void run_blocks() {
  Machine& m = machine;
  const int64_t num_blocks = m.launch->num_blocks;
  if (m.shared == nullptr) {
    m.shared = static_cast<std::byte*>(std::aligned_alloc(4096, kMaxShared));
    m.shared_shadow = Shadow(kMaxShared);
  }
  m.stacks.reserve(m.launch->num_threads);
  m.num_warps = m.launch->num_threads / kWarpSize;
  m.random = (m.seed + 1) * 0x9e3779b97f4a7c15u;
  m.ldmatrix = {};
  start_clock(m.clock);
  for (auto& range : m.global.ranges()) range.shadow.start_launch(m.clock, m.num_warps);
  std::vector<int32_t> order(static_cast<size_t>(num_blocks));
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[draw(i)]);
  for (const int32_t block : order) {
    run_block(block);
    if (!m.error.empty()) return;
  }
}

}  // namespace

std::string name_thread(int index) {
  return "thread " + std::to_string(index) + " (warp " + std::to_string(index / kWarpSize) + ", lane " +
         std::to_string(index % kWarpSize) + ")";
}

void fail(const std::string& what) {
  Machine& m = machine;
  m.error = std::string("kernel ") + m.launch->name + ", block " + std::to_string(m.block) + ", " +
            name_thread(m.current->index) + ": " + what;
  m.call_chain = call_chain();
  leave_to_host(&m.current->top);
  __builtin_unreachable();
}

void stop_running(Warp& warp, int lane) {
  warp.runnable &= ~(1u << lane);
  if (warp.runnable == 0) machine.runnable_warps &= ~(1u << (&warp - machine.warps));
}

void run_again(const Thread& thread) {
  machine.warps[thread.warp].runnable |= 1u << thread.lane;
  machine.runnable_warps |= 1u << thread.warp;
}

bool give_way() { return draw(kStayOneIn) == 0; }

void wait() {
  Thread& self = *machine.current;
  Thread* next = pick();
  if (next == nullptr) fail("deadlock: nobody can go on" + list_threads());
  if (next != &self) resume(&self.top, *next);
}

// One entry for each run of threads in one place.
std::string list_threads() {
  std::string list;
  const int num_threads = machine.launch->num_threads;
  for (int first = 0; first < num_threads;) {
    const std::string where = whereabouts(machine.threads[first]);
    int last = first;
    while (last + 1 < num_threads && whereabouts(machine.threads[last + 1]) == where) ++last;
    list += first == last ? "; thread " + std::to_string(first)
                          : "; threads " + std::to_string(first) + " to " + std::to_string(last);
    list += ": " + where;
    first = last + 1;
  }
  return list;
}

int thread_idx() { return machine.current->index; }
unsigned block_idx() { return static_cast<unsigned>(machine.block); }

void* shared_memory(size_t bytes, size_t alignment) {
  if (bytes > machine.launch->shared_bytes) {
    fail("the kernel lays out " + std::to_string(bytes) + " bytes of shared memory, its launch asked for " +
         std::to_string(machine.launch->shared_bytes));
  }
  if (alignment > 1024) fail("shared memory is aligned to 1024 bytes, not to " + std::to_string(alignment));
  return machine.shared;
}

uint32_t shared_address(const void* address) {
  if (!is_shared(address)) fail("not an address in shared memory: " + place(address));
  return shared_offset(address);
}

void sync_block() { wait_at_barrier(0, machine.launch->num_threads); }

void sync_group(int barrier, int num_threads) {
  check_group("sync_group", barrier, num_threads, 1);
  wait_at_barrier(barrier, num_threads);
}

void arrive_group(int barrier, int num_threads) {
  std::pair operands{barrier, num_threads};
  collective("arrive_group", &operands, [](Warp& warp) {
    const auto [index, expected] = *static_cast<std::pair<int, int>*>(warp.collective.operands[0]);
    check_group("arrive_group", index, expected, kWarpSize);
    Machine& m = machine;
    Barrier& group = m.barriers[index];
    if (group.announced == nullptr) group.announced = std::make_unique<Knowledge>();
    const auto w = static_cast<int>(&warp - m.warps);
    LaneTimes until, fenced;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      Thread& thread = m.threads[w * kWarpSize + lane];
      learn(*group.announced, knowledge(thread));
      fenced[lane] = thread.fenced;
      until[lane] = tick(thread);
    }
    group.announced->seen[w] = either(group.announced->seen[w], known_of(until));
    group.announced->fenced[w] = known_of(fenced);
    group.expected = expected;
    group.arrived += kWarpSize;
    if (group.arrived == expected) complete(index);
  });
}

bool arrive(const char* what, void* operands) {
  Warp& warp = *machine.warp;
  Thread& self = *machine.current;
  Collective& c = warp.collective;
  if (warp.exited != 0 || warp.at_barrier != 0 ||
      (c.arrived != 0 && c.what != what && std::strcmp(c.what, what) != 0)) {
    fail(std::string("divergent ") + what + ": the other lanes of its warp are elsewhere" + list_threads());
  }
  c.what = what;
  c.operands[self.lane] = operands;
  c.arrived |= 1u << self.lane;
  if (c.arrived == kAllLanes) return true;
  stop_running(warp, self.lane);
  wait();
  return false;
}

void release_warp(Warp& warp) {
  warp.collective.arrived = 0;
  make_runnable(warp);
}

void sync_warp() {
  collective("sync_warp", nullptr, [](Warp& warp) {
    unite_lanes(warp);
    advance(warp);
  });
}

Status run(const Launch& launch) {
  Machine& m = machine;
  const std::lock_guard lock(m.mutex);
  m.launch = &launch;
  m.call_chain.clear();
  m.error = reason_not_to_run(launch);
  if (!m.error.empty()) m.error = std::string("kernel ") + launch.name + ": " + m.error;
  if (m.error.empty()) {
    if (!m.only_records) run_blocks();
    m.records.push_back(
        {launch.name, file_offset(launch.kernel), launch.num_blocks, launch.num_threads, launch.shared_bytes,
         std::string(static_cast<const char*>(launch.params), launch.params_bytes), m.ldmatrix});
  }
  const BankUse& use = m.ldmatrix;
  if (m.error.empty() && use.accesses >= kBankStormAccesses &&
      static_cast<double>(use.ways) > kBankStorm * static_cast<double>(use.accesses)) {
    m.error = std::string("kernel ") + launch.name + ": bank-conflict storm: ldmatrix takes " +
              std::to_string(static_cast<double>(use.ways) / static_cast<double>(use.accesses)) +
              " turns for eight rows";
  }
  static std::string status;
  status = m.error;
  return status.empty() ? nullptr : status.c_str();
}

int num_processors() { return machine.num_processors; }
int max_shared_bytes() { return machine.max_shared_bytes; }

}  // namespace hypenet::emu
