// The emulated machine's state, for the files that implement it.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "fiber.h"
#include "machine.h"
#include "memory.h"

namespace hypenet::emu {

constexpr int kMaxBarriers = 16;
constexpr uint32_t kAllLanes = 0xffffffff;

struct AsyncCopy {
  int64_t group;
  uint32_t offset;  // in shared memory
  const void* from;
  int bytes;
  bool valid;
};

// Registers of a thread that wgmma of group `group` use.
struct Accumulator {
  float* d;
  std::vector<float> result;  // what d becomes when the group has ended
  int64_t group;
};
struct RegisterOperand {
  const uint32_t* a;
  std::array<uint32_t, 4> value;
  int64_t group;
};

struct Thread {
  void* top = nullptr;  // of its stack, while another runs
  int index = 0, warp = 0, lane = 0;
  int barrier = -1;   // at which it waits
  int mbarrier = -1;  // likewise
  bool exited = false;
  int64_t num_groups = 0;         // of asynchronous copies that it closed
  std::vector<AsyncCopy> copies;  // that have not landed
  Time now = 0;                   // where it is ahead of its warp
  Time fenced = 0;                // by fence_async_proxy, up to then
  bool knows_more = false;        // than its warp, because it waited at an mbarrier
  std::unique_ptr<Knowledge> known;
  std::vector<Accumulator> accumulators;
  std::vector<RegisterOperand> operands;
  std::vector<std::pair<const void*, size_t>> written;  // registers, since fence_wgmma
};

// The state of a warp's collectives.
struct Collective {
  const char* what = nullptr;  // by which lanes must agree
  uint32_t arrived = 0;
  void* operands[kWarpSize];
};

struct Warp {
  uint32_t runnable = 0, exited = 0, at_barrier = 0;
  uint32_t order = 0;  // lanes are tried from this one on
  Collective collective;
  Time now = 0, latest = 0;  // at its last synchronisation, and of the lane that is furthest ahead
  bool has_fences = false;   // of any lane
  uint32_t lanes_that_know_more = 0;
  Knowledge known;
};

struct Barrier {
  int expected = 0, arrived = 0;
  uint32_t warps = 0;                    // that wait
  std::unique_ptr<Knowledge> announced;  // by arrive_group
};

// The knowledge that arrivals at an mbarrier pass on. Lanes arrive one by one, and are kept apart until the phase ends.
struct Arrivals {
  uint32_t warps = 0;
  Knowledge known;
  std::array<LaneTimes, kMaxWarps> until, fenced;
};

struct MbarrierState {
  uint32_t offset;  // in shared memory
  int thread;       // that initialised it
  bool fenced = false;
  int count, missing;
  int64_t missing_bytes = 0;  // announced, and not yet landed
  int64_t phase = 0;
  Time start;                // copies of phase p land at time start + p
  std::vector<int> waiting;  // threads
  Arrivals arrivals;         // at the current phase
  Knowledge known;           // by the end of the earlier ones
};

struct BulkCopy {
  int mbarrier, thread;
  uint32_t offset;
  const void* from;
  int bytes;
};

// An operand of wgmma in shared memory.
struct SharedOperand {
  const char* name;
  uint64_t descriptor;
  int rows;  // m or n
  bool k_major;
  std::vector<uint16_t> elements;  // [rows][16] when the wgmma started
  int64_t group;
};

struct Warpgroup {
  const char* what = nullptr;  // the collective by which its threads must agree
  int arrived = 0;
  const void* operands[kWarpgroupSize];
  bool fenced = false;                    // by fence_wgmma, since the last commit
  int num_open = 0;                       // wgmma since the last commit
  int64_t num_groups = 0, num_ended = 0;  // of wgmma
  Time start;                             // group i reads at time start + i
  std::vector<SharedOperand> shared;      // of wgmma under way
  int registers = 0;                      // of each thread
  int wanted_registers = 0;               // for which it waits
};

// The number of bank conflicts of ldmatrix: two of its eight rows in one group of banks.
struct BankUse {
  int64_t accesses = 0, ways = 0;
};

struct Record {
  std::string name;
  uintptr_t kernel;  // where in this module's file
  int64_t num_blocks;
  int num_threads;
  size_t shared_bytes;
  std::string params;  // its bytes
  BankUse ldmatrix;
};

struct Machine {
  // the settings
  uint64_t seed = 0;
  int num_processors = 4;
  int max_shared_bytes = 227 * 1024;
  bool only_records = false;

  // the launch
  const Launch* launch = nullptr;
  int64_t block = 0;
  int num_warps = 0;
  uint64_t random = 0;
  BankUse ldmatrix;
  std::string error;
  std::vector<uintptr_t> call_chain;  // of the thread that failed

