// Shared by the kernels of the gated delta rule: chunks, positions of sequences and segments, hi/lo pairs.
#pragma once

#include "arch/sm80.cuh"
#include "numbers.h"
#include "tile.cuh"
#include "view.cuh"

namespace hypenet::cuda::gated_delta {

// The update that a token makes to the state: k (v - S^T k)^T times beta, or k v^T, which has neither beta nor L.
enum class Rule { kDelta, kGla };

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

// The unit that is processed chunk by chunk: a sequence, or where sequences are split its `idx`-th segment.
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

// Whether sequence n has no state to start from: its slot is negative or does not exist.
__device__ __forceinline__ bool is_skipped(const GatedDeltaFwdParams& params, int64_t n) {
  if (params.state_indices.data == nullptr) return false;
  const int64_t slot = index_at(params.state_indices, n);
  return slot < 0 || slot >= params.num_slots;
}

// Tokens of a sequence from token `first` on, at most a chunk's.
__device__ __forceinline__ int tokens_from(const Sequence& sequence, int64_t first) {
  const int64_t left = sequence.length - first;
  return left < kChunk ? static_cast<int>(left) : kChunk;
}

// 2^(G_i - G_j), for i >= j. The sums G may rise by their rounding. 1 for NaN, which gamma passes on.
__device__ __forceinline__ float decay_between(float G_i, float G_j) {
  return arch::exp2(fminf(G_i - G_j, 0.0f));
}

// ---- hi/lo pairs: numbers as the sum of two of the operands' type (split bf16), for products whose errors would add
// up. Of the four products of two pairs, that of the two low parts is left out.
//
// L = stril((I + stril(diag(beta) K K^T . Gamma))^-1) is kept as a hi/lo pair in one [64, 64]: the high part below
// the diagonal, the low part, transposed, above it. What lies on the diagonal means nothing.

// x, y = high + low
template <class Element>
__device__ __forceinline__ void pack_hi_lo(uint32_t& high, uint32_t& low, float x, float y) {
  high = arch::pack<Element>(x, y);
  const float2 rounded = arch::unpack<Element>(high);
  low = arch::pack<Element>(x - rounded.x, y - rounded.y);
}

// Two results [16, 8] as a hi/lo pair of operands A [16, 16].
template <class Element>
__device__ __forceinline__ void split_hi_lo(uint32_t (&high)[4], uint32_t (&low)[4], const float (&left)[4],
                                            const float (&right)[4]) {
  pack_hi_lo<Element>(high[0], low[0], left[0], left[1]);
  pack_hi_lo<Element>(high[1], low[1], left[2], left[3]);
  pack_hi_lo<Element>(high[2], low[2], right[0], right[1]);
  pack_hi_lo<Element>(high[3], low[3], right[2], right[3]);
}

// Of a fragment [16, 16] on the diagonal what lies strictly below it, or above; the four matrices [8, 8] of
// which a lane has two elements of a row each. kEmpty: the one that lies wholly on the other side.
template <bool kBelow, int kEmpty>
__device__ __forceinline__ void keep_triangle(uint32_t (&fragment)[4]) {
  const int row = lane_idx() / 4, col = lane_idx() % 4 * 2;
  const bool first = kBelow ? col < row : col > row, second = kBelow ? col + 1 < row : col + 1 > row;
  const uint32_t kept = (first ? 0xffffu : 0u) | (second ? 0xffff0000u : 0u);
  fragment[0] &= kept;
  fragment[kEmpty] = 0;
  fragment[3] &= kept;
}

// Whether some beta of the chunk exceeds 1, by a warp. Then I - beta k k^T may reflect, and errors last instead of
// fading from token to token: such a chunk is compensated, that is, what crosses from chunk to chunk is taken as hi/lo
// pairs as well.
__device__ __forceinline__ bool beta_exceeds_one(const float (&beta)[kChunk]) {
  static_assert(kChunk == 2 * arch::kWarpSize);
  return arch::any(beta[lane_idx()] > 1.0f || beta[arch::kWarpSize + lane_idx()] > 1.0f);
}

// x = high + low, each of tf32's 11 bits.
__device__ __forceinline__ void split_tf32(uint32_t& high, uint32_t& low, float x) {
  high = arch::to_tf32(x);
  low = arch::to_tf32(x - __builtin_bit_cast(float, high));
}

}  // namespace hypenet::cuda::gated_delta
