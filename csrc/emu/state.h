// The emulated machine's state, for the files that implement it.
#pragma once

#include <array>
#include <cstdint>
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

struct Thread {
  void* top = nullptr;  // of its stack, while another runs
  int index = 0, warp = 0, lane = 0;
  int barrier = -1;  // at which it waits
  bool exited = false;
  int64_t num_groups = 0;         // of asynchronous copies that it closed
  std::vector<AsyncCopy> copies;  // that have not landed
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
  Time now = 0;
  std::array<Time, kMaxWarps> seen{};
};

struct Barrier {
  int expected = 0, arrived = 0;
  uint32_t warps = 0;
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

  Stacks stacks;
  std::byte* shared = nullptr;
  Shadow shared_shadow;
  GlobalMemory global;
  std::vector<Record> records;
  std::mutex mutex;  // one launch at a time

  Accessor accessor() const { return {warp->now, warp->seen.data(), current->warp, current->lane}; }
};

extern Machine machine;
// The running fiber's stack, and nothing while none runs.
extern uintptr_t stack_bottom;
constexpr size_t kMaxShared = 256 * 1024;

// Ends the launch with this message about the running thread.
[[noreturn]] void fail(const std::string& what);

// "thread 37 (warp 1, lane 5)"
std::string name_thread(int index);

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

enum class Access { kRead, kWrite };

// Checks and records an access by the running thread, to any memory.
void check(const void* address, size_t bytes, Access access);
void check_aligned(const void* address, size_t bytes, Access access);
void check_shared(size_t offset, size_t bytes, Access access);

inline bool is_shared(const void* address) {
  return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(machine.shared) < kMaxShared;
}

// A random number below `bound`, from the seeded generator.
inline uint64_t draw(uint64_t bound) {
  uint64_t& x = machine.random;  // xorshift64
  x ^= x << 13, x ^= x >> 7, x ^= x << 17;
  return (x >> 11) % bound;
}

}  // namespace hypenet::emu
