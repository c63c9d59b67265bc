// cuda/arch/sm90.cuh on the host: the same functions, executed by the emulated machine. They are documented there.
#pragma once

#include "arch.h"

namespace hypenet::cuda::arch {

using emu::kWarpgroupSize;

// ---- mbarriers

struct alignas(8) Mbarrier {
  uint64_t state;
};

inline void init_mbarrier(Mbarrier& bar, int count) { emu::init_mbarrier(&bar, count); }
inline void fence_mbarrier_init() { emu::fence_mbarrier_init(); }
inline void arrive(Mbarrier& bar) { emu::arrive_mbarrier(&bar); }
inline void arrive_expect(Mbarrier& bar, int bytes) { emu::arrive_expect(&bar, bytes); }
inline void wait(Mbarrier& bar, int parity) { emu::wait_mbarrier(&bar, parity); }
inline void copy_bulk(void* shared, const void* global, int bytes, Mbarrier& bar) {
  emu::copy_bulk(shared, global, bytes, &bar);
}
inline void fence_async_proxy() { emu::fence_async_proxy(); }

// ---- roles of warps

inline void arrive_group(int barrier, int num_threads) { emu::arrive_group(barrier, num_threads); }
template <int kRegisters>
void set_max_registers_up() {
  emu::set_max_registers(kRegisters, true);
}
template <int kRegisters>
void set_max_registers_down() {
  emu::set_max_registers(kRegisters, false);
}

// ---- wgmma

enum class Major { kK, kMN };

inline uint64_t matrix_descriptor(const void* first, int stride_bytes, int leading_bytes = 0) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | static_cast<uint64_t>(stride_bytes >> 4) << 32 |
         static_cast<uint64_t>(leading_bytes >> 4) << 16 | (shared_address(first) & 0x3ffff) >> 4;
}

template <class... Accumulators>
void fence_wgmma(Accumulators&...) {
  emu::fence_wgmma();
}
inline void commit_wgmma() { emu::commit_wgmma(); }
template <int kPending, int... kCounts>
void wait_wgmma(float (&... d)[kCounts]) {
  emu::wait_wgmma(kPending);
  (emu::check_landed(d), ...);
}

template <class Element>
constexpr emu::Product kProduct =
    std::is_same_v<Element, bf16> ? emu::Product::kBFloat16 : emu::Product::kFloat16;

template <class Element, Major kMajorB = Major::kK, int kHalf>
void wgmma(float (&d)[kHalf], const uint32_t (&a)[4], uint64_t b, bool accumulate = true) {
  emu::wgmma({kProduct<Element>, 2 * kHalf, true, kMajorB == Major::kK, accumulate, 0, b, d, a});
}
template <class Element, Major kMajorA = Major::kK, Major kMajorB = Major::kK, int kHalf>
void wgmma(float (&d)[kHalf], uint64_t a, uint64_t b, bool accumulate = true) {
  emu::wgmma({kProduct<Element>, 2 * kHalf, kMajorA == Major::kK, kMajorB == Major::kK, accumulate, a, b, d,
              nullptr});
}

}  // namespace hypenet::cuda::arch
