// Kernels with one error each, which their name states. test_emulator.py checks the message of the emulator.
#include <cstring>

#include "cuda/arch/sm80.cuh"
#include "cuda/launch.h"
#include "cuda/tile.cuh"
#include "kernels.h"

namespace hypenet::emu_tests {
namespace {

using namespace cuda;
constexpr int kThreads = 128;

struct Smem {
  alignas(128) float x[256];
  arch::bf16 half[256];
};

struct Twelve {
  float x[12];
};

__device__ float* out(const Operands& p) { return static_cast<float*>(p.c); }
__device__ const float* in(const Operands& p) { return static_cast<const float*>(p.a); }

// x[0..255] = 0, followed by a barrier.
__device__ Smem& cleared() {
  auto& smem = arch::shared_memory<Smem>();
  const int i = arch::thread_idx();
  smem.x[i] = 0.0f, smem.x[i + kThreads] = 0.0f;
  arch::sync_block();
  return smem;
}

template <void (*body)(const Operands&), int kNumThreads = kThreads>
__global__ void __launch_bounds__(kNumThreads, 1) kernel(const __grid_constant__ Operands params) {
  body(params);
}

template <void (*body)(const Operands&), int kNumThreads = kThreads, size_t kShared = sizeof(Smem)>
Status start(const Operands& p, Stream stream) {
  return launch(make_kernel("bad", kernel<body, kNumThreads>), p.num_blocks, kNumThreads, kShared, stream, p);
}

// ---- races

__device__ void missing_barrier(const Operands& p) {
  auto& smem = cleared();
  const int i = arch::thread_idx();
  smem.x[i] = 1.0f;
  out(p)[i] = smem.x[(i + 32) % kThreads];
}

__device__ void barrier_for_half_the_block(const Operands& p) {
  auto& smem = cleared();
  const int i = arch::thread_idx();
  smem.x[i] = 1.0f;
  arch::sync_group(1 + i / 64, 64);
  out(p)[i] = smem.x[(i + 64) % kThreads];
}

__device__ void missing_sync_warp(const Operands& p) {
  auto& smem = cleared();
  const int i = arch::thread_idx();
  smem.x[i] = 1.0f;
  out(p)[i] = smem.x[i ^ 1];
}

__device__ void shuffle_is_no_barrier(const Operands& p) {
  auto& smem = cleared();
  const int i = arch::thread_idx();
  smem.x[i] = 1.0f;
  const float y = arch::shuffle(1.0f, 0);
  out(p)[i] = smem.x[i ^ 1] + y;
}

__device__ void second_barrier_missing(const Operands& p) {
  auto& smem = cleared();
  const int i = arch::thread_idx();
  for (int round = 0; round < 2; ++round) {
    smem.x[i] = 1.0f;
    arch::sync_block();
    out(p)[i] = smem.x[(i + 32) % kThreads];
  }
}

__device__ void all_write_one_place(const Operands&) { cleared().x[7] = 1.0f; }

__device__ void neighbours_write_one_word(const Operands&) {
  // two threads write the halves of a word, which is correct; then a third one writes the whole word
  auto& smem = cleared();
  const int i = arch::thread_idx();
  arch::from_float(smem.half[i], 1.0f);
  if (i == 9) *reinterpret_cast<uint32_t*>(&smem.half[20]) = 0;
}

__device__ void struct_copy_races(const Operands& p) {
  auto& smem = cleared();
  auto& twelve = *reinterpret_cast<Twelve*>(smem.x);
  const int i = arch::thread_idx();
  if (i == 0) twelve = *static_cast<const Twelve*>(p.a);
  if (i == 64) *static_cast<Twelve*>(p.c) = twelve;
}

__device__ void memcpy_races(const Operands& p) {
  auto& smem = cleared();
  const int i = arch::thread_idx();
  if (i == 0) std::memcpy(smem.x, p.a, 40);
  if (i == 64) std::memset(smem.x, 0, 40);
}

__device__ void blocks_write_one_place(const Operands& p) {
  if (arch::thread_idx() == 3) out(p)[5] = 1.0f;
}

__device__ void block_reads_what_another_writes(const Operands& p) {
  const int i = arch::thread_idx();
  const int64_t mine = arch::block_idx() * kThreads + i, all = p.num_blocks * kThreads;
  out(p)[mine] = 1.0f;
  if (out(p)[(mine + kThreads) % all] == 2.0f) out(p)[mine] = 3.0f;
}

__device__ void blocks_add_to_one_place(const Operands& p) {
  if (arch::thread_idx() == 3) out(p)[5] += 1.0f;
}

__device__ void threads_race_in_global_memory(const Operands& p) {
  const int i = arch::thread_idx();
  out(p)[i] = 1.0f;
  if (out(p)[(i + 32) % kThreads] == 2.0f) out(p)[i] = 3.0f;
}

// ---- asynchronous copies

__device__ void copy(const Operands& p, Smem& smem) {
  const int i = arch::thread_idx();
  if (i < 64) arch::copy_16_async(&smem.x[i * 4], in(p) + i * 4, true);
}

__device__ void missing_wait(const Operands& p) {
  auto& smem = arch::shared_memory<Smem>();
  copy(p, smem);
  arch::commit_copies();
  arch::sync_block();
  out(p)[arch::thread_idx()] = smem.x[arch::thread_idx()];
}

__device__ void missing_commit(const Operands& p) {
  auto& smem = arch::shared_memory<Smem>();
  copy(p, smem);
  arch::wait_copies<0>();
  arch::sync_block();
  out(p)[arch::thread_idx()] = smem.x[arch::thread_idx()];
}

__device__ void wait_for_too_few(const Operands& p) {
  auto& smem = arch::shared_memory<Smem>();
  copy(p, smem);
  arch::commit_copies();
  arch::wait_copies<1>();
  arch::sync_block();
  out(p)[arch::thread_idx()] = smem.x[arch::thread_idx()];
}

__device__ void wait_without_barrier(const Operands& p) {
  auto& smem = arch::shared_memory<Smem>();
  copy(p, smem);
  arch::commit_copies();
  arch::wait_copies<0>();
  out(p)[arch::thread_idx()] = smem.x[arch::thread_idx()];
}

__device__ void barrier_before_wait(const Operands& p) {
  auto& smem = arch::shared_memory<Smem>();
  copy(p, smem);
  arch::commit_copies();
  arch::sync_block();
  arch::wait_copies<0>();
  out(p)[arch::thread_idx()] = smem.x[arch::thread_idx()];
}

__device__ void copy_over_what_is_read(const Operands& p) {
  auto& smem = cleared();
  out(p)[arch::thread_idx()] = smem.x[arch::thread_idx()];
  copy(p, smem);
}

__device__ void copy_from_out_of_bounds(const Operands& p) {
  auto& smem = arch::shared_memory<Smem>();
  arch::copy_16_async(smem.x, in(p) + p.n - 2, true);
}

// ---- bounds, writing, alignment

__device__ void shared_out_of_bounds(const Operands& p) {
  auto& smem = cleared();
  const int i = arch::thread_idx();
  if (i == 40) smem.x[256 + 128 + p.n] = 1.0f;
}

__device__ void too_little_shared_memory(const Operands&) { arch::shared_memory<Smem>().x[0] = 1.0f; }

__device__ void global_read_out_of_bounds(const Operands& p) {
  const int i = arch::thread_idx();
  out(p)[i] = in(p)[i == 70 ? p.n : 0];
}

__device__ void global_write_out_of_bounds(const Operands& p) {
  if (arch::thread_idx() == 70) out(p)[-1] = 1.0f;
}

__device__ void null_pointer(const Operands& p) {
  if (arch::thread_idx() == 70) out(p)[0] = *static_cast<const float*>(p.b);
}

__device__ void reads_between_rows(const Operands& p) { out(p)[arch::thread_idx()] = in(p)[p.n]; }

__device__ void writes_an_input(const Operands& p) {
  if (arch::thread_idx() == 70) *const_cast<float*>(in(p) + 2) = 1.0f;
}

__device__ void reads_unwritten_shared(const Operands& p) {
  auto& smem = arch::shared_memory<Smem>();
  const int i = arch::thread_idx();
  if (i != 33) smem.x[i] = 1.0f;
  arch::sync_block();
  if (i == 99) out(p)[i] = smem.x[33];
}

__device__ void ldmatrix_reads_unwritten(const Operands&) {
  auto& smem = arch::shared_memory<Smem>();
  if (arch::thread_idx() < 64) smem.x[arch::thread_idx()] = 1.0f;
  arch::sync_block();
  uint32_t r[4];
  arch::ldmatrix_x4(r, &smem.x[arch::thread_idx() % 32 * 4]);
}

__device__ void misaligned_ldmatrix(const Operands&) {
  auto& smem = cleared();
  const int lane = arch::thread_idx() % 32;
  uint32_t r[4];
  arch::ldmatrix_x4(r, &smem.x[lane * 4 + (lane == 17 ? 1 : 0)]);
}

__device__ void misaligned_16_bytes(const Operands& p) {
  if (arch::thread_idx() == 5) arch::store_16_bytes(out(p), arch::load_16_bytes(in(p) + 1));
}

__device__ void misaligned_vector(const Operands& p) {
  if (arch::thread_idx() == 5) *static_cast<uint4*>(p.c) = *reinterpret_cast<const uint4*>(in(p) + 1);
}

__device__ void misaligned_copy(const Operands& p) {
  auto& smem = arch::shared_memory<Smem>();
  if (arch::thread_idx() == 5) arch::copy_16_async(smem.x, in(p) + 1, true);
}

// ---- divergence and deadlock

__device__ void barrier_for_some_lanes(const Operands&) {
  if (arch::thread_idx() % 32 < 16) arch::sync_block();
  arch::shuffle(1.0f, 0);
}

__device__ void barrier_after_exit(const Operands&) {
  if (arch::thread_idx() >= 64) return;
  arch::sync_block();
}

__device__ void different_barriers_in_a_warp(const Operands&) {
  if (arch::thread_idx() % 32 < 16) {
    arch::sync_group(1, 128);
  } else {
    arch::sync_group(2, 128);
  }
}

__device__ void shuffle_for_some_lanes(const Operands& p) {
  if (arch::thread_idx() % 32 < 16) out(p)[arch::thread_idx()] = arch::shuffle_xor(1.0f, 1);
}

__device__ void different_shuffles(const Operands&) {
  if (arch::thread_idx() % 32 < 16) {
    arch::shuffle_xor(1.0f, 1);
  } else {
    arch::shuffle_up(1.0f, 1);
  }
}

__device__ void deadlock_by_wrong_count(const Operands&) {
  if (arch::thread_idx() < 64) arch::sync_group(1, 96);
}

__device__ void counts_that_differ(const Operands&) {
  arch::sync_group(1, arch::thread_idx() < 64 ? 64 : 128);
}

__device__ void deadlock_of_two_barriers(const Operands&) {
  if (arch::thread_idx() < 64) {
    arch::sync_group(1, 128);
    arch::sync_group(2, 128);
  } else {
    arch::sync_group(2, 128);
    arch::sync_group(1, 128);
  }
}

// ---- other errors

__device__ void bank_conflicts(const Operands&) {
  auto& smem = arch::shared_memory<Tile<arch::bf16, 64, 64>>();
  for (int i = arch::thread_idx(); i < 64 * 64; i += kThreads) arch::from_float(smem.data[i], 0.0f);
  arch::sync_block();
  uint32_t r[4];
  for (int i = 0; i < 8; ++i) arch::ldmatrix_x4(r, smem.data + arch::thread_idx() % 32 * 64);
}

__device__ void tf32_not_rounded(const Operands&) {
  float d[4] = {};
  const uint32_t a[4] = {0x3f800001, 0, 0, 0}, b[2] = {};
  arch::mma_16x8x8_tf32(d, a, b);
}

}  // namespace

#define BAD(name) {#name, start<name>}
const Entry kBad[] = {
    BAD(missing_barrier),
    BAD(barrier_for_half_the_block),
    BAD(missing_sync_warp),
    BAD(shuffle_is_no_barrier),
    BAD(second_barrier_missing),
    BAD(all_write_one_place),
    BAD(neighbours_write_one_word),
    BAD(struct_copy_races),
    BAD(memcpy_races),
    BAD(blocks_write_one_place),
    BAD(block_reads_what_another_writes),
    BAD(blocks_add_to_one_place),
    BAD(threads_race_in_global_memory),
    BAD(missing_wait),
    BAD(missing_commit),
    BAD(wait_for_too_few),
    BAD(wait_without_barrier),
    BAD(barrier_before_wait),
    BAD(copy_over_what_is_read),
    BAD(copy_from_out_of_bounds),
    BAD(shared_out_of_bounds),
    {"too_little_shared_memory", start<too_little_shared_memory, kThreads, 64>},
    {"more_shared_memory_than_there_is", start<too_little_shared_memory, kThreads, 240'000>},
    {"part_of_a_warp", start<all_write_one_place, 48>},
    BAD(global_read_out_of_bounds),
    BAD(global_write_out_of_bounds),
    BAD(null_pointer),
    BAD(reads_between_rows),
    BAD(writes_an_input),
    BAD(reads_unwritten_shared),
    BAD(ldmatrix_reads_unwritten),
    BAD(misaligned_ldmatrix),
    BAD(misaligned_16_bytes),
    BAD(misaligned_vector),
    BAD(misaligned_copy),
    BAD(barrier_for_some_lanes),
    BAD(barrier_after_exit),
    BAD(different_barriers_in_a_warp),
    BAD(shuffle_for_some_lanes),
    BAD(different_shuffles),
    BAD(deadlock_by_wrong_count),
    BAD(counts_that_differ),
    BAD(deadlock_of_two_barriers),
    {"bank_conflicts", start<bank_conflicts, kThreads, sizeof(Tile<arch::bf16, 64, 64>)>},
    BAD(tf32_not_rounded),
    {nullptr, nullptr},
};
#undef BAD

}  // namespace hypenet::emu_tests
