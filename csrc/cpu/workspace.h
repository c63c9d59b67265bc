// Scratch memory that is allocated before the threads start, and loops over independent tasks.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <new>

namespace hypenet::cpu {

// Hands out parts of one block of memory, aligned to cache lines. Without a block it only counts, so that the
// code that lays buffers out also computes their total size.
template <class T>
class Arena {
 public:
  explicit Arena(T* block = nullptr) : block_(block) {}
  template <class Piece = T>
  Piece* take(int64_t count) {
    static_assert(sizeof(Piece) == sizeof(T));
    constexpr int64_t kLine = 64 / sizeof(T);
    T* piece = block_ == nullptr ? nullptr : block_ + used_;
    used_ += (count + kLine - 1) / kLine * kLine;
    return reinterpret_cast<Piece*>(piece);
  }
  int64_t used() const { return used_; }

 private:
  T* block_;
  int64_t used_ = 0;
};

// One block per thread, on separate cache lines. Construct it before the threads start: it throws
// std::bad_alloc.
template <class T>
class ThreadBlocks {
 public:
  ThreadBlocks(int64_t threads, int64_t count)
      : stride_(count), block_(static_cast<T*>(::operator new(threads * count * sizeof(T), kAlignment))) {}
  ~ThreadBlocks() { ::operator delete(block_, kAlignment); }
  ThreadBlocks(const ThreadBlocks&) = delete;
  ThreadBlocks& operator=(const ThreadBlocks&) = delete;
  T* thread(int64_t idx) const { return block_ + idx * stride_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  int64_t stride_;
  T* block_;
};

// The number of threads worth starting: starting one costs about kWorth multiply-adds.
inline int64_t useful_threads(int64_t num_threads, int64_t tasks, double multiply_adds) {
  constexpr double kWorth = 1e5;
  return std::max<int64_t>(1, std::min({num_threads, tasks, int64_t(std::min(multiply_adds / kWorth, 1e6))}));
}

// run(task, thread) for every task, each once, on any thread.
template <class Run>
void for_each_task(int64_t tasks, int64_t threads, const Run& run) {
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) run(task, int64_t{0});
    return;
  }
#pragma omp parallel num_threads(int(threads))
  {
    const int64_t thread = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) run(task, thread);
  }
}

// The same for tasks of equal cost, with a static schedule: in every call a thread gets the same tasks, whose
// data may still be in its cache.
template <class Run>
void for_each_equal_task(int64_t tasks, int64_t threads, const Run& run) {
  if (threads <= 1) return for_each_task(tasks, threads, run);
#pragma omp parallel for num_threads(int(threads)) schedule(static)
  for (int64_t task = 0; task < tasks; ++task) run(task, int64_t{omp_get_thread_num()});
}

}  // namespace hypenet::cpu
