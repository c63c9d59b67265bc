// commit_states: keeps one of the states that a decode step of several draft tokens returned.
//
//   slot of sequence b := states[b, num_accepted[b] - 1]
//
// Shapes: CommitStatesParams (params.h). A slot keeps its state where num_accepted is 0, and where its index
// or num_accepted is out of range.
//
// Mapping: a state [HV, K, V] is contiguous on both sides. A block copies part of one sequence's state,
// kVectors 16-byte vectors a thread (4-byte words where an address or a size is no multiple of 16 bytes); all
// loads of a thread are in flight at once.
//
// Cost: reads and writes a state per sequence. Bound by memory.
#pragma once

#include "arch/sm80.cuh"
#include "view.cuh"

namespace hypenet::cuda::states {

constexpr int kThreads = 256;
constexpr int kVectors = 4;  // per thread

__host__ __device__ __forceinline__ int64_t element_bytes(const CommitStatesParams& params) {
  return params.dtype == DType::kFloat64 ? 8 : 4;
}
__host__ __device__ __forceinline__ int64_t state_bytes(const CommitStatesParams& params) {
  return params.HV * params.K * params.V * element_bytes(params);
}

// Word: uint4, or uint32_t where not everything is a multiple of 16 bytes.
template <class Word>
__host__ __device__ __forceinline__ int64_t blocks_of_state(const CommitStatesParams& params) {
  constexpr int64_t kBytes = sizeof(Word) * kThreads * kVectors;
  return (state_bytes(params) + kBytes - 1) / kBytes;
}

template <class Word>
__global__ void __launch_bounds__(kThreads)
    commit_states_kernel(const __grid_constant__ CommitStatesParams params) {
  const int64_t blocks = blocks_of_state<Word>(params), b = arch::block_idx() / blocks;
  const int64_t slot = slot_of(params, b), accepted = index_at(params.num_accepted, b);
  if (slot < 0 || slot >= params.num_slots || accepted <= 0 || accepted > params.T) return;
  const int64_t bytes = state_bytes(params), words = bytes / sizeof(Word);
  const auto* from = reinterpret_cast<const Word*>(static_cast<const char*>(params.states) +
                                                   (b * params.T + accepted - 1) * bytes);
  auto* to = reinterpret_cast<Word*>(static_cast<char*>(params.state) +
                                     slot * slot_stride(params) * element_bytes(params));
  const int64_t first = arch::block_idx() % blocks * kThreads * kVectors + arch::thread_idx();
  Word x[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (first + i * kThreads < words) x[i] = from[first + i * kThreads];
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (first + i * kThreads < words) to[first + i * kThreads] = x[i];
  }
}

}  // namespace hypenet::cuda::states
