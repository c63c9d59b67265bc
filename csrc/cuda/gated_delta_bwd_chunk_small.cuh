// gated_delta_bwd_chunk.cuh where a block has 99 KB of shared memory (compute capability 8.6, 8.9, 12.0): the same
// math, shapes, mapping, numerics and cost, with K 64 or 128.
//
// Shared memory (K = 128, bytes):      lifetime
//   q, k          [C, K]     2 x 16 K   the block; at the end dq, dk
//   S0            [K, columns]   16 K   a tile
//   v, dO, dB     [C, columns] 3 x 8 K  a tile; at the end of a value head dN, dM + dM^T, low part of dN
//   low           [C, columns]    8 K   low part of B, then of E; at the end of a value head sums of columns
//   early.L, dB_low              16 K   (1) to (3), dB_low only with beta > 1
//     dS1         [K, columns]          the same 16 K, after (3); at the end of a value head rs(K . dK_S1)
//   sums                          2 K   of rows of one value head, one part per warp
//   gates, place                  1 K
// 98.8 KB: one block of 16 warps per SM.
//
// Pipeline: there is one stage, so that the copies of a tile start when the tile before is done. Only those of
// dS1 overlap with computation, the two products with S0 in (4), which therefore come before that with dS1. L is
// copied for every tile, not once a value head. The sum rs(K . dK_S1) is kept in one register of a lane, since
// 1 KB more would not fit. Barriers: seven a tile, eight with beta > 1, two without delta; two a value head.
#pragma once

#include "gated_delta_bwd_chunk.cuh"

namespace hypenet::cuda::gated_delta::bwd::chunk {

template <class Element_, int K_, Rule kRule>
struct SmallSmem {
  using Element = Element_;
  static constexpr int K = K_, kPart = 0, kOut = K, kFirst = 0;
  static constexpr bool kDelta = kRule == Rule::kDelta, kFirstPart = true, kLastPart = true;

