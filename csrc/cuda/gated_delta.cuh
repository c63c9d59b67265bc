// What the kernels of the gated delta rule share: chunks, and where sequences and their segments lie.
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
__device__ __forceinline__ int64_t chunks_of_sequence(const Params& params) {
  return (params.T + kChunk - 1) / kChunk;  // without cu_seqlens
}

template <class Params>
__device__ __forceinline__ Sequence sequence(const Params& params, int64_t n) {
  if (params.cu_seqlens == nullptr) return {n, 0, params.T, n * chunks_of_sequence(params)};
  const int64_t start = params.cu_seqlens[n];
  return {0, start, params.cu_seqlens[n + 1] - start, params.chunk_offsets[n]};
}

// The sequence that holds item i, when those of sequence n are offsets[n] to offsets[n + 1] - 1; -1 past the
// last.
__device__ __forceinline__ int64_t find_sequence(const int64_t* offsets, int64_t N, int64_t i) {
  int64_t low = 0, high = N;  // offsets[low] <= i < offsets[high]
  if (i >= offsets[high]) return -1;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (offsets[middle] <= i ? low : high) = middle;
  }
  return low;
}

// The sequence that holds a chunk; -1 for a chunk past the last one.
template <class Params>
__device__ __forceinline__ int64_t sequence_of_chunk(const Params& params, int64_t chunk) {
  if (params.cu_seqlens == nullptr) return chunk / chunks_of_sequence(params);
  return find_sequence(params.chunk_offsets, params.N, chunk);
}

// What is gone through chunk by chunk: a sequence, or where sequences are split its `idx`-th segment.
struct Segment {
  Sequence sequence;
  int64_t n;              // -1 past the last segment; the rest then means nothing
  int64_t idx, count;     // segments of the sequence, at least one
  int64_t first, length;  // tokens of the sequence

  __device__ bool starts() const { return idx == 0; }
  __device__ bool ends() const { return idx == count - 1; }
};

// Segments of a sequence; one without tokens has one, since its state is to be handed on.
__device__ __forceinline__ int64_t num_segments(int64_t length, int64_t segment_tokens) {
  return length <= segment_tokens ? 1 : (length + segment_tokens - 1) / segment_tokens;
}

// Segment i of all.
template <class Params>
__device__ __forceinline__ Segment segment(const Params& params, int64_t i) {
  if (params.segment_chunks == 0) {
    const Sequence whole = sequence(params, i);
    return {whole, i, 0, 1, 0, whole.length};
  }
  const int64_t tokens = params.segment_chunks * kChunk;
  Segment s{};
  if (params.cu_seqlens == nullptr) {
    s.count = num_segments(params.T, tokens);
    s.n = i / s.count, s.idx = i % s.count;
  } else {
    s.n = find_sequence(params.segment_offsets, params.N, i);
    if (s.n < 0) return s;
    s.idx = i - params.segment_offsets[s.n];
    s.count = params.segment_offsets[s.n + 1] - params.segment_offsets[s.n];
  }
  s.sequence = sequence(params, s.n);
  s.first = s.idx * tokens;
  s.length = s.ends() ? s.sequence.length - s.first : tokens;
  return s;
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

// x = high + low, each of tf32's 11 bits.
__device__ __forceinline__ void split_tf32(uint32_t& high, uint32_t& low, float x) {
  high = arch::to_tf32(x);
  low = arch::to_tf32(x - __builtin_bit_cast(float, high));
}

// The kernels of the forward, in this order; the third only where sequences are split.
Status map_sequences(const GatedDeltaFwdParams& params, Stream stream);
Status prepare(const GatedDeltaFwdParams& params, Stream stream);
Status find_segment_states(const GatedDeltaFwdParams& params, Stream stream);
Status scan(const GatedDeltaFwdParams& params, Stream stream);

// What the segments of split sequences do to the state gradients, from what each does alone (segment_states)
// and the transfers of the forward.
Status chain_backward(const GatedDeltaBwdParams& params, Stream stream);

}  // namespace hypenet::cuda::gated_delta
