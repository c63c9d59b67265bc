// The emulated machine's interface for arch.h and launch.h: threads as fibers, collectives, barriers, checked
// accesses, launches. Kernels do not call it directly.
//
// A failed check ends the launch: the block's fibers are dropped, and `run` returns a message that says what
// happened and where.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../params.h"
#include "types.h"

namespace hypenet::emu {

constexpr int kWarpSize = 32;
constexpr int kWarpgroupSize = 128;
constexpr int kMaxThreads = 1024;

// ---- the running thread. Its numbers do not change while it runs.

[[gnu::const]] int thread_idx();
[[gnu::const]] unsigned block_idx();

// The block's shared memory, if the launch requested `bytes` of it.
void* shared_memory(size_t bytes, size_t alignment);
uint32_t shared_address(const void* address);

// ---- barriers

void sync_block();
void sync_warp();
void sync_group(int barrier, int num_threads);
void arrive_group(int barrier, int num_threads);

// ---- mbarriers: `bar` is one in shared memory

void init_mbarrier(void* bar, int count);
void fence_mbarrier_init();
void arrive_mbarrier(void* bar);
void arrive_expect(void* bar, int bytes);
void wait_mbarrier(void* bar, int parity);
void copy_bulk(void* shared, const void* global, int bytes, void* bar);
void fence_async_proxy();

// ---- collectives of a warp

// Replaces every lane's `value` by that of lane `source`; `what` names the collective.
void shuffle(const char* what, void* value, size_t bytes, int source);
void ldmatrix_x4(uint32_t (&r)[4], const void* row, bool transposed);

enum class Product { kBFloat16, kFloat16, kTF32 };
void mma(Product product, float (&d)[4], const uint32_t* a, const uint32_t* b);

// ---- collectives of a warpgroup

struct Wgmma {
  Product product;
  int n;
  bool a_k_major, b_k_major, accumulate;
  uint64_t a_descriptor, b_descriptor;  // that of A: if it is not in registers
  float* d;                             // [n / 2]
  const uint32_t* a;                    // [4], or null
};

void wgmma(const Wgmma& operands);
void fence_wgmma();
void commit_wgmma();
void wait_wgmma(int pending);
void check_landed(const float* d);
void set_max_registers(int registers, bool up);

// ---- memory

uint4 load_16_bytes(const void* address);
void store_16_bytes(void* address, uint4 value);
void copy_async(void* shared, const void* global, int bytes, bool valid);
void commit_copies();
void wait_copies(int pending);

// ---- launches

struct Launch {
  const char* name;
  const void* kernel;
  void (*call)(const void* kernel, const void* params);
  const void* params;
  size_t params_bytes;
  int64_t num_blocks;
  int num_threads;
  size_t shared_bytes;
};

Status run(const Launch& launch);
int num_processors();
int max_shared_bytes();

}  // namespace hypenet::emu
