// What the kernels of the gated delta rule share: chunks, and where sequences lie.
#pragma once

#include "arch/sm80.cuh"
#include "kernels.h"

namespace hypenet::cuda::gated_delta {

constexpr int kChunk = 64;  // tokens
constexpr int kBlock = 16;  // rows and columns of the blocks of a chunk's triangle

struct Sequence {
  int64_t batch, start, length, first_chunk;
};

template <class Params>
__device__ __forceinline__ Sequence sequence(const Params& params, int64_t n) {
  if (params.cu_seqlens == nullptr) return {n, 0, params.T, n * ((params.T + kChunk - 1) / kChunk)};
  const int64_t start = params.cu_seqlens[n];
  return {0, start, params.cu_seqlens[n + 1] - start, params.chunk_offsets[n]};
}

// The sequence that holds a chunk; -1 for a chunk past the last one.
template <class Params>
__device__ __forceinline__ int64_t sequence_of_chunk(const Params& params, int64_t chunk) {
  if (params.cu_seqlens == nullptr) return chunk / ((params.T + kChunk - 1) / kChunk);
  int64_t low = 0, high = params.N;  // chunk_offsets[low] <= chunk < chunk_offsets[high]
  if (chunk >= params.chunk_offsets[high]) return -1;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (params.chunk_offsets[middle] <= chunk ? low : high) = middle;
  }
  return low;
}

// Tokens of a sequence from token `first` on, at most a chunk's.
__device__ __forceinline__ int tokens_from(const Sequence& sequence, int64_t first) {
  const int64_t left = sequence.length - first;
  return left < kChunk ? static_cast<int>(left) : kChunk;
}

template <class Element>
__device__ __forceinline__ const Element* row_of(const View& x, int64_t batch, int64_t token, int64_t head) {
  return static_cast<const Element*>(x.data) + batch * x.batch + token * x.token + head * x.head;
}

// Calls run.template operator()<K>() for a K that is built.
template <class Run>
Status dispatch_key_dim(int64_t K, Run&& run) {
  switch (K) {
    case 64:
      return run.template operator()<64>();
    case 128:
      return run.template operator()<128>();
    default:
      return "K must be 64 or 128";
  }
}

// The kernels of the forward, in this order.
Status map_chunks(const GatedDeltaFwdParams& params, Stream stream);
Status prepare(const GatedDeltaFwdParams& params, Stream stream);
Status scan(const GatedDeltaFwdParams& params, Stream stream);

}  // namespace hypenet::cuda::gated_delta
