// Where sequences are split into segments that are processed at the same time, the state before each: a
// way to use a whole device for few heads, at about 2.25 times the work. The forward's is here, and the step
// from segment to segment of the backward (gated_delta_bwd_scan.cuh does the rest of that).
//
// Math: a segment turns the state S before it into M S + N, where neither M [K, K] nor N [K, V] depends on S.
//   (1) every segment but a sequence's last, alone: N by the recurrence of gated_delta_scan.cuh from S = 0,
//       and M by the same recurrence on other columns, from S = I with V = 0. The first segment starts from the
//       initial state instead, and needs no M. Simple GLA: M = product of gamma_last, a number.
//   (2) one segment after the other: S_{i+1} = M_i S_i + N_i, where (1) left N_i in the place of S_{i+1}; S_0
//   is copied from the initial state
// In the backward the gradients of the states after the segments go from the last to the first:
//   (2') dS_{i-1} = M_i^T dS_i + dN_i, where dN_i, the segment alone from dS = 0, is in the place of dS_{i-1}
//
// Shapes: GatedDeltaFwdParams, GatedDeltaBwdParams (params.h): segment_states, transfers. How many chunks a
// segment has comes from the caller, so that results depend on that number but on no device.
//
// Mapping: (1) a block of four warps owns 64 of the V + K columns (without delta: V) of one (segment, value
// head), numbered along x, the column tile fastest; as in gated_delta_scan.cuh from there on. (2) a block owns
// 16 columns of one (sequence, value head), warp w of four the rows K / 4 w of the new state: each reads the
// state whole, from where all have just written it.
//
// Shared memory: (1) for K = 128 two stages of k [64, K] 16 KB, L [64, 64] 8 KB, v [4][64, 16] 8 KB, G and
// beta: 65 KB, 2 blocks per SM; 113 KB for K = 256: 2 blocks where there are 228 KB, else 1. (2) none.
//
// Numerics: (1) as gated_delta_scan.cuh. (2) fp32 factors split into two tf32 each, three products for one, so
// that it adds no error of its own (2^-21 a step).
//
// Cost: (1) 2 (2 K + 15/8 C) FLOPs per token and column, 4 K more with some beta > 1 (2 K alone without
// delta), (2) 2 K per segment, row and column, three times; M is 4 K^2 bytes per segment and head, written
// once and read by V / 16 blocks through L2. (2) is serial in the segments and bound by the latency of
// reading M.
//
// Limits: as gated_delta_scan.cuh.
#pragma once

#include <type_traits>

#include "arch/sm80.cuh"
#include "gated_delta_state.cuh"

namespace hypenet::cuda::gated_delta::segments {
using namespace scan;

constexpr int kWarps = 4;

// (1) The warp's columns of the identity.
template <int n>
__device__ __forceinline__ void set_identity(Results<n>& S, int column) {
  const int r = lane_idx() / 4, c = lane_idx() % 4 * 2;
#pragma unroll
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) S[i][e] = 8 * i + c + e % 2 == column + r + e / 2 * 8 ? 1.0f : 0.0f;
  }
}

// (1)
template <class C>
__global__ void __launch_bounds__(C::kThreads, 2)
    gated_delta_segment_kernel(const __grid_constant__ GatedDeltaFwdParams params) {
  if (sizeof(ScanSmem<C>) > arch::kMaxSharedBytes) return;  // no GPU that runs this has it
  auto& smem = arch::shared_memory<ScanSmem<C>>();
  const unsigned num_columns = static_cast<unsigned>(params.V) + (C::kDelta ? C::kKeyDim : 0);
  const Slot<C> slot(params, num_columns / (C::kWarps * kColumns));
  const Segment segment = gated_delta::segment(params, slot.segment);
  const int V = static_cast<int>(params.V), column = static_cast<int>(slot.column);
  const bool finds_M = C::kDelta && column >= V;  // all warps of a block alike: both parts are whole blocks
  if (segment.n < 0 || segment.ends() || (finds_M && segment.starts())) return;
  if (is_skipped(params, segment.n)) return;
  const Place place = place_in(params, segment, slot.head, finds_M ? 0 : slot.column);
  const Lanes<C> lanes;
  Cursor<C> next(params, place);
  copy_chunk_async(smem.stages[0], params, next, finds_M ? 0 : next.num_tokens);
  arch::commit_copies();

  Results<C::kKeyDim / 8> S;
  if (finds_M) {
    set_identity(S, column - V);
  } else if (segment.starts() && params.initial_state != nullptr) {
    const auto* states = static_cast<const float*>(params.initial_state);
    for_each_of_state(S, states + slot.state_of_sequence(params, segment.n), V,
                      [](const float* from, float& x) { x = *from; });
  } else {
    set_zero(S);
  }
  float whole = 1.0f;
  for (int c = 0; next.num_tokens > 0; ++c) {
    Stage<C>& stage = smem.stages[c % 2];
    arch::wait_copies<0>();
    arch::sync_block();
    next.advance(params);
    if (next.num_tokens > 0) {
      copy_chunk_async(smem.stages[(c + 1) % 2], params, next, finds_M ? 0 : next.num_tokens);
    }
    arch::commit_copies();

    const bool compensated = C::kDelta && beta_exceeds_one(stage.beta);
    with_compensation<C>(compensated, [&]<Compensation kCompensation>() {
      Values<C::kWide> E(smem.values);
      if constexpr (C::kDelta) {
        Results<kChunk / 8> Z;
        read_state<C, true, false, kCompensation>(Z, Z, S, stage, lanes, compensated);
        form_residual<C>(Z, stage);
        solve<C>(E, Z, stage, lanes);
      } else {
        load_values<C>(E, stage);
      }
      update_state<C, kCompensation>(S, E, stage, lanes, compensated);
    });
    whole *= arch::exp2(stage.G[kChunk - 1]);
  }

  // recomputed here: keeping it live across the loop would cost registers
  const Slot<C> same(params, num_columns / (C::kWarps * kColumns));
  const int64_t head = same.segment * params.HV + same.head;
  if (finds_M) {
    for_each_of_state(S, params.transfers + head * C::kKeyDim * C::kKeyDim + (same.column - params.V),
                      C::kKeyDim, [](float* to, float x) { *to = x; });
    return;
  }
  if (!C::kDelta && same.column == 0 && lane_idx() == 0) params.transfers[head] = whole;
  for_each_of_state(S, params.segment_states + same.state(params, same.segment + 1), params.V,
                    [](float* to, float x) { *to = x; });
}

