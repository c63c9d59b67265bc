// Fills the output rows that the other kernels over whole sequences do not write: zeros from cu_seqlens[N]
// on, and in the forward zeros for a sequence whose slot in the pool of states is negative, NaN where the
// slot does not exist.
//
// Shapes: GatedDeltaFwdParams, GatedDeltaBwdParams (params.h). The end of the last sequence is read on the
// device, so that nothing waits for the host.
//
// Mapping: the rows of a sequence, or of the tail, are contiguous in every output. All threads of the grid
// store 16-byte vectors of one such range after the other; each warp reads the slots of 32 sequences at once.
// The size of the grid follows from shapes alone.
//
// Cost: the bytes to fill. Usually there are none, and the kernel costs its launch; it is launched only with
// cu_seqlens or state_indices.
#pragma once

#include <type_traits>

#include "arch/sm80.cuh"
#include "gated_delta.cuh"

namespace hypenet::cuda::gated_delta::fill {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 256;
constexpr uint32_t kZero = 0, kNaN = 0x7fc07fc0;  // of 32 bits, or two of 16 in bfloat16 or float16

// Fills [first, last) of an array of 4-byte words; all of the grid's threads take part.
__device__ __forceinline__ void fill(void* array, int64_t first, int64_t last, uint32_t value,
                                     int64_t num_threads) {
  constexpr int64_t kVector = 4;
  auto* words = static_cast<uint32_t*>(array);
  const int64_t thread = static_cast<int64_t>(arch::block_idx()) * kThreads + arch::thread_idx();
  const int64_t body = (first + kVector - 1) / kVector * kVector, end = last / kVector * kVector;
  for (int64_t i = body + kVector * thread; i < end; i += kVector * num_threads) {
    arch::store_16_bytes(words + i, uint4{value, value, value, value});
  }
  // the remaining words at both ends, at most three each
  const int64_t head_end = body < last ? body : last, tail = end > head_end ? end : head_end;
  if (thread < head_end - first) words[first + thread] = value;
  if (thread < last - tail) words[tail + thread] = value;
}

// Fills rows [first, last), counted over the batch, of every output that has a row for each token.
__device__ __forceinline__ void fill_rows(const GatedDeltaFwdParams& params, int64_t first, int64_t last,
                                          uint32_t value, int64_t num_threads) {
  const int64_t row = params.HV * params.V / 2;
  fill(params.o, first * row, last * row, value, num_threads);
}
__device__ __forceinline__ void fill_rows(const GatedDeltaBwdParams& params, int64_t first, int64_t last,
                                          uint32_t value, int64_t num_threads) {
  const int64_t key_row = params.H * params.K / 2, row = params.HV * params.V / 2, HV = params.HV;
  fill(params.dq, first * key_row, last * key_row, value, num_threads);
  fill(params.dk, first * key_row, last * key_row, value, num_threads);
  fill(params.dv, first * row, last * row, value, num_threads);
  fill(params.dg, first * HV, last * HV, value, num_threads);
  if (params.delta) fill(params.dbeta, first * HV, last * HV, value, num_threads);
}

// The size of the grid: a thread for each 16-byte vector of o (of dv), at most kMaxBlocks blocks.
template <class Params>
__host__ __device__ __forceinline__ int64_t num_blocks(const Params& params) {
  const int64_t vectors = params.B * params.T * params.HV * params.V / kPiece;
  const int64_t blocks = (vectors + kThreads - 1) / kThreads;
  return blocks < kMaxBlocks ? blocks : kMaxBlocks;
}

template <class Params>
__global__ void __launch_bounds__(kThreads, 1)
    gated_delta_fill_kernel(const __grid_constant__ Params params) {
  const int64_t num_threads = num_blocks(params) * kThreads;
  if (params.cu_seqlens != nullptr) {
    const int64_t end = params.cu_seqlens[params.N];
    fill_rows(params, end < 0 ? 0 : end, params.T, kZero, num_threads);
  }
  if constexpr (std::is_same_v<Params, GatedDeltaFwdParams>) {
    if (params.state_indices.data == nullptr) return;
    for (int64_t first = 0; first < params.N; first += arch::kWarpSize) {
      const int64_t mine = first + lane_idx();
      if (!arch::any(mine < params.N && is_skipped(params, mine))) continue;
      const int64_t last = first + arch::kWarpSize < params.N ? first + arch::kWarpSize : params.N;
      for (int64_t n = first; n < last; ++n) {
        if (!is_skipped(params, n)) continue;
        const bool is_padding = index_at(params.state_indices, n) < 0;
        int64_t start = n * params.T, stop = start + params.T;
        if (params.cu_seqlens != nullptr) start = params.cu_seqlens[n], stop = params.cu_seqlens[n + 1];
        fill_rows(params, start, stop, is_padding ? kZero : kNaN, num_threads);
      }
    }
  }
}

}  // namespace hypenet::cuda::gated_delta::fill
