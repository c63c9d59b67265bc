// The part of the chunk forward of the gated delta rule and simple GLA that is serial in T: the state goes
// from chunk to chunk. What does not need the state is in workspace already (gated_delta_prepare.cuh), but for simple
// GLA's P, which is made here.
//
// Math, per chunk of 64 tokens, S the state before it; G, L and P from workspace, gamma = 2^G, s the scale:
//   (0) simple GLA: P = s Q K^T . Gamma
//   (1) Z = K S                      O = Q S
//   (2) B = beta (V - gamma Z)
//   (3) E = B + L B                  simple GLA: E = V, and neither (2) nor Z
//   (4) O = s gamma O + P E
//   (5) S := gamma_last S + K^T (gamma_last / gamma E)
//
// Shapes: GatedDeltaFwdParams (params.h); K = 64, 128 or 256, V a multiple of 64. Where the forward keeps h,
// S is written there, rounded, before each chunk. Where sequences are split, a segment of one is processed
// like a sequence, from the state that gated_delta_segments.cuh found.
//
// Mapping: a block owns 16 kWarps columns of V of one (sequence or segment, value head); blocks are
// numbered along x, the column tile fastest. Every warp owns 16 columns from the first chunk to the last
// and shares nothing with the others but the tiles that they read, so that a chunk costs one block barrier.
// Simple GLA has a second one, before (4), for P: of K = 128, blocks of two or eight warps have four more,
// helpers, which make P while the others do (1), of two warps also (5); else the warps share out its ten
// blocks. A warp holds S^T [16, K] as results of mma. Everything is computed transposed, so that results,
// rounded where they lie, are the next product's operand A: S^T of Z^T = S^T K^T and of O^T = S^T Q^T, B^T,
// made from Z^T in place, of E^T = B^T + B^T L^T, again in place, and E^T of S^T += E^T K and of O^T += E^T
// P^T. Between the tiles' arrival and the store of O nothing but simple GLA's P passes through shared
// memory. Two warps, four or eight is a question of how many blocks there are (choices.h); the results are
// the same bits.
//
// Shared memory, two stages of (K = 128, eight warps; for four, v is half as large):
//   k, q           [64, K]      Element   32 KB
//   P | L          [64, 128]    Element   16 KB    P's blocks above the diagonal are never touched
//   v              [8][64, 16]  Element   16 KB    a tile per warp; (4) leaves O there
//   G, beta        [64]         fp32     0.5 KB
// 129 KB: 1 block of 8 warps per SM; 113 KB: 2 blocks of 4 warps where there are 228 KB, else 1. For K
// = 256, where S^T takes half of a warp's registers, E^T waits in 4 KB of shared memory a warp, and (1) makes
// O when Z has gone: 225 KB, or 193 KB for four warps, which Hopper has.
//
// Pipeline: while a chunk is computed, the copies of the next one run. Top of a chunk: wait for own copies,
// barrier (the chunk is here, and all warps have left the other stage), start the copies of the next.
//
// Numerics: S, Z, B, E and O are fp32. Rounded to Element are S as an operand, P, E to the chunk's end, and
// O. Keys that repeat make E a small difference of large B, so that B, L, and E in (4) are hi/lo pairs: twice the
// digits for three products of (3) instead of one, and two of (4). Where some beta of the chunk exceeds 1, S
// in K S and E to the chunk's end are hi/lo pairs too.
//
// Cost per chunk and 16 columns, K = 128: 292 mma (420 with some beta > 1, 148 without delta) behind 130
// ldmatrix (194, 78), and 33 exponentials a lane; without delta 160 mma, 160 ldmatrix and 80 exponentials a
// block more. Per chunk and block 45 KB of tiles besides v (32 KB without delta), which the blocks of one
// head share in L2. Bound by the latency of a chunk where there are few heads, else by mma.
//
// Limits: bf16, fp16; fewer than 2^31 tokens in a sequence; 2^31 - 1 blocks.
#pragma once

#include "arch/sm80.cuh"
#include "gated_delta_state.cuh"