// (2) 8 rows of the new state, transposed: S^T [16, K] times those rows of M, or of M^T, whose first is `M`.
// Number k of a sum stands for column 2 k or 2 k + 1 of eight of S^T, of both factors alike, so that S is an
// operand where it lies.
template <int K, bool kTransposed>
__device__ __forceinline__ void multiply_by_transfer(float (&d)[4], const Results<K / 8>& S, const float* M) {
  const int r = lane_idx() / 4, c = lane_idx() % 4 * 2;
  float parts[3][4] = {};  // three sums at a time, as each is a chain of dependent products
#pragma unroll
  for (int k = 0; k < K; k += 8) {
    uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) split_tf32(a_high[i], a_low[i], S[k / 8][i % 2 * 2 + i / 2]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      split_tf32(b_high[i], b_low[i], kTransposed ? M[(k + c + i) * K + r] : M[r * K + k + c + i]);
    }
    arch::mma_16x8x8_tf32(parts[0], a_low, b_high);
    arch::mma_16x8x8_tf32(parts[1], a_high, b_low);
    arch::mma_16x8x8_tf32(parts[2], a_high, b_high);
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) d[e] = parts[0][e] + parts[1][e] + parts[2][e];
}

// (2), and (2') for the backward's params
template <int K_, Rule kRule, class Params_>
struct Chain {
  using Params = Params_;
  static constexpr int K = K_;
  static constexpr bool kDelta = kRule == Rule::kDelta,
                        kBackward = std::is_same_v<Params, GatedDeltaBwdParams>;
};

template <class C>
__global__ void __launch_bounds__(kWarps* arch::kWarpSize, 2)
    gated_delta_chain_kernel(const __grid_constant__ typename C::Params params) {
  constexpr int K = C::K;
  constexpr bool kDelta = C::kDelta, kBackward = C::kBackward;
  constexpr int kRows =
      K / kWarps;  // of the new state, by a warp; C::K / kWarps where NVRTC up to 12.8 would crash
  const int first_row = kRows * warp_idx();
  const auto num_tiles = static_cast<unsigned>(params.V / kColumns), HV = static_cast<unsigned>(params.HV);
  const unsigned block = arch::block_idx();
  const int64_t n = block / num_tiles / HV, head = block / num_tiles % HV, V = params.V;
  int64_t first = 0, count = 0;  // segments of the sequence
  if (params.cu_seqlens == nullptr) {
    count = num_segments(params.T, params.segment_chunks * kChunk), first = n * count;
  } else {
    first = params.segment_offsets[n], count = params.segment_offsets[n + 1] - first;
  }
  const int64_t state = params.HV * K * V;  // from a segment to the next
  float* states = params.segment_states + (first * params.HV + head) * K * V + block % num_tiles * kColumns;
  if constexpr (!kBackward) {
    if (is_skipped(params, n)) return;
    if (count > 1) {  // copied here, as the scan's last segment may overwrite the slot
      Results<C::K / kWarps / 8> S;
      set_zero(S);
      if (params.initial_state != nullptr) {
        const float* from = static_cast<const float*>(params.initial_state) +
                            slot_of(params, n) * slot_stride(params) + (head * K + first_row) * V;
        for_each_of_state(S, from + block % num_tiles * kColumns, V,
                          [](const float* x, float& s) { s = *x; });
      }
      for_each_of_state(S, states + first_row * V, V, [](float* x, float s) { *x = s; });
    }
  }
  const int64_t step = kBackward ? -1 : 1;
  int64_t i = kBackward ? count - 2 : 1;
  for (int64_t left = count - 2; left > 0; --left, i += step) {
    const float* transfer = params.transfers + ((first + i) * params.HV + head) * (kDelta ? K * K : 1);
    const float* from = states + i * state;
    float* to = states + (i + step) * state;
    if constexpr (kDelta) {
      Results<C::K / 8> S;
      for_each_of_state(S, from, V, [](const float* x, float& s) { s = *x; });
#pragma unroll 1
      for (int row = first_row; row < first_row + kRows; row += 8) {
        Results<1> sum;
        multiply_by_transfer<K, kBackward>(sum[0], S, transfer + row * (kBackward ? 1 : K));
        for_each_of_state(sum, to + row * V, V, [](float* x, float s) { *x += s; });
      }
    } else {
      Results<C::K / kWarps / 8> S;
      for_each_of_state(S, from + first_row * V, V, [](const float* x, float& s) { s = *x; });
      for_each_of_state(S, to + first_row * V, V, [&](float* x, float s) { *x += *transfer * s; });
    }
    arch::sync_block();
  }
}

}  // namespace hypenet::cuda::gated_delta::segments
