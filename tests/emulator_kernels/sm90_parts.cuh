// Parts of correct kernels for sm_90a, of which bad_wgmma.cu and bad_roles.cu build kernels with one error each.
#pragma once

#include "cuda/arch/sm90.cuh"
#include "cuda/launch.h"
#include "cuda/tile.cuh"
#include "kernels.h"

namespace hypenet::emu_tests {

using namespace cuda;
using arch::bf16;
using Panel = Tile<bf16, 64, 64>;
constexpr int kPattern = 1024;

struct Smem {
  alignas(1024) Panel a;
  alignas(1024) Panel b;
  alignas(16) float x[256];
  arch::Mbarrier full, empty;
};

template <void (*body)(const Operands&), int kThreads>
__global__ void __launch_bounds__(kThreads, 1) kernel(const __grid_constant__ Operands params) {
  body(params);
}

template <void (*body)(const Operands&), int kThreads>
Status start(const Operands& p, Stream stream) {
  return launch(make_kernel("bad", kernel<body, kThreads>), p.num_blocks, kThreads, sizeof(Smem), stream, p);
}

__device__ inline float* out(const Operands& p) { return static_cast<float*>(p.c); }
__device__ inline const float* in(const Operands& p) { return static_cast<const float*>(p.a); }

__device__ inline Smem& memory() { return arch::shared_memory<Smem>(); }

// ---- 128 threads fill or copy

__device__ inline void fill(Panel& panel, float x = 1.0f) {
  for (int i = arch::thread_idx() % 128; i < 64 * 8; i += 128) {
    const uint32_t pair = arch::pack<bf16>(x, x);
    arch::store_16_bytes(panel.at(i / 8, i % 8 * 8), uint4{pair, pair, pair, pair});
  }
}

__device__ inline void copy(const Operands& p, Panel& panel) {
  for (int i = arch::thread_idx() % 128; i < 64 * 8; i += 128) {
    arch::copy_16_async(panel.at(i / 8, i % 8 * 8), in(p) + i % 64 * 4, true);
  }
  arch::commit_copies();
}

// A and B are filled, and visible to wgmma of all warps.
__device__ inline Smem& filled() {
  auto& smem = memory();
  fill(smem.a), fill(smem.b);
  arch::fence_async_proxy();
  arch::sync_block();
  return smem;
}

__device__ inline void init(arch::Mbarrier& bar, int count) {
  if (arch::thread_idx() == 0) {
    arch::init_mbarrier(bar, count);
    arch::fence_mbarrier_init();
  }
  arch::sync_block();
}

__device__ inline uint64_t describe(const void* first) { return arch::matrix_descriptor(first, kPattern); }

__device__ inline void multiply(float (&d)[32], const Smem& smem) {
  arch::wgmma<bf16>(d, describe(smem.a.data), describe(smem.b.data), false);
}

// A whole group, waited for.
__device__ inline void multiply_and_wait(float (&d)[32], const Smem& smem) {
  arch::fence_wgmma(d);
  multiply(d, smem);
  arch::commit_wgmma();
  arch::wait_wgmma<0>(d);
}
__device__ inline void multiply_and_wait(const Smem& smem) {
  float d[32];
  multiply_and_wait(d, smem);
}

// A group that is under way.
__device__ inline void start_to_multiply(float (&d)[32], const Smem& smem) {
  arch::fence_wgmma(d);
  multiply(d, smem);
  arch::commit_wgmma();
}

#define BAD(name) {#name, start<name, 128>}
#define BAD_WITH(threads, name) {#name, start<name, threads>}

}  // namespace hypenet::emu_tests