  // the block
  Thread* current = nullptr;
  Warp* warp = nullptr;  // of the current thread
  void* host = nullptr;  // top of the stack that launched
  Time clock = 0;
  uint32_t runnable_warps = 0;
  int num_exited = 0;
  Thread threads[kMaxThreads];
  Warp warps[kMaxWarps];
  Barrier barriers[kMaxBarriers];
  Warpgroup warpgroups[kMaxWarpgroups];
  std::vector<std::unique_ptr<MbarrierState>> mbarriers;
  std::vector<BulkCopy> bulk_copies;  // that have not landed

  Stacks stacks;
  std::byte* shared = nullptr;
  Shadow shared_shadow;
  GlobalMemory global;
  std::vector<Record> records;
  std::mutex mutex;  // one launch at a time

  Accessor accessor() const {
    const Knowledge& known = current->knows_more ? *current->known : warp->known;
    return {std::max(warp->now, current->now), warp->now, known.seen.data(), current->warp, current->lane};
  }
};

extern Machine machine;
// The running fiber's stack, and nothing while none runs.
extern uintptr_t stack_bottom;
// Whether accesses to registers of the running thread are checked: wgmma use some, or will after fence_wgmma.
extern bool registers_watched;
constexpr size_t kMaxShared = 256 * 1024;

// Ends the launch with this message about the running thread.
[[noreturn]] void fail(const std::string& what);

// "thread 37 (warp 1, lane 5)"
std::string name_thread(int index);

// ---- scheduling

// Runs other threads until the running one can continue.
void wait();
void stop_running(Warp& warp, int lane);
void run_again(const Thread& thread);
// Whether a thread that need not wait lets others run first; at random.
bool give_way();
// "; threads 0 to 63: waiting at sync_block; thread 64: exited"
std::string list_threads();

// ---- time and knowledge

Time now(const Thread& thread);
// The thread's next accesses come later than what it does now. Returns the time of the earlier ones.
Time tick(Thread& thread);
const Knowledge& knowledge(const Thread& thread);
void learn(Knowledge& known, const Knowledge& other);
// The thread learns, and the rest of its warp does not.
void learn_alone(Thread& thread, const Knowledge& other);
// Gives every lane of a warp the knowledge of all its lanes.
void unite_lanes(Warp& warp);
// All accesses of a warp so far happened before its later ones.
void advance(Warp& warp);

// ---- collectives

// The running lane arrives. Returns true at once for the last lane of the warp; false for the others, after
// release_warp.
bool arrive(const char* what, void* operands);
void release_warp(Warp& warp);

// Arrives with `operands`; the lane that completes the warp calls perform(warp).
template <class Perform>
void collective(const char* what, void* operands, const Perform& perform) {
  if (!arrive(what, operands)) return;
  perform(*machine.warp);
  release_warp(*machine.warp);
}

// The same for the 128 threads of a warpgroup. `perform` returns whether they continue; if not, it is up to somebody
// else to call release_warpgroup.
bool arrive_at_warpgroup(const char* what, const void* operands);
void release_warpgroup(Warpgroup& group);

template <class Perform>
void warpgroup_collective(const char* what, const void* operands, const Perform& perform) {
  if (!arrive_at_warpgroup(what, operands)) return;
  Warpgroup& group = machine.warpgroups[machine.current->warp / 4];
  if (perform(group)) return release_warpgroup(group);
  stop_running(*machine.warp, machine.current->lane);
  wait();
}

// One copy of copy_bulk lands, at random.
void land_bulk_copy();
// "the mbarrier at shared + 0x10: phase 2, 3 of 4 arrivals, 512 bytes missing"
std::string describe(const MbarrierState& bar);
// Sets the warpgroups up for a block.
void start_warpgroups();
inline void watch_registers(const Thread& thread) {
  registers_watched = !thread.accumulators.empty() || machine.warpgroups[thread.warp / 4].fenced;
}

enum class Access { kRead, kWrite };

std::string hex(uint64_t x);
// "shared + 0x40", "q + 12 bytes"
std::string place(const void* address);
// Fails if there is a finding.
void judge(const Finding& finding, const void* address, size_t bytes, Access access, const void* base,
           const char* who = "");
void check_global(const void* pointer, size_t bytes, Access access);
void check_shared_bounds(size_t offset, size_t bytes, Access access);
// An access to the running thread's registers, while they are watched.
void check_registers(const void* address, size_t bytes, Access access);

// Checks and records an access by the running thread, to any memory.
void check(const void* address, size_t bytes, Access access);
void check_aligned(const void* address, size_t bytes, Access access);
void check_shared(size_t offset, size_t bytes, Access access);

inline bool is_shared(const void* address) {
  return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(machine.shared) < kMaxShared;
}

inline uint32_t shared_offset(const void* address) {
  return static_cast<uint32_t>(static_cast<const std::byte*>(address) - machine.shared);
}

// A random number below `bound`, from the seeded generator.
inline uint64_t draw(uint64_t bound) {
  uint64_t& x = machine.random;  // xorshift64
  x ^= x << 13, x ^= x >> 7, x ^= x << 17;
  return (x >> 11) % bound;
}

}  // namespace hypenet::emu
