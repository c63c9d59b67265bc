// Fibers: stacks and the switch between them. A switch saves the callee-saved registers; ucontext would also
// save the signal mask, at the cost of two system calls.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

// Saves the running fiber's registers on its stack, stores the stack pointer in *from, and switches to `to`.
extern "C" void hypenet_emu_switch(void** from, void* to);
// The entry of a new fiber: calls the function that hypenet::emu::Stacks::prepare stored on its stack.
extern "C" void hypenet_emu_start();

namespace hypenet::emu {

// Stacks of equal size in one mapping, separated by guard pages. Pages are committed on first use and kept
// for the next block.
class Stacks {
 public:
  static constexpr size_t kBytes = 256 * 1024;  // of one stack, with its guard page

  ~Stacks() { release(); }

  // Makes at least `count` stacks; invalidates the earlier ones.
  void reserve(int count) {
    if (count <= count_) return;
    release();
    void* mapping = mmap(nullptr, count * kBytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<std::byte*>(mapping);
    count_ = count;
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    for (int i = 0; i < count; ++i) mprotect(bottom(i), page, PROT_NONE);
  }

  std::byte* bottom(int i) const { return base_ + i * kBytes; }

  // Returns the stack pointer to switch to for a fiber on stack i that calls `entry`, which must not return.
  void* prepare(int i, void (*entry)()) const {
    // Stacks start at different cache lines; otherwise all threads of a block compete for a few cache sets.
    auto* top = reinterpret_cast<uintptr_t*>(bottom(i) + kBytes - i % 16 * 256);
#if defined(__x86_64__)
    constexpr int kSaved = 6;  // rbp, rbx, r12 to r15
    *--top = 0;                // the return address that ends a debugger's walk
    *--top = reinterpret_cast<uintptr_t>(hypenet_emu_start);
    for (int r = 0; r < kSaved; ++r) *--top = 0;
    top[0] = reinterpret_cast<uintptr_t>(entry);  // r12
#elif defined(__aarch64__)
    top -= 20;  // x19 to x30, d8 to d15
    for (int r = 0; r < 20; ++r) top[r] = 0;
    top[0] = reinterpret_cast<uintptr_t>(entry);               // x19
    top[11] = reinterpret_cast<uintptr_t>(hypenet_emu_start);  // x30
#else
#error "the emulator's fibers know x86-64 and aarch64"
#endif
    return top;
  }

 private:
  void release() {
    if (base_ != nullptr) munmap(base_, count_ * kBytes);
    base_ = nullptr, count_ = 0;
  }

  std::byte* base_ = nullptr;
  int count_ = 0;
};

}  // namespace hypenet::emu
