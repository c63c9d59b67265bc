// Kernels with one error each in their use of wgmma, which their name states. test_emulator_sm90.py has the messages.
#include "sm90_parts.cuh"

namespace hypenet::emu_tests {
namespace {

// ---- proxies

__device__ void missing_proxy_fence(const Operands&) {
  auto& smem = memory();
  fill(smem.a), fill(smem.b);
  arch::sync_block();
  multiply_and_wait(smem);
}

__device__ void proxy_fence_by_the_reader_only(const Operands&) {
  auto& smem = memory();
  if (arch::thread_idx() >= 128) fill(smem.a), fill(smem.b);
  arch::sync_block();
  if (arch::thread_idx() >= 128) return;
  arch::fence_async_proxy();
  multiply_and_wait(smem);
}

__device__ void proxy_fence_before_the_write(const Operands&) {
  auto& smem = memory();
  fill(smem.a);
  arch::fence_async_proxy();
  fill(smem.b);
  arch::sync_block();
  multiply_and_wait(smem);
}

__device__ void proxy_fence_without_barrier(const Operands&) {
  auto& smem = memory();
  fill(smem.a), fill(smem.b);
  arch::fence_async_proxy();
  multiply_and_wait(smem);
}

__device__ void proxy_fence_after_the_barrier(const Operands&) {
  auto& smem = memory();
  fill(smem.a), fill(smem.b);
  arch::sync_block();
  arch::fence_async_proxy();
  multiply_and_wait(smem);
}

__device__ void proxy_fence_by_one_lane(const Operands&) {
  auto& smem = memory();
  fill(smem.a), fill(smem.b);
  if (arch::thread_idx() % 32 == 0) arch::fence_async_proxy();
  arch::sync_block();
  multiply_and_wait(smem);
}

__device__ void copies_fenced_before_they_land(const Operands& p) {
  auto& smem = memory();
  copy(p, smem.a), copy(p, smem.b);
  arch::fence_async_proxy();
  arch::wait_copies<0>();
  arch::sync_block();
  multiply_and_wait(smem);
}

__device__ void copies_not_waited_for(const Operands& p) {
  auto& smem = memory();
  copy(p, smem.a), copy(p, smem.b);
  arch::wait_copies<1>();
  arch::fence_async_proxy();
  arch::sync_block();
  multiply_and_wait(smem);
}

__device__ void unwritten_operand(const Operands&) {
  auto& smem = memory();
  fill(smem.a);
  arch::fence_async_proxy();
  arch::sync_block();
  multiply_and_wait(smem);
}

// ---- groups of wgmma, and their registers

__device__ void missing_wgmma_fence(const Operands&) {
  auto& smem = filled();
  float d[32];
  multiply(d, smem);
  arch::commit_wgmma();
  arch::wait_wgmma<0>(d);
}

__device__ void second_group_without_fence(const Operands&) {
  auto& smem = filled();
  float d[32];
  start_to_multiply(d, smem);
  multiply(d, smem);
  arch::commit_wgmma();
  arch::wait_wgmma<0>(d);
}

__device__ void accumulator_set_after_the_fence(const Operands&) {
  auto& smem = filled();
  float d[32];
  arch::fence_wgmma(d);
  for (float& x : d) x = 1.0f;
  arch::wgmma<bf16>(d, describe(smem.a.data), describe(smem.b.data));
  arch::commit_wgmma();
  arch::wait_wgmma<0>(d);
}

// The operand of the second k-step is loaded while the first one is under way.
__device__ void register_operand_loaded_after_the_fence(const Operands&) {
  auto& smem = filled();
  float d[32];
  uint32_t a[2][4];
  load_a(a[0], smem.a, warp_idx() * 16, 0);
  arch::fence_wgmma(d);
  arch::wgmma<bf16>(d, a[0], describe(smem.b.data), false);
  load_a(a[1], smem.a, warp_idx() * 16, 16);
  arch::wgmma<bf16>(d, a[1], describe(smem.b.data + 16));
  arch::commit_wgmma();
  arch::wait_wgmma<0>(d);
}

__device__ void missing_wgmma_commit(const Operands&) {
  auto& smem = filled();
  float d[32];
  arch::fence_wgmma(d);
  multiply(d, smem);
  arch::wait_wgmma<0>(d);
}

__device__ void missing_wgmma_wait(const Operands& p) {
  auto& smem = filled();
  float d[32];
  start_to_multiply(d, smem);
  out(p)[arch::thread_idx()] = d[3];
}

__device__ void wait_for_too_few_groups(const Operands& p) {
  auto& smem = filled();
  float d[32];
  start_to_multiply(d, smem);
  arch::wait_wgmma<1>(d);
  out(p)[arch::thread_idx()] = d[3];
}

__device__ void accumulator_read_early(const Operands& p) {
  auto& smem = filled();
  float d[32], e[32];
  start_to_multiply(d, smem);
  start_to_multiply(e, smem);
  arch::wait_wgmma<1>(d);
  out(p)[arch::thread_idx()] = d[3] + e[5];
  arch::wait_wgmma<0>(e);
}

__device__ void accumulator_written_early(const Operands&) {
  auto& smem = filled();
  float d[32];
  start_to_multiply(d, smem);
  d[7] = 0.0f;
  arch::wait_wgmma<0>(d);
}

__device__ void accumulator_in_two_shapes(const Operands&) {
  auto& smem = filled();
  float d[32];
  start_to_multiply(d, smem);
  arch::fence_wgmma(d);
  arch::wgmma<bf16>(reinterpret_cast<float (&)[16]>(d), describe(smem.a.data), describe(smem.b.data));
  arch::commit_wgmma();
  arch::wait_wgmma<0>(d);
}

__device__ void register_operand_overwritten_early(const Operands&) {
  auto& smem = filled();
  float d[32];
  uint32_t a[4] = {};
  arch::fence_wgmma(d);
  arch::wgmma<bf16>(d, a, describe(smem.b.data), false);
  arch::commit_wgmma();
  a[2] = static_cast<uint32_t>(arch::thread_idx());
  arch::wait_wgmma<0>(d);
}

__device__ void register_operand_reloaded_early(const Operands&) {
  auto& smem = filled();
  float d[32];
  uint32_t a[4];
  for (int k = 0; k < 32; k += 16) {
    load_a(a, smem.a, warp_idx() * 16, k);
    arch::fence_wgmma(d);
    arch::wgmma<bf16>(d, a, describe(smem.b.data + k), k > 0);
    arch::commit_wgmma();
  }
  arch::wait_wgmma<0>(d);
}

__device__ void shared_operand_stored_early(const Operands&) {
  auto& smem = filled();
  float d[32];
  start_to_multiply(d, smem);
  if (arch::thread_idx() == 70) arch::from_float(*smem.b.at(5, 3), 2.0f);
  arch::wait_wgmma<0>(d);
}

__device__ void shared_operand_copied_over_early(const Operands& p) {
  auto& smem = filled();
  float d[32];
  start_to_multiply(d, smem);
  if (arch::thread_idx() == 70) arch::copy_16_async(smem.b.at(5, 0), in(p), true);
  arch::wait_wgmma<0>(d);
}

__device__ void shared_operand_bulk_copied_over_early(const Operands& p) {
  auto& smem = filled();
  init(smem.full, 1);
  float d[32];
  start_to_multiply(d, smem);
  if (arch::thread_idx() == 70) {
    arch::arrive_expect(smem.full, 64);
    arch::copy_bulk(smem.b.data, in(p), 64, smem.full);
  }
  arch::wait_wgmma<0>(d);
}

__device__ void exit_with_wgmma_under_way(const Operands&) {
  auto& smem = filled();
  float d[32];
  start_to_multiply(d, smem);
}

// ---- descriptors

__device__ void multiply_by(uint64_t a, uint64_t b) {
  float d[32];
  arch::fence_wgmma(d);
  arch::wgmma<bf16>(d, a, b, false);
  arch::commit_wgmma();
  arch::wait_wgmma<0>(d);
}

__device__ void descriptor_misaligned(const Operands&) {
  auto& smem = filled();
  multiply_by(describe(smem.a.data + 4 * 64), describe(smem.b.data));
}

__device__ void descriptor_out_of_its_tile(const Operands&) {
  auto& smem = filled();
  multiply_by(describe(smem.a.data), describe(smem.b.data + 56));
}

__device__ void descriptor_out_of_shared_memory(const Operands&) {
  auto& smem = filled();
  multiply_by(describe(smem.a.data), arch::matrix_descriptor(smem.b.data, 16 * kPattern));
}

__device__ void descriptor_of_global_memory(const Operands& p) {
  auto& smem = filled();
  multiply_by(describe(smem.a.data), describe(p.a));
}

__device__ void descriptor_with_the_stride_of_a_row(const Operands&) {
  auto& smem = filled();
  multiply_by(describe(smem.a.data), arch::matrix_descriptor(smem.b.data, 128));
}

__device__ void descriptor_without_swizzle(const Operands&) {
  auto& smem = filled();
  multiply_by(describe(smem.a.data), describe(smem.b.data) & ~(uint64_t{3} << 62));
}

__device__ void descriptor_without_leading_offset(const Operands&) {
  auto& smem = filled();
  float d[64];
  arch::fence_wgmma(d);
  arch::wgmma<bf16, arch::Major::kK, arch::Major::kMN>(d, describe(smem.a.data), describe(smem.b.data),
                                                       false);
  arch::commit_wgmma();
  arch::wait_wgmma<0>(d);
}

__device__ void different_descriptors_in_a_warpgroup(const Operands&) {
  auto& smem = filled();
  multiply_by(describe(smem.a.data), describe(arch::thread_idx() < 96 ? smem.b.data : smem.a.data));
}

// Found by its result alone: a wgmma cannot know where a row was meant to be.
__device__ void swizzled_by_half_the_row(const Operands& p) {
  auto& smem = memory();
  fill(smem.a);
  for (int i = arch::thread_idx(); i < 64 * 64; i += 128) {
    const int row = i / 64, col = i % 64;
    arch::from_float(smem.b.data[row * 64 + (col / 8 ^ row / 2 % 4) * 8 + col % 8], col < 16 ? 1.0f : 0.0f);
  }
  arch::fence_async_proxy();
  arch::sync_block();
  float d[32];
  multiply_and_wait(d, smem);
  for (int i = 0; i < 32; ++i) out(p)[arch::thread_idx() * 32 + i] = d[i];
}

// ---- who takes part

__device__ void wgmma_by_three_warps(const Operands&) {
  auto& smem = filled();
  float d[32];
  if (arch::thread_idx() < 96) multiply_and_wait(d, smem);
}

__device__ void wgmma_by_an_unaligned_warpgroup(const Operands&) {
  float d[32];
  if (arch::thread_idx() >= 64 && arch::thread_idx() < 192) multiply_and_wait(d, memory());
}

__device__ void wgmma_by_half_a_warp(const Operands&) {
  auto& smem = filled();
  float d[32];
  if (arch::thread_idx() % 32 < 16) multiply_and_wait(d, smem);
}

__device__ void wgmma_in_a_block_of_three_warps(const Operands&) {
  float d[32];
  arch::fence_wgmma(d);
}

__device__ void warps_at_different_instructions(const Operands&) {
  auto& smem = filled();
  float d[32];
  arch::fence_wgmma(d);
  if (arch::thread_idx() < 64) multiply(d, smem);
  arch::commit_wgmma();
  arch::wait_wgmma<0>(d);
}

}  // namespace

const Entry kBadWgmma[] = {
    BAD(missing_proxy_fence),
    BAD_WITH(256, proxy_fence_by_the_reader_only),
    BAD(proxy_fence_before_the_write),
    BAD(proxy_fence_without_barrier),
    BAD(proxy_fence_after_the_barrier),
    BAD(proxy_fence_by_one_lane),
    BAD(copies_fenced_before_they_land),
    BAD(copies_not_waited_for),
    BAD(unwritten_operand),
    BAD(missing_wgmma_fence),
    BAD(second_group_without_fence),
    BAD(accumulator_set_after_the_fence),
    BAD(register_operand_loaded_after_the_fence),
    BAD(missing_wgmma_commit),
    BAD(missing_wgmma_wait),
    BAD(wait_for_too_few_groups),
    BAD(accumulator_read_early),
    BAD(accumulator_written_early),
    BAD(accumulator_in_two_shapes),
    BAD(register_operand_overwritten_early),
    BAD(register_operand_reloaded_early),
    BAD(shared_operand_stored_early),
    BAD(shared_operand_copied_over_early),
    BAD(shared_operand_bulk_copied_over_early),
    BAD(exit_with_wgmma_under_way),
    BAD(descriptor_misaligned),
    BAD(descriptor_out_of_its_tile),
    BAD(descriptor_out_of_shared_memory),
    BAD(descriptor_of_global_memory),
    BAD(descriptor_with_the_stride_of_a_row),
    BAD(descriptor_without_swizzle),
    BAD(descriptor_without_leading_offset),
    BAD(different_descriptors_in_a_warpgroup),
    BAD(swizzled_by_half_the_row),
    BAD(wgmma_by_three_warps),
    BAD_WITH(256, wgmma_by_an_unaligned_warpgroup),
    BAD(wgmma_by_half_a_warp),
    BAD_WITH(96, wgmma_in_a_block_of_three_warps),
    BAD(warps_at_different_instructions),
    {nullptr, nullptr},
};

}  // namespace hypenet::emu_tests