namespace hypenet::cuda::gated_delta::scan {

static_assert(sizeof(ScanSmem<Config<arch::bf16, 128, Rule::kDelta, Pass::kOutput, 8>>) == 129 * 1024);
static_assert(2 * (sizeof(ScanSmem<Config<arch::bf16, 128, Rule::kDelta, Pass::kOutput, 4>>) + 1024) <=
              228 * 1024);

// S, rounded, to columns of a matrix [K, V].
template <class Element, int n>
__device__ __forceinline__ void store_state(Element* to, unsigned V, unsigned column, const Results<n>& S) {
  to += column + (lane_idx() / 4 * V + lane_idx() % 4 * 2);
#pragma unroll
  for (int i = 0; i < n; ++i, to += 8 * V) {
    const uint32_t top = arch::pack<Element>(S[i][0], S[i][1]),
                   bottom = arch::pack<Element>(S[i][2], S[i][3]);
    *reinterpret_cast<uint32_t*>(to) = arch::transpose_8x8(top);
    *reinterpret_cast<uint32_t*>(to + 8) = arch::transpose_8x8(bottom);
  }
}

// (0) The blocks of P, of the ten on and below the diagonal, of warp `warp` of kNumWarps.
template <class C, int kNumWarps>
__device__ __forceinline__ void form_scores(Stage<C>& stage, float scale, const Lanes<C>& lanes, int warp) {
  using Element = typename C::Element;
  constexpr int kNumBlocks = kSteps * (kSteps + 1) / 2;
#pragma unroll 1
  for (int block = warp; block < kNumBlocks; block += kNumWarps) {
    const int row = int{block >= 1} + int{block >= 3} + int{block >= 6}, col = block - row * (row + 1) / 2;
    Results<2> p;
    set_zero(p);
#pragma unroll
    for (int k = 0; k < C::kKeyDim; k += 16) {
      uint32_t a[4], b[4];
      arch::ldmatrix_x4(a, fragment_row(stage.q, lanes.rows, 16 * row, k));
      arch::ldmatrix_x4(b, fragment_row(stage.k, lanes.rows_transposed, 16 * col, k));
      multiply<Element>(p[0], p[1], a, b);
    }
    const int i = 16 * row + lane_idx() / 4, j = 16 * col + lane_idx() % 4 * 2;
    const float G_i[2] = {stage.G[i], stage.G[i + 8]};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int first = j + 8 * half;
      const float2 G_j = *reinterpret_cast<const float2*>(&stage.G[first]);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float decay = decay_between(G_i[e / 2], e % 2 == 0 ? G_j.x : G_j.y);
        p[half][e] = first + e % 2 <= i + e / 2 * 8 ? scale * p[half][e] * decay : 0.0f;
      }
      store_d(stage.matrices, 16 * row, 16 * col + 8 * half, p[half]);
    }
  }
}

// (0) A warp without columns: P of one chunk after the other, between the barriers of the others.
template <class C>
__device__ __forceinline__ void help(ScanSmem<C>& smem, float scale, int num_tokens) {
  const Lanes<C> lanes;
  for (int c = 0; num_tokens > 0; ++c, num_tokens -= kChunk) {
    arch::sync_block();
    form_scores<C, C::kHelpers>(smem.stages[c % C::kStages], scale, lanes, warp_idx() - C::kWarps);
    arch::sync_block();
  }
}

// (1) O^T = (s S)^T Q^T. The scale is here so that S is rounded anew: the compiler would keep what it rounded
// for Z, in a quarter of the registers.
template <class C>
__device__ __forceinline__ void read_output(Results<kChunk / 8>& O, const Results<C::kKeyDim / 8>& S,
                                            float scale, const Stage<C>& stage, const Lanes<C>& lanes) {
  using Element = typename C::Element;
  set_zero(O);
#pragma unroll
  for (int k = 0; k < C::kKeyDim; k += 16) {
    Results<2> scaled;
#pragma unroll
    for (int i = 0; i < 8; ++i) scaled[i / 4][i % 4] = scale * S[k / 8 + i / 4][i % 4];
    uint32_t s[4];
    round_to_a<Element>(s, scaled[0], scaled[1]);
#pragma unroll
    for (int t = 0; t < kSteps; ++t) {
      uint32_t b[4];
      arch::ldmatrix_x4(b, fragment_row(stage.q, lanes.rows_transposed, 16 * t, k));
      multiply<Element>(O[2 * t], O[2 * t + 1], s, b);
    }
  }
}

