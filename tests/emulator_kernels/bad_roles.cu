// Kernels with one error each in what warps of several roles share: mbarriers, bulk copies, named barriers, registers.
#include "sm90_parts.cuh"

namespace hypenet::emu_tests {
namespace {

// ---- mbarriers. A producer, threads 128 to 255, and a consumer share one stage.

// `expected` arrivals fill the stage; the consumer waits for `parity`.
template <int kRounds, bool kWaitsForEmpty, bool kFlips>
__device__ void share_a_stage(int expected, int parity) {
  auto& smem = memory();
  init(smem.full, expected);
  init(smem.empty, 1);
  for (int round = 0; round < kRounds; ++round) {
    if (arch::thread_idx() >= 128) {
      if (kWaitsForEmpty) arch::wait(smem.empty, round % 2 ^ 1);
      fill(smem.a), fill(smem.b);
      arch::fence_async_proxy();
      arch::arrive(smem.full);
    } else {
      arch::wait(smem.full, kFlips ? round % 2 ^ parity : parity);
      multiply_and_wait(smem);
      if (arch::thread_idx() == 0) arch::arrive(smem.empty);
    }
  }
}

__device__ void producer_refills_too_early(const Operands&) { share_a_stage<3, false, true>(128, 0); }
__device__ void wait_with_the_wrong_parity(const Operands&) { share_a_stage<1, true, true>(128, 1); }
__device__ void parity_not_flipped(const Operands&) { share_a_stage<3, true, false>(128, 0); }
__device__ void arrival_count_too_small(const Operands&) { share_a_stage<2, true, true>(64, 0); }
__device__ void arrival_count_too_large(const Operands&) { share_a_stage<1, true, true>(129, 0); }

__device__ void more_arrivals_than_counted(const Operands&) {
  auto& smem = memory();
  init(smem.full, 1);
  if (arch::thread_idx() == 5) {
    arch::arrive_expect(smem.full, 64);
    arch::arrive(smem.full);
  }
}

__device__ void mbarrier_not_initialised(const Operands&) { arch::arrive(memory().full); }

__device__ void mbarrier_initialised_without_fence(const Operands&) {
  auto& smem = memory();
  if (arch::thread_idx() == 0) arch::init_mbarrier(smem.full, 128);
  arch::sync_block();
  arch::arrive(smem.full);
}

__device__ void mbarrier_initialised_without_barrier(const Operands&) {
  auto& smem = memory();
  if (arch::thread_idx() == 0) {
    arch::init_mbarrier(smem.full, 128);
    arch::fence_mbarrier_init();
  }
  arch::arrive(smem.full);
}

__device__ void mbarrier_initialised_by_two(const Operands&) {
  auto& smem = memory();
  if (arch::thread_idx() == 0) arch::init_mbarrier(smem.full, 128);
  arch::sync_block();
  if (arch::thread_idx() == 64) arch::init_mbarrier(smem.full, 128);
}

__device__ void mbarrier_overwritten(const Operands&) {
  auto& smem = memory();
  init(smem.full, 128);
  if (arch::thread_idx() == 0) smem.full.state = 0;
  arch::sync_block();
  arch::arrive(smem.full);
}

// Threads 0 to 63 write an element each and call after_write, the others call before_read and read it.
template <class AfterWrite, class BeforeRead>
__device__ void hand_over(const Operands& p, int count, AfterWrite&& after_write, BeforeRead&& before_read) {
  auto& smem = memory();
  init(smem.full, count);
  const int i = arch::thread_idx();
  if (i < 64) {
    smem.x[i] = 1.0f;
    after_write(smem, i);
  } else {
    before_read(smem, i);
    out(p)[i] = smem.x[i - 64];
  }
}

__device__ void one_lane_waits_for_its_warp(const Operands& p) {
  hand_over(
      p, 64, [](Smem& smem, int) { arch::arrive(smem.full); },
      [](Smem& smem, int i) {
        if (i % 32 == 0) arch::wait(smem.full, 0);
      });
}

__device__ void one_lane_arrives_for_its_warp(const Operands& p) {
  hand_over(
      p, 2,
      [](Smem& smem, int i) {
        if (i % 32 == 0) arch::arrive(smem.full);
      },
      [](Smem& smem, int) { arch::wait(smem.full, 0); });
}

__device__ void write_after_arrival(const Operands& p) {
  hand_over(
      p, 64,
      [](Smem& smem, int i) {
        arch::arrive(smem.full);
        smem.x[i] = 2.0f;
      },
      [](Smem& smem, int) { arch::wait(smem.full, 0); });
}

// ---- bulk copies

// One thread copies 64 bytes and announces `announced`; all wait and read.
__device__ void copy_bulk(const Operands& p, int announced, int offset = 0, int bytes = 64) {
  auto& smem = memory();
  init(smem.full, 1);
  if (arch::thread_idx() == 0) {
    arch::arrive_expect(smem.full, announced);
    arch::copy_bulk(smem.x, in(p) + offset, bytes, smem.full);
  }
  arch::wait(smem.full, 0);
  out(p)[arch::thread_idx()] = smem.x[arch::thread_idx() % 16];
}

__device__ void too_few_bytes_announced(const Operands& p) { copy_bulk(p, 48); }
__device__ void too_many_bytes_announced(const Operands& p) { copy_bulk(p, 80); }
__device__ void no_bytes_announced(const Operands& p) { copy_bulk(p, 0); }
__device__ void bulk_copy_misaligned(const Operands& p) { copy_bulk(p, 64, 1); }
__device__ void bulk_copy_of_24_bytes(const Operands& p) { copy_bulk(p, 24, 0, 24); }
__device__ void bulk_copy_out_of_bounds(const Operands& p) { copy_bulk(p, 64, 252); }

__device__ void bulk_copy_not_waited_for(const Operands& p) {
  auto& smem = memory();
  init(smem.full, 1);
  if (arch::thread_idx() == 0) {
    arch::arrive_expect(smem.full, 64);
    arch::copy_bulk(smem.x, in(p), 64, smem.full);
    arch::wait(smem.full, 0);
  }
  out(p)[arch::thread_idx()] = smem.x[arch::thread_idx() % 16];
}

__device__ void bulk_copy_over_unfenced_writes(const Operands& p) {
  auto& smem = memory();
  smem.x[arch::thread_idx()] = 1.0f;
  copy_bulk(p, 64);
}

__device__ void exit_with_a_bulk_copy_under_way(const Operands& p) {
  auto& smem = memory();
  init(smem.full, 2);
  if (arch::thread_idx() != 0) return;
  arch::arrive_expect(smem.full, 256 * 4);
  for (int i = 0; i < 64; ++i) arch::copy_bulk(smem.x + i * 4, in(p) + i * 4, 16, smem.full);
}

// ---- named barriers

__device__ void roles_disagree_on_the_count(const Operands&) {
  arch::thread_idx() < 64 ? arch::arrive_group(1, 128) : arch::sync_group(1, 64);
  arch::thread_idx() < 64 ? arch::sync_group(2, 96) : arch::arrive_group(2, 128);
}

__device__ void barrier_that_nobody_completes(const Operands&) {
  if (arch::thread_idx() < 64) arch::arrive_group(1, 128);
}

__device__ void wait_that_nobody_completes(const Operands&) {
  if (arch::thread_idx() < 64) arch::sync_group(1, 128);
  if (arch::thread_idx() >= 96) arch::arrive_group(1, 128);
}

__device__ void arrival_taken_for_a_wait(const Operands& p) {
  auto& smem = memory();
  const int i = arch::thread_idx();
  smem.x[i] = 1.0f;
  i < 64 ? arch::sync_group(1, 128) : arch::arrive_group(1, 128);
  out(p)[i] = smem.x[i ^ 64];
}

__device__ void write_after_named_arrival(const Operands& p) {
  auto& smem = memory();
  const int i = arch::thread_idx();
  smem.x[i] = 1.0f;
  i < 64 ? arch::sync_group(1, 128) : arch::arrive_group(1, 128);
  if (i >= 64) smem.x[i] = 2.0f;
  if (i < 64) out(p)[i] = smem.x[i ^ 64];
}

// ---- registers

__device__ void registers_beyond_64k(const Operands&) {
  if (arch::thread_idx() < 128) {
    arch::set_max_registers_down<104>();
  } else {
    arch::set_max_registers_up<208>();
  }
}

__device__ void registers_not_a_multiple_of_8(const Operands&) { arch::set_max_registers_down<100>(); }

__device__ void registers_of_one_warp(const Operands&) {
  if (arch::thread_idx() < 32) arch::set_max_registers_down<40>();
}

__device__ void registers_lowered_to_more(const Operands&) { arch::set_max_registers_down<240>(); }

}  // namespace

const Entry kBadRoles[] = {
    BAD_WITH(256, producer_refills_too_early),
    BAD_WITH(256, wait_with_the_wrong_parity),
    BAD_WITH(256, parity_not_flipped),
    BAD_WITH(256, arrival_count_too_small),
    BAD_WITH(256, arrival_count_too_large),
    BAD(more_arrivals_than_counted),
    BAD(mbarrier_not_initialised),
    BAD(mbarrier_initialised_without_fence),
    BAD(mbarrier_initialised_without_barrier),
    BAD(mbarrier_initialised_by_two),
    BAD(mbarrier_overwritten),
    BAD(one_lane_waits_for_its_warp),
    BAD(one_lane_arrives_for_its_warp),
    BAD(write_after_arrival),
    BAD(too_few_bytes_announced),
    BAD(too_many_bytes_announced),
    BAD(no_bytes_announced),
    BAD(bulk_copy_misaligned),
    BAD(bulk_copy_of_24_bytes),
    BAD(bulk_copy_out_of_bounds),
    BAD(bulk_copy_not_waited_for),
    BAD(bulk_copy_over_unfenced_writes),
    BAD(exit_with_a_bulk_copy_under_way),
    BAD(roles_disagree_on_the_count),
    BAD(barrier_that_nobody_completes),
    BAD(wait_that_nobody_completes),
    BAD(arrival_taken_for_a_wait),
    BAD(write_after_named_arrival),
    BAD_WITH(384, registers_beyond_64k),
    BAD(registers_not_a_multiple_of_8),
    BAD(registers_of_one_warp),
    BAD_WITH(384, registers_lowered_to_more),
    {nullptr, nullptr},
};

}  // namespace hypenet::emu_tests
