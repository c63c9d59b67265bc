// The machine's records of every byte that kernels may access: who wrote it when, who read it when, which
// asynchronous copy is still writing it, and to which tensor it belongs.
//
// An access by warp u at time e happened before one by a thread of warp w iff the thread's knowledge of u covers e; for
// u = w, iff the warp has synchronised since (e < w.now) or the lane is the same. knowledge.h says what time is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "knowledge.h"

namespace hypenet::emu {

// Bytes per record. Accesses to single bytes are not checked for races.
constexpr size_t kGranule = 2;

constexpr Time kLastTime = (1u << 26) - 1;  // then the shadows forget, and time starts anew

// The thread that makes an access.
struct Accessor {
  Time now;           // the lane's
  Time synced;        // the warp's
  const Known* seen;  // [kMaxActors]
  int warp, lane;
};

// A warpgroup whose wgmma reads through the async proxy.
struct GroupReader {
  int group;
  Time now;
  Knowledge known;  // to all its threads
};

enum class Problem {
  kNone,
  kUnwritten,      // read of what nobody wrote
  kPending,        // an asynchronous copy still writes it
  kRaceWithWrite,  // not ordered after another thread's write
  kRaceWithRead,   // a write that is not ordered after another thread's read
  kNotFenced,  // written through the generic proxy, without a fence, before an access through the async proxy
  kOtherBlockWrote,  // global memory, in the same launch
  kOtherBlockRead,
};

struct Finding {
  Problem problem = Problem::kNone;
  size_t offset = 0;        // of the granule
  int actor = 0, lane = 0;  // of the other thread
  Time time = 0;
};

// Zeroed memory, committed on first use.
template <class T>
class Zeroed {
 public:
  explicit Zeroed(size_t size = 0) : items_(size ? static_cast<T*>(std::calloc(size, sizeof(T))) : nullptr) {
    if (size && !items_) throw std::bad_alloc();
  }
  T* data() const { return items_.get(); }
  T& operator[](size_t i) const { return items_.get()[i]; }

 private:
  struct Free {
    void operator()(T* items) const { std::free(items); }
  };
  std::unique_ptr<T, Free> items_;
};

// The records of one contiguous memory.
class Shadow {
 public:
  explicit Shadow(size_t bytes = 0)
      : num_granules_((bytes + kGranule - 1) / kGranule),
        writes_(num_granules_),
        earlier_reads_(num_granules_) {}

  void start_launch(Time time, int num_warps) {
    launch_start_ = time;
    while (std::ssize(reads_) < num_warps) reads_.emplace_back(num_granules_);
  }
  void start_block(Time time) { block_start_ = time; }

  // Records an access to `bytes` at `offset`; returns the first problem, if any.
  Finding read(size_t offset, size_t bytes, const Accessor& by, bool must_be_written);
  // `pending`: an asynchronous copy starts to write. `lands`: it has completed.
  Finding write(size_t offset, size_t bytes, const Accessor& by, bool pending, bool lands);
  // The same by wgmma.
  Finding read_by_group(size_t offset, size_t bytes, const GroupReader& by);
  // The first byte that the generic proxy wrote and whose writer, for all that `fenced` knows, called no fence since.
  Finding unfenced(size_t offset, size_t bytes, const Known* fenced) const;
  // A copy of copy_bulk has landed, at time `now` of its mbarrier.
  void land_bulk(size_t offset, size_t bytes, int actor, Time now);

 private:
  struct Write {
    Time time;
    uint16_t thread;  // actor * 32 + lane
    uint16_t pending;
    bool operator==(const Write&) const = default;
  };
  using Read = uint32_t;  // time * 64 + lane or kManyLanes

  Problem after_write(const Write& last, const Accessor& by) const;
  Finding after_reads(size_t granule, const Accessor& by);
  Finding finding(Problem problem, size_t granule) const;  // about the last write

  size_t num_granules_;
  Time launch_start_ = 0, block_start_ = 0;
  Zeroed<Write> writes_;
  std::vector<Zeroed<Read>> reads_;        // by each warp of the running block, or of one before it
  std::vector<Zeroed<Time>> group_reads_;  // by the wgmma of each warpgroup, if there are any
  Zeroed<Time> earlier_reads_;             // by blocks before it
};

// A tensor that a kernel may access.
struct Tensor {
  std::string name;
  uintptr_t address;
  size_t element_bytes;
  std::vector<int64_t> shape, strides;  // in elements
  bool writable;
};

// Global memory: the tensors of one call. Those that overlap share one range.
class GlobalMemory {
 public:
  struct Range {
    uintptr_t begin, end;
    std::vector<uint8_t> allowed;  // for each granule kReadable, kWritable
    Shadow shadow;
  };
  enum Allowed : uint8_t { kReadable = 1, kWritable = 2 };

  void set(std::vector<Tensor> tensors);
  void forget();  // all accesses
  Range* find(uintptr_t address) {
    if (last_ != nullptr && address - last_->begin < last_->end - last_->begin) return last_;
    for (Range& range : ranges_) {
      if (address - range.begin < range.end - range.begin) return last_ = &range;
    }
    return nullptr;
  }
  bool allows(const Range& range, uintptr_t address, size_t bytes, bool writes) const;
  std::vector<Range>& ranges() { return ranges_; }
  // "q + 12 bytes", "q + 256 bytes, past its end".
  std::string describe(uintptr_t address) const;

 private:
  std::vector<Tensor> tensors_;
  std::vector<Range> ranges_;
  Range* last_ = nullptr;
};

}  // namespace hypenet::emu