// (4) O^T = scale gamma O^T + E^T P^T; rounded and transposed to the warp's tile of v.
template <class C>
__device__ __forceinline__ void compute_output(Stage<C>& stage, Results<kChunk / 8>& O,
                                               const Values<C::kWide>& E, float scale,
                                               const Lanes<C>& lanes) {
  using Element = typename C::Element;
#pragma unroll
  for (int t = 0; t < kChunk / 8; ++t) {
    const float2 gamma = decay_from_start(stage.G, t / 2, t % 2 * 2);
    O[t][0] *= scale * gamma.x, O[t][1] *= scale * gamma.y;
    O[t][2] *= scale * gamma.x, O[t][3] *= scale * gamma.y;
  }
#pragma unroll
  for (int t = 0; t < kSteps; ++t) {
    uint32_t high[4], low[4];
    E.template get<kHigh>(high, t);
    if constexpr (C::kDelta) E.template get<kLow>(low, t);
#pragma unroll
    for (int i = t; i < kSteps; ++i) {
      uint32_t p[4];
      arch::ldmatrix_x4(p, fragment_row(stage.matrices, lanes.matrices_transposed, 16 * i, 16 * t));
      if constexpr (C::kDelta) multiply<Element>(O[2 * i], O[2 * i + 1], low, p);
      multiply<Element>(O[2 * i], O[2 * i + 1], high, p);
    }
  }
  typename C::Slab& slab = stage.v[warp_idx()];
  arch::sync_warp();
#pragma unroll
  for (int t = 0; t < kChunk / 8; ++t) {
    const int row = 8 * t + lane_idx() / 4, col = lane_idx() % 4 * 2;
    const uint32_t left = arch::pack<Element>(O[t][0], O[t][1]),
                   right = arch::pack<Element>(O[t][2], O[t][3]);
    *reinterpret_cast<uint32_t*>(slab.at(row, col)) = arch::transpose_8x8(left);
    *reinterpret_cast<uint32_t*>(slab.at(row, col + 8)) = arch::transpose_8x8(right);
  }
  arch::sync_warp();
}

// Stores rows [0, num_tokens) of the warp's tile of O; `o`: this lane's first piece, moved on to the next
// chunk's.
template <class C>
__device__ __forceinline__ void store_output(typename C::Element*& o, unsigned stride, int num_tokens,
                                             const typename C::Slab& slab) {
  constexpr int kRowsAtOnce = arch::kWarpSize / C::Slab::kPieces;
  const int first = lane_idx() / C::Slab::kPieces, col = lane_idx() % C::Slab::kPieces * kPiece;
#pragma unroll
  for (int i = 0; i < kChunk; i += kRowsAtOnce, o += kRowsAtOnce * stride) {
    if (first + i < num_tokens) arch::store_16_bytes(o, arch::load_16_bytes(slab.at(first + i, col)));
  }
}

// Stores S as a checkpoint if one is due after chunk `c` of the block's segment. Positions are counted in
// chunks, which fit in 32 bits.
template <class C>
__device__ __forceinline__ void store_checkpoint(Results<C::kKeyDim / 8>& S,
                                                 const GatedDeltaFwdParams& params, unsigned num_tiles,
                                                 int c) {
  const Slot<C> slot(params, num_tiles);  // recomputed: values that outlive the loop cost registers in it
  const Segment segment = gated_delta::segment(params, slot.segment);
  const auto every = static_cast<unsigned>(params.checkpoint_every / kChunk);
  const unsigned chunks = static_cast<unsigned>(segment.first / kChunk) + c + 1;
  if (chunks % every != 0) return;
  const int64_t of_batch = static_cast<unsigned>(params.T / kChunk) / every;
  const unsigned of_sequence = static_cast<unsigned>(segment.sequence.start / kChunk) / every;
  const int64_t row = segment.sequence.batch * of_batch + of_sequence + chunks / every - 1;
  for_each_of_state(S, static_cast<float*>(params.checkpoints) + slot.state(params, row), params.V,
                    [](float* to, float x) { *to = x; });
}

// With K = 64, no delta and four warps, the shared memory of a Hopper SM holds 3 blocks: so must registers.
template <class C>
constexpr int kMinBlocks = C::kKeyDim == 64 && !C::kDelta && C::kWarps == 4 ? 3 : 1;