  struct Stage {
    Tile<Element, K, kColumns> S0;
    Tile<Element, kChunk, kColumns> v, dO, dB;
  };
  Tile<Element, kChunk, K> q, k;
  Stage stage;
  union {
    Tile<Element, kChunk, kColumns> low;
    float columns[kRowWarps][kChunk];
  };
  union {
    struct {
      Tile<Element, kChunk, kChunk> L;
      Tile<Element, kChunk, kColumns> dB_low;
    } early;
    Tile<Element, K, kColumns> dS1;
    float next[kColWarps][kChunk];
  };
  float G[kChunk], beta[kChunk];
  float dbeta[kColWarps][kChunk], dG[kColWarps][kChunk];  // (7), across warps
  float states[kRowWarps * kColWarps];
  Place place;
};
static_assert(sizeof(SmallSmem<arch::bf16, 128, Rule::kDelta>) <= 99 * 1024);

// A sum of each of a warp's 16 rows: row lane / 4 + 8 half in lane lane / 4 * 4 + half.
struct RowSums {
  float sum = 0;
};

__device__ __forceinline__ void add_to_row(RowSums& sums, const Part&, int half, float x) {
  const float sum = sum_row(x);
  if (lane_idx() % 4 == half) sums.sum += sum;
}

__device__ __forceinline__ void share_rows(float (&sums)[kColWarps][kChunk], const RowSums& rows) {
  const Part part;
  const int half = lane_idx() % 4;
  if (half < 2) sums[part.col_warp][part.lane_row + 8 * half] = rows.sum;
}

// The item's columns of the state of its chunk in [num_chunks, HV, K, V].
template <class Tile>
__device__ __forceinline__ void copy_state_async(Tile& tile, const void* states,
                                                 const GatedDeltaBwdParams& params, const Place& place,
                                                 const Item& item) {
  const int64_t row = (place.chunk * params.HV + item.head(place)) * Tile::kRows;
  copy_tile_async<kThreads>(
      tile, static_cast<const typename Tile::Element*>(states) + row * params.V + item.column(), params.V,
      Tile::kRows, fresh_thread());
}

// All that (1) to (3) of a column tile need, but dB_low.
template <class Smem>
__device__ __forceinline__ void copy_item_async(Smem& sm, const GatedDeltaBwdParams& params,
                                                const Place& place, const Item& item) {
  const int head = item.head(place);
  copy_state_async(sm.stage.S0, params.h, params, place, item);
  copy_columns_async(sm.stage.v, params.v, place, item);
  copy_columns_async(sm.stage.dO, params.do_, place, item);
  if constexpr (Smem::kDelta) {
    copy_dB_async(sm.stage.dB, params.dv, params, place, item);
    copy_L_async(sm.early.L, params, place, head);
  } else {
    copy_state_async(sm.dS1, params.dstates, params, place, item);
  }
  if (item.tile == 0) {
    copy_gates_async<Smem::kDelta>(sm.G, sm.beta, params, place.chunk, head, place.sequence.batch,
                                   place.token, place.num_tokens);
  }
}

// (1) to (4) of one column tile. dB_low is on its way if the chunk has beta > 1.
template <class Smem>
__device__ __forceinline__ void add_tile(Smem& sm, bool compensated, const GatedDeltaBwdParams& params,
                                         const Place& place, const Item& item, Square& rX, Square& rdA,
                                         Wide<Smem>& rdQ, Wide<Smem>& rdK, RowSums& next) {
  using Values = Tile<typename Smem::Element, kChunk, kColumns>;
  auto& stage = sm.stage;
  const Values* none = nullptr;
  if constexpr (Smem::kDelta) {
    const Values* dB_low = compensated ? &sm.early.dB_low : nullptr;
    Square rE;
    form_residual(rE, sm, stage, sm.low, dB_low, sm.G, sm.beta);  // (1)
    arch::sync_block();
    form_pseudo_values<Smem>(rE, sm.early.L, stage, sm.low, [] {});   // (2)
    multiply_by_pseudo_values<Smem>(rX, rdA, stage, sm.low, dB_low);  // (3)
    arch::sync_block();
    copy_state_async(sm.dS1, params.dstates, params, place, item);
    arch::commit_copies();
    through_state<false, Smem>(
        rdK, stage.dB, none, stage.S0, 0, sm.k,
        [&](int row) { return -arch::exp2(sm.G[row]) * sm.beta[row]; }, sm.dG);  // (4)
  } else {
    multiply_by_values<Smem>(rX, stage);
  }
  through_state<true, Smem>(
      rdQ, stage.dO, none, stage.S0, 0, sm.q, [&](int row) { return place.scale * arch::exp2(sm.G[row]); },
      sm.dG);
  if constexpr (Smem::kDelta) {
    arch::wait_copies<0>();
    arch::sync_block();
  }
  const Values* E_low = Smem::kDelta && gated_delta::beta_exceeds_one(sm.beta) ? &sm.low : nullptr;
  through_state<true, Smem>(
      rdK, stage.v, E_low, sm.dS1, 0, sm.k, [&](int row) { return decay_between(sm.G, kChunk - 1, row); },
      next);
  dot_states(sm, stage.S0, sm.dS1);
}

template <class Smem>
__global__ void __launch_bounds__(kThreads, 1)
    gated_delta_bwd_chunk_small_kernel(const __grid_constant__ GatedDeltaBwdParams params) {
  Smem& sm = arch::shared_memory<Smem>();
  if (arch::thread_idx() == 0) sm.place.find(params);
  arch::sync_block();
  const Place& place = sm.place;
  if (place.num_tokens == 0) return;
  copy_key_head_async(sm, params, place);
  Wide<Smem> rdQ, rdK;
  Square rX, rdA;
  RowSums next;
  set_zero(rdQ), set_zero(rdK);
  for (Item item; item.member < place.group; item = item.next(place)) {
    arch::sync_block();  // nobody reads the tile before any more
    copy_item_async(sm, params, place, item);
    arch::commit_copies();
    arch::wait_copies<0>();
    arch::sync_block();
    const bool compensated = Smem::kDelta && gated_delta::beta_exceeds_one(sm.beta);
    if (compensated) {
      copy_dB_async(sm.early.dB_low, params.dB_low, params, place, item);
      arch::commit_copies();
    }
    if (item.tile == 0) {
      clear_sums(sm, sm.dbeta, sm.dG);
      next = {};
      set_zero(rX), set_zero(rdA);
    }
    add_tile(sm, compensated, params, place, item, rX, rdA, rdQ, rdK, next);
    if constexpr (Smem::kDelta) store_dv<Smem>(sm.stage, params, place, item, sm.beta);  // (5)
    if (item.ends_head(place)) {
      arch::sync_block();
      share_rows(sm.next, next);
      finish_head(sm, sm.stage, Smem::kDelta && gated_delta::beta_exceeds_one(sm.beta), params, place,
                  item.head(place), sm.G, sm.beta, rX, rdA, rdQ, rdK);
    }
  }
  store_key_head(sm, params, place, rdQ, rdK);
}

}  // namespace hypenet::cuda::gated_delta::bwd::chunk