template <class C>
__device__ __forceinline__ void scan(const GatedDeltaFwdParams& params) {
  using Element = typename C::Element;
  auto& smem = arch::shared_memory<ScanSmem<C>>();
  const auto num_tiles = static_cast<unsigned>(params.V / (C::kWarps * kColumns));
  const Slot<C> slot(params, num_tiles);
  const Segment segment = gated_delta::segment(params, slot.segment);
  if (segment.n < 0 || is_skipped(params, segment.n)) return;
  const Place place = place_in(params, segment, slot.head, slot.column);
  if constexpr (C::kHelpers > 0) {
    if (warp_idx() >= C::kWarps) return help<C>(smem, static_cast<float>(params.scale), place.num_tokens);
  }
  const Lanes<C> lanes;
  const int64_t V = params.V;
  const auto o_stride = static_cast<unsigned>(params.HV * V);
  Cursor<C> next(params, place);
  if (next.num_tokens > 0) copy_chunk_async(smem.stages[0], params, next, next.num_tokens);
  arch::commit_copies();

  Results<C::kKeyDim / 8> S;
  // Of several segments, the first has its state in segment_states too: the last one may write to its slot.
  const bool whole = segment.starts() && segment.ends();
  const auto* states = whole ? static_cast<const float*>(params.initial_state) : params.segment_states;
  if (states == nullptr) {
    set_zero(S);
  } else {
    states += whole ? slot.state_of_sequence(params, segment.n) : slot.state(params, slot.segment);
    for_each_of_state(S, states, V, [](const float* from, float& x) { x = *from; });
  }
  constexpr unsigned kSlabPieces = C::Slab::kPieces;
  auto* o = static_cast<Element*>(params.o) +
            (place.batch * params.T + place.token + lane_idx() / kSlabPieces) * params.HV * V +
            place.head * V + place.column + lane_idx() % kSlabPieces * kPiece;

  for (int c = 0; next.num_tokens > 0; ++c) {
    Stage<C>& stage = smem.stages[c % C::kStages];
    const int num_tokens = next.num_tokens;
    arch::wait_copies<0>();
    arch::sync_block();
    if (params.h != nullptr) {
      store_state(static_cast<Element*>(params.h) + next.matrix * C::kKeyDim * V, V, place.column, S);
    }
    next.advance(params);
    if constexpr (C::kStages > 1) {
      if (next.num_tokens > 0) copy_chunk_async(smem.stages[(c + 1) % 2], params, next, next.num_tokens);
      arch::commit_copies();
    }

    const auto scale = static_cast<float>(params.scale);
    const bool compensated = C::kDelta && beta_exceeds_one(stage.beta);
    with_compensation<C>(compensated, [&]<Compensation kCompensation>() {
      Results<kChunk / 8> Z, O;
      Values<C::kWide> E(smem.values);
      if constexpr (C::kMakesP && C::kHelpers == 0) {
        form_scores<C, C::kWarps>(stage, scale, lanes, warp_idx());  // (0)
      }
      read_state<C, C::kDelta, !C::kWide, kCompensation>(Z, O, S, stage, lanes, compensated);  // (1)
      if constexpr (C::kDelta) {
        form_residual<C>(Z, stage);    // (2)
        solve<C>(E, Z, stage, lanes);  // (3)
      } else {
        load_values<C>(E, stage);
      }
      if constexpr (C::kWide) read_output<C>(O, S, scale, stage, lanes);                              // (1)
      if constexpr (C::kStateFirst) update_state<C, kCompensation>(S, E, stage, lanes, compensated);  // (5)
      if constexpr (C::kMakesP) arch::sync_block();                    // P is here
      compute_output<C>(stage, O, E, C::kWide ? 1.0f : scale, lanes);  // (4)
      if constexpr (!C::kStateFirst) update_state<C, kCompensation>(S, E, stage, lanes, compensated);  // (5)
    });
    store_output<C>(o, o_stride, num_tokens, stage.v[warp_idx()]);
    if (params.checkpoint_every != 0 && num_tokens >= kChunk) store_checkpoint<C>(S, params, num_tiles, c);
    if constexpr (C::kStages == 1) {
      arch::sync_block();
      if (next.num_tokens > 0) copy_chunk_async(smem.stages[0], params, next, next.num_tokens);
      arch::commit_copies();
    }
  }

  const Slot<C> same(params,
                     num_tiles);  // recomputed here: keeping it live across the loop would cost registers
  const Segment done = gated_delta::segment(params, same.segment);
  if (!done.ends()) return;
  for_each_of_state(S, static_cast<float*>(params.final_state) + same.state_of_sequence(params, done.n), V,
                    [](float* to, float x) { *to = x; });
}

// Empty where no GPU that runs this code has the shared memory.
template <class C>
__global__ void __launch_bounds__(C::kThreads, kMinBlocks<C>)
    gated_delta_scan_kernel(const __grid_constant__ GatedDeltaFwdParams params) {
  if constexpr (sizeof(ScanSmem<C>) <= arch::kMaxSharedBytes) scan<C>(params);
}

}  // namespace hypenet::cuda::gated_delta::scan
