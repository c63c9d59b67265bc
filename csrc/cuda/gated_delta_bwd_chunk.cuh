// Backward of the gated delta rule and of simple GLA (kDelta = false), second of two kernels: every chunk on
// its own, between the states before it and the gradients of the states after it.
//
// Math, per value head and chunk of C tokens, in the notation of gated_delta_bwd_scan.cuh; S0 the state before
// the chunk; rs and cs the sums of rows and of columns:
//   Z  = K S0        R = V - gamma Z        B = beta R                                             (1)
//   E  = B + L B     (without delta E = V, and only X and what follows from it is left)            (2)
//   X  = tril(dO E^T)        dA = -stril(dB E^T)                                                   (3)
//   dQ_S = s gamma (dO S0^T)        dK_S = -gamma beta (dB S0^T)        dK_S1 = gamma_C / gamma (E dS1^T) (4)
//   dV = beta dB                                                                                   (5)
//   dN = s X . Gamma     dM = beta dA . Gamma      gradients of Q K^T and K K^T                    (6)
//   dbeta = rs(R . dB) + rs(dA . Gamma . K K^T)
//   dG = rs - cs of (stril(dN) . Q K^T + dM . K K^T) + rs(Q . dQ_S) - gamma beta rs(dB . Z)
//   dg_t = sum_{i >= t} dG_i + gamma_C <S0, dS1> + sum_{i < t} rs(K . dK_S1)_i, 0 where g < -50   (7)
//   dQ = sum of dQ_S + dN K        dK = sum of dK_S + dK_S1 + dN^T Q + (dM + dM^T) K               (8)
// where the sums run over the value heads of the key head. dA so written is what -(I + L)^T (dE B^T) (I +
// L)^T would be, without its two products; dg's form never takes a small difference of large sums of
// different kinds. A chunk is compensated where some beta of it exceeds 1 (gated_delta.cuh).
//
// Shapes: as in GatedDeltaBwdParams (params.h). Reads everything that the first kernel wrote, of dB_low only
// what belongs to compensated chunks; dv holds dB and is overwritten in place, by the block that alone reads
// it. Writes dq, dk, dv, dg, dbeta.
//
// Mapping: a block owns one (chunk, key head), blocks numbered along x with the head fastest, and goes
// through the value heads of the group in order, and in each through its column tiles of V: (1) to (5) a
// tile, (6) to (8) a value head. dQ and dK stay in fp32 registers all the time, X and dA over the tiles of a
// head. Blocks past the last chunk leave at once. Warp w owns the (w / 4)-th of four equal parts of the
// columns of every product, and 16 rows, chosen so that warps of the same w % 4 have different ones: of L, X
// and dA only the blocks [16, 16] on and below the diagonal are processed. Of K = 256 a launch makes half
// of the columns of dq and dk, for which registers and shared memory suffice, and computes what leads there
// anew; dg is the sum of both (Smem::kPart).
//
// Shared memory (K = 128, bytes):      lifetime
//   q, k          [C, K]     2 x 16 K   the block; at the end dq, dk
//   L             [C, C]          8 K   a value head
//   stage[2].S0, dS1  [K, columns]  2 x 16 K   copied while the tile before is at work
//   stage[2].dO   [C, columns]    8 K   likewise; at the end of a value head dM + dM^T
//   stage[2].v    [C, columns]    8 K   (1) to (3) of the tile before: low part of its B, then of its E; then
//                                       copied; V, high part of B, of E; at the end of a value head dN
//   stage[2].dB   [C, columns]    8 K   copied as dO. Where the chunk is compensated: (1) to (3) of the tile before
//                                       low part of its dB, then copied; at the end low part of dN
//   sums                          4 K   of rows and columns of one value head: a warp's part each
//   gates, place                  1 K
// 157 KB; K = 64: 109 KB, K = 256: 221 KB. One block of 16 warps per SM of compute capability 8.0, 9.0 or
// 10.0: registers allow no second one. gated_delta_bwd_chunk_small.cuh is for blocks that have 99 KB.
//
// Pipeline: copies run one tile ahead, those of a stage's v (and dB) only once the low parts there are done
// with. Barriers: five a tile (before (1), after (1), around the store of E, after the last use of the low
// parts), six where the chunk is compensated (the low part of dB has come), one without delta; two a value head.
// The registers are all taken: steps compute their addresses anew (Part), and sync_warp between steps keeps
// the compiler from running them into each other.
//
// Numerics: fp32 accumulation. L, B and E are hi/lo pairs, in E = B + L B, to which B comes in fp32, and in dA;
// where the chunk is compensated, so are E in X and dK_S1, dB but in dK_S (no gain) and dV, and dN in dQ. Rounded
// to dtype are all other uses, dM, and the outputs; R is rounded only as B. All factors gamma and beta of (4)
// multiply fp32 sums. Every exponent taken is <= 0. Sums in a fixed order: results are bitwise repeatable and
// do not depend on the batch. Tokens past the end are zero in q, k, v, dO, dB and beta.
//
// Cost per token and value head: 2 (4 K V + C (15 V + 17 K) / 4) FLOPs, 2 (K V + C (5 V + 4 K) / 4) more
// where the chunk is compensated; without delta 2 (2 K V + C (5 V + 21 K) / 8). Bytes from and to memory: 2 (4 V +
// C) + 4 K V / C per token and value head, 2 V more where the chunk is compensated; 8 K per token and key head.
//
// Limits: as of the first kernel.
#pragma once

#include "gated_delta_bwd_chunk_parts.cuh"

namespace hypenet::cuda::gated_delta::bwd::chunk {

// sums of row lane_row + 8 half += x, of the four lanes that share it. The first of them alone touches the
// sum.
__device__ __forceinline__ void add_to_row(float (&sums)[kColWarps][kChunk], const Part& part, int half,
                                           float x) {
  const float sum = sum_row(x);
  if (lane_idx() % 4 == 0) sums[part.col_warp][part.lane_row + 8 * half] += sum;
}

// Before the first tile of a value head: every sum by the lane that will add to it.
template <class Smem, class... Sums>
__device__ __forceinline__ void clear_sums(Smem& sm, Sums&... sums) {
  const Part part;
  if (lane_idx() == 0) sm.states[warp_idx()] = 0;
  if (lane_idx() % 4 != 0) return;
#pragma unroll
  for (int row = part.lane_row; row < part.lane_row + 16; row += 8) {
    ((sums[part.col_warp][row] = 0), ...);
  }
}

// Two neighbouring elements of a row.
template <class Tile>
__device__ __forceinline__ float2 load_two(const Tile& tile, int row, int col) {
  return arch::unpack<typename Tile::Element>(*reinterpret_cast<const uint32_t*>(tile.at(row, col)));
}

// (1) Z, R; B, and as a hi/lo pair in place of V and in B_low. dB_low: on its way where dB is a hi/lo pair, else null.
template <class Smem, class Tile>
__device__ __forceinline__ void form_residual(Square& rB, Smem& sm, typename Smem::Stage& stage, Tile& B_low,
                                              const Tile* dB_low, const float (&G)[kChunk],
                                              const float (&beta)[kChunk]) {
  const Part part;
  const int col = part.column();
  Square rZ;
  set_zero(rZ);
  multiply_by_twos<typename Smem::Element, Smem::K>(
      rZ, [&](auto& a, int m, int k) { load_a(a, sm.k, part.row + m, k); },
      [&](auto& b, int k, int n) { load_b(b, stage.S0, k, col + n); });
  arch::sync_warp();
  if (dB_low != nullptr) {
    arch::wait_copies<0>();
    arch::sync_block();
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = part.lane_row + 8 * half;
    const float gamma = arch::exp2(G[row]), factor = beta[row];
    float dbeta = 0, dG = 0;
#pragma unroll
    for (int n = 0; n < kChunkPart / 8; ++n) {
      const int lane_col = col + 8 * n + lane_idx() % 4 * 2;
      const float2 v = load_two(stage.v, row, lane_col);
      float2 dB = load_two(stage.dB, row, lane_col);
      if (dB_low != nullptr) {
        const float2 low = load_two(*dB_low, row, lane_col);
        dB.x += low.x, dB.y += low.y;
      }
      const float z[2] = {gamma * rZ[0][n][2 * half], gamma * rZ[0][n][2 * half + 1]};
      const float r[2] = {v.x - z[0], v.y - z[1]};
      if constexpr (Smem::kFirstPart) {
        dbeta += r[0] * dB.x + r[1] * dB.y;
        dG -= factor * (z[0] * dB.x + z[1] * dB.y);
      }
      rB[0][n][2 * half] = factor * r[0], rB[0][n][2 * half + 1] = factor * r[1];
    }
    if constexpr (Smem::kFirstPart) {
      add_to_row(sm.dbeta, part, half, dbeta);
      add_to_row(sm.dG, part, half, dG);
    }
  }
  store_product(stage.v, part.row, col, rB);
  store_low(B_low, part.row, col, rB);
}

// (2) B -> E, both as hi/lo pairs in the same places; afterwards L is free
template <class Smem, class Tile, class Release>
__device__ __forceinline__ void form_pseudo_values(Square& rE, const Tile& L, typename Smem::Stage& stage,
                                                   Tile& low, Release&& release_L) {
  using Element = typename Smem::Element;
  const Part part;
  const int col = part.column();
#pragma unroll 2
  for (int k = 0; k <= part.row; k += 16) {
    uint32_t L_high[4], L_low[4], b[2][2];
    load_a(L_high, L, part.row, k);
    load_a_transposed(L_low, L, part.row, k);
    if (k == part.row) keep_triangle<true, 2>(L_high), keep_triangle<true, 2>(L_low);
    load_b(b, stage.v, k, col);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      arch::mma_16x8x16<Element>(rE[0][n], L_low, b[n]);
      arch::mma_16x8x16<Element>(rE[0][n], L_high, b[n]);
    }
    load_b(b, low, k, col);
#pragma unroll
    for (int n = 0; n < 2; ++n) arch::mma_16x8x16<Element>(rE[0][n], L_high, b[n]);
  }
  arch::sync_block();
  release_L();
  store_product(stage.v, part.row, col, rE);
  store_low(low, part.row, col, rE);
  arch::sync_block();
}

// (3) without delta
template <class Smem>
__device__ __forceinline__ void multiply_by_values(Square& rX, const typename Smem::Stage& stage) {
  arch::sync_warp();
  const Part part;
  if (part.above_diagonal()) return;
  multiply_by_twos<typename Smem::Element, kColumns>(
      rX, [&](auto& a, int m, int k) { load_a(a, stage.dO, part.row + m, k); },
      [&](auto& b, int k, int n) { load_b_transposed(b, stage.v, k, part.column() + n); });
}

// (3) X += dO E^T, dA += dB E^T, on and below the diagonal; E is a hi/lo pair for dA, and for X where dB is one
// too.
template <class Smem, class Tile>
__device__ __forceinline__ void multiply_by_pseudo_values(Square& rX, Square& rdA,
                                                          const typename Smem::Stage& stage,
                                                          const Tile& E_low, const Tile* dB_low) {
  using Element = typename Smem::Element;
  const Part part;
  if (part.above_diagonal()) return;
  const int col = part.column();
#pragma unroll 2
  for (int k = 0; k < kColumns; k += 16) {
    uint32_t dO[4], dB[4], E[2][2];
    load_a(dO, stage.dO, part.row, k);
    load_a(dB, stage.dB, part.row, k);
    load_b_transposed(E, E_low, k, col);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      arch::mma_16x8x16<Element>(rdA[0][n], dB, E[n]);
      if (dB_low != nullptr) arch::mma_16x8x16<Element>(rX[0][n], dO, E[n]);
    }
    load_b_transposed(E, stage.v, k, col);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      arch::mma_16x8x16<Element>(rX[0][n], dO, E[n]);
      arch::mma_16x8x16<Element>(rdA[0][n], dB, E[n]);
    }
    if (dB_low != nullptr) {
      load_a(dB, *dB_low, part.row, k);
#pragma unroll
      for (int n = 0; n < 2; ++n) arch::mma_16x8x16<Element>(rdA[0][n], dB, E[n]);
    }
  }
}

// (4) total += factor . (from state^T) for the rows of the state from first_row on; dots += rs(x . that), of
// this lane's part. low: of `from`, or null.
template <bool kDots, class Smem, class From, class State, class X, class Factor, class Dots>
__device__ __forceinline__ void through_state(Wide<Smem>& total, const From& from, const From* low,
                                              const State& state, int first_row, const X& x, Factor&& factor,
                                              Dots& dots) {
  using Element = typename Smem::Element;
  arch::sync_warp();
  const Part part;
  const int col = part.template wide_column<Smem>();
  Wide<Smem> product;
  set_zero(product);
  const auto load_state = [&](auto& b, int k, int n) { load_b_transposed(b, state, k, first_row + col + n); };
  multiply_by_twos<Element, kColumns>(
      product, [&](auto& a, int m, int k) { load_a(a, from, part.row + m, k); }, load_state);
  if (low != nullptr) {
    multiply_by_twos<Element, kColumns>(
        product, [&](auto& a, int m, int k) { load_a(a, *low, part.row + m, k); }, load_state);
  }
  arch::sync_warp();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = part.lane_row + 8 * half;
    const float by = factor(row);
    float dot = 0;
#pragma unroll
    for (int n = 0; n < Smem::kOut / kColWarps / 8; ++n) {
      const float y[2] = {by * product[0][n][2 * half], by * product[0][n][2 * half + 1]};
      total[0][n][2 * half] += y[0], total[0][n][2 * half + 1] += y[1];
      if constexpr (kDots) {
        const float2 other = load_two(x, row, Smem::kFirst + col + 8 * n + lane_idx() % 4 * 2);
        dot += y[0] * other.x + y[1] * other.y;
      }
    }
    if constexpr (kDots) add_to_row(dots, part, half, dot);
  }
}

// Adds to this warp's part of <S0, dS1>.
template <class Smem, class State, class PartOfState>
__device__ __forceinline__ void dot_states(Smem& sm, const State& S0, const PartOfState& dS1) {
  using Element = typename Smem::Element;
  arch::sync_warp();
  float sum = 0;
  for_each_piece<kThreads, Tile<Element, Smem::kOut, kColumns>>(fresh_thread(), [&](int, int row, int col) {
    const uint4 x = arch::load_16_bytes(S0.at(Smem::kFirst + row, col)),
                y = arch::load_16_bytes(dS1.at(row, col));
#pragma unroll
    for (int i = 0; i < kPiece / 2; ++i) {
      const float2 a = arch::unpack<Element>((&x.x)[i]), b = arch::unpack<Element>((&y.x)[i]);
      sum += a.x * b.x + a.y * b.y;
    }
  });
  sum = sum_column(sum_row(sum));
  if (lane_idx() == 0) sm.states[warp_idx()] += sum;
}

// (5) dv = beta dB
template <class Smem>
__device__ __forceinline__ void store_dv(const typename Smem::Stage& stage, const GatedDeltaBwdParams& params,
                                         const Place& place, const Item& item, const float (&beta)[kChunk]) {
  using Element = typename Smem::Element;
  Element* dv = static_cast<Element*>(params.dv) + value_offset(params, place, item);
  for_each_piece<kThreads, Tile<Element, kChunk, kColumns>>(fresh_thread(), [&](int, int row, int col) {
    uint4 piece = arch::load_16_bytes(stage.dB.at(row, col));
    uint32_t* pairs = &piece.x;
#pragma unroll
    for (int i = 0; i < kPiece / 2; ++i) {
      const float2 x = arch::unpack<Element>(pairs[i]);
      pairs[i] = arch::pack<Element>(x.x * beta[row], x.y * beta[row]);
    }
    if (row < place.num_tokens) arch::store_16_bytes(dv + row * place.value_stride + col, piece);
  });
}

// (6) gradient -> factor of the row . gradient . Gamma, below the diagonal (or on it too). Of that times x
// K^T below the diagonal, columns += cs, and row_sum(half, rs without the factor), of this lane's part; in
// the first part.
template <bool kDiagonal, class Smem, class X, class Factor, class RowSum>
__device__ __forceinline__ void through_product(Square& gradient, const X& x, Smem& sm,
                                                const float (&G)[kChunk], Factor&& factor, RowSum&& row_sum,
                                                float (&columns)[kChunkPart / 8][2]) {
  const Part part;
  const int col = part.column();
  Square product;
  set_zero(product);
  if (part.above_diagonal()) return;
  if constexpr (Smem::kFirstPart) {
    multiply_by_twos<typename Smem::Element, Smem::K>(
        product, [&](auto& a, int m, int k) { load_a(a, x, part.row + m, k); },
        [&](auto& b, int k, int n) { load_b_transposed(b, sm.k, k, col + n); });
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = part.lane_row + 8 * half;
    const float by = factor(row);
    float sum = 0;
#pragma unroll
    for (int n = 0; n < kChunkPart / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int j = col + 8 * n + lane_idx() % 4 * 2 + i;
        float& d = gradient[0][n][2 * half + i];
        d = j < row || (kDiagonal && j == row) ? d * decay_between(G, row, j) : 0.0f;
        const float weight = j < row ? d * product[0][n][2 * half + i] : 0.0f;
        d *= by;
        sum += weight;
        columns[n][i] += by * weight;
      }
    }
    if constexpr (Smem::kFirstPart) row_sum(part, half, by, sum);
  }
}

// This warp's sums of columns -> shared memory
template <class Smem>
__device__ __forceinline__ void share_columns(Smem& sm, const float (&columns)[kChunkPart / 8][2]) {
  const Part part;
  const int lane = lane_idx();
#pragma unroll
  for (int n = 0; n < kChunkPart / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = sum_column(columns[n][i]);
      if (lane < 4) sm.columns[part.row / 16][part.column() + 8 * n + 2 * lane + i] = sum;
    }
  }
}

// (7) by one warp, of which lane l owns tokens 2 l and 2 l + 1 for the sum from the start, and tokens C - 1 -
// 2 l and C - 2 - 2 l for the one from the end.
template <class Smem>
__device__ __forceinline__ void store_gate_gradients(Smem& sm, const GatedDeltaBwdParams& params,
                                                     const Place& place, int head, float last_G) {
  const int lane = lane_idx(), early = 2 * lane, late = kChunk - 1 - 2 * lane;
  float states = 0;
  for (int warp = 0; warp < kRowWarps * kColWarps; ++warp) states += sm.states[warp];
  states *= arch::exp2(last_G);
  const float next[2] = {sum_parts(sm.next, early), sum_parts(sm.next, early + 1)};
  const float from_start = states + sum_below_lane(sum_up_to_lane(next[0] + next[1]));
  const float dG[2] = {sum_parts(sm.dG, late) - sum_parts(sm.columns, late),
                       sum_parts(sm.dG, late - 1) - sum_parts(sm.columns, late - 1)};
  const float from_end = sum_below_lane(sum_up_to_lane(dG[0] + dG[1])) + dG[0];
  // token `early` is the second one of lane 31 - lane in the sum from the end
  const float end_of_late = arch::shuffle(from_end, arch::kWarpSize - 1 - lane);
  const float end_of_early = arch::shuffle(from_end + dG[1], arch::kWarpSize - 1 - lane);
  const float dg[2] = {end_of_early + from_start, end_of_late + (from_start + next[0])};
  const int64_t to = place.row * params.HV + head;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = early + i;
    if (row >= place.num_tokens) continue;
    const float g = *row_of<float>(params.g, place.sequence.batch, place.token + row, head);
    float& sum = static_cast<float*>(params.dg)[to + row * params.HV];
    sum = g < kMinLogDecay ? 0.0f : dg[i] + (Smem::kFirstPart ? 0.0f : sum);
    if constexpr (Smem::kDelta && Smem::kFirstPart) {
      static_cast<float*>(params.dbeta)[to + row * params.HV] = sum_parts(sm.dbeta, row);
    }
  }
}

// dM below the diagonal -> dM + dM^T
template <class Tile>
__device__ __forceinline__ void store_symmetric(Tile& tile, Square& rdM) {
  const Part part;
  for_each_element(rdM, part.row, part.column(), [&](float& x, int row, int col) {
    if (col > row) return;
    typename Tile::Element rounded;
    from_float(rounded, x);
    *tile.at(row, col) = rounded;
    if (col < row) *tile.at(col, row) = rounded;
  });
}

// (8) dQ += dN K, dK += dN^T Q + (dM + dM^T) K. dN_low: for dQ, or null.
template <class Smem, class Tile>
__device__ __forceinline__ void through_key_head(Smem& sm, const Tile& dN, const Tile* dN_low, const Tile& dM,
                                                 Wide<Smem>& rdQ, Wide<Smem>& rdK) {
  using Element = typename Smem::Element;
  const Part part;
  const int col = Smem::kFirst + part.template wide_column<Smem>();
  const auto load_k = [&](auto& b, int k, int n) { load_b(b, sm.k, k, col + n); };
  multiply_by_twos<Element, kChunk>(
      rdQ, [&](auto& a, int m, int k) { load_a(a, dN, part.row + m, k); }, load_k);
  if (dN_low != nullptr) {
    multiply_by_twos<Element, kChunk>(
        rdQ, [&](auto& a, int m, int k) { load_a(a, *dN_low, part.row + m, k); }, load_k);
  }
  multiply_by_twos<Element, kChunk>(
      rdK, [&](auto& a, int m, int k) { load_a_transposed(a, dN, part.row + m, k); },
      [&](auto& b, int k, int n) { load_b(b, sm.q, k, col + n); });
  if constexpr (Smem::kDelta) {
    multiply_by_twos<Element, kChunk>(
        rdK, [&](auto& a, int m, int k) { load_a(a, dM, part.row + m, k); }, load_k);
  }
}

// (1) to (4) of one column tile. next: the other stage, whose v holds the low parts of B and E, and dB that
// of dB where the chunk is compensated, until release_next().
template <class Smem, class ReleaseL, class ReleaseNext>
__device__ __forceinline__ void add_tile(Smem& sm, typename Smem::Stage& stage, typename Smem::Stage& next,
                                         bool compensated, const float (&G)[kChunk],
                                         const float (&beta)[kChunk], Square& rX, Square& rdA,
                                         Wide<Smem>& rdQ, Wide<Smem>& rdK, ReleaseL&& release_L,
                                         ReleaseNext&& release_next) {
  const auto *E_low = compensated ? &next.v : nullptr, *dB_low = compensated ? &next.dB : nullptr;
  const decltype(E_low) none = nullptr;
  if constexpr (Smem::kDelta) {
    Square rE;
    form_residual(rE, sm, stage, next.v, dB_low, G, beta);  // (1)
    arch::sync_block();
    form_pseudo_values<Smem>(rE, sm.L, stage, next.v, release_L);     // (2)
    multiply_by_pseudo_values<Smem>(rX, rdA, stage, next.v, dB_low);  // (3)
    if (!compensated) release_next();
  } else {
    release_L();
    multiply_by_values<Smem>(rX, stage);
    release_next();
  }
  through_state<true, Smem>(
      rdK, stage.v, E_low, stage.dS1, 0, sm.k, [&](int row) { return decay_between(G, kChunk - 1, row); },
      sm.next);  // (4)
  if constexpr (Smem::kDelta) {
    if (compensated) release_next();
    through_state<false, Smem>(
        rdK, stage.dB, none, stage.S0, Smem::kFirst, sm.k,
        [&](int row) { return -arch::exp2(G[row]) * beta[row]; }, sm.dG);
  }
  through_state<true, Smem>(
      rdQ, stage.dO, none, stage.S0, Smem::kFirst, sm.q,
      [&](int row) { return sm.place.scale * arch::exp2(G[row]); }, sm.dG);
  dot_states(sm, stage.S0, stage.dS1);
}

// (6) to (8) of one value head, dN and dM in the tiles of a stage that nobody reads any more
template <class Smem>
__device__ __forceinline__ void finish_head(Smem& sm, typename Smem::Stage& stage, bool compensated,
                                            const GatedDeltaBwdParams& params, const Place& place, int head,
                                            const float (&G)[kChunk], const float (&beta)[kChunk], Square& rX,
                                            Square& rdA, Wide<Smem>& rdQ, Wide<Smem>& rdK) {
  auto &dN = stage.v, &dM = stage.dO;
  auto* dN_low = compensated ? &stage.dB : nullptr;
  float columns[kChunkPart / 8][2] = {};
  through_product<true>(
      rX, sm.q, sm, G, [&](int) { return place.scale; },
      [&](const Part& part, int half, float by, float sum) { add_to_row(sm.dG, part, half, by * sum); },
      columns);  // (6)
  store_product(dN, Part().row, Part().column(), rX);
  if (dN_low != nullptr) store_low(*dN_low, Part().row, Part().column(), rX);
  if constexpr (Smem::kDelta) {
    through_product<false>(
        rdA, sm.k, sm, G, [&](int row) { return -beta[row]; },
        [&](const Part& part, int half, float by, float sum) {
          add_to_row(sm.dbeta, part, half, -sum);
          add_to_row(sm.dG, part, half, by * sum);
        },
        columns);
    store_symmetric(dM, rdA);
  }
  share_columns(sm, columns);
  arch::sync_block();
  if (warp_idx() == 0) store_gate_gradients(sm, params, place, head, G[kChunk - 1]);  // (7)
  through_key_head(sm, dN, dN_low, dM, rdQ, rdK);                                     // (8)
}

template <class Smem>
__device__ __forceinline__ void store_key_head(Smem& sm, const GatedDeltaBwdParams& params,
                                               const Place& place, const Wide<Smem>& rdQ,
                                               const Wide<Smem>& rdK) {
  using Element = typename Smem::Element;
  const Part part;
  const int col = Smem::kFirst + part.template wide_column<Smem>();
  arch::sync_block();
  store_product(sm.q, part.row, col, rdQ);
  store_product(sm.k, part.row, col, rdK);
  arch::sync_block();
  const int64_t to = (place.row * params.H + place.key_head) * Smem::K + Smem::kFirst,
                stride = params.H * Smem::K;
  auto *dq = static_cast<Element*>(params.dq) + to, *dk = static_cast<Element*>(params.dk) + to;
  for_each_piece<kThreads, Tile<Element, kChunk, Smem::kOut>>(fresh_thread(), [&](int, int row, int col) {
    if (row >= place.num_tokens) return;
    arch::store_16_bytes(dq + row * stride + col, arch::load_16_bytes(sm.q.at(row, Smem::kFirst + col)));
    arch::store_16_bytes(dk + row * stride + col, arch::load_16_bytes(sm.k.at(row, Smem::kFirst + col)));
  });
}

template <class Smem>
__device__ __forceinline__ void differentiate_chunk(const GatedDeltaBwdParams& params) {
  Smem& sm = arch::shared_memory<Smem>();
  if (arch::thread_idx() == 0) sm.place.find(params);
  arch::sync_block();
  const Place& place = sm.place;
  if (place.num_tokens == 0) return;
  copy_key_head_async(sm, params, place);
  copy_head_async(sm, params, place, Item{});
  copy_stage_async(sm, params, place, Item{});
  copy_v_async(sm, params, place, Item{});
  if constexpr (Smem::kDelta) copy_dB_async(sm.stages[0].dB, params.dv, params, place, Item{});
  arch::commit_copies();
  Wide<Smem> rdQ, rdK;
  Square rX, rdA;
  set_zero(rdQ), set_zero(rdK);
  for (Item item; item.member < place.group; item = item.next(place)) {
    auto &stage = sm.stages[item.number % 2], &next_stage = sm.stages[(item.number + 1) % 2];
    const auto &G = sm.G[item.member % 2], &beta = sm.beta[item.member % 2];
    arch::wait_copies<0>();
    arch::sync_block();
    const bool compensated = Smem::kDelta && gated_delta::beta_exceeds_one(beta);
    if (compensated) {
      copy_dB_async(next_stage.dB, params.dB_low, params, place, item);
      arch::commit_copies();
    }
    if (const Item next = item.next(place); next.member < place.group) {
      copy_stage_async(sm, params, place, next);
      if constexpr (!Smem::kDelta) copy_v_async(sm, params, place, next);
      if (Smem::kDelta && !compensated) copy_dB_async(next_stage.dB, params.dv, params, place, next);
    }
    if (item.tile == 0) {
      clear_sums(sm, sm.dbeta, sm.dG, sm.next);
      set_zero(rX), set_zero(rdA);
    }
    const auto copy_next_head = [&] {
      const Item next = item.next(place);
      if (next.tile == 0 && next.member < place.group) copy_head_async(sm, params, place, next);
    };
    const auto copy_rest_of_next = [&] {
      if constexpr (Smem::kDelta) {
        arch::sync_block();
        const Item next = item.next(place);
        if (next.member < place.group) {
          copy_v_async(sm, params, place, next);
          if (compensated) copy_dB_async(next_stage.dB, params.dv, params, place, next);
        }
      }
      arch::commit_copies();
    };
    add_tile(sm, stage, next_stage, compensated, G, beta, rX, rdA, rdQ, rdK, copy_next_head,
             copy_rest_of_next);
    if constexpr (Smem::kDelta && Smem::kLastPart) store_dv<Smem>(stage, params, place, item, beta);  // (5)
    if (item.ends_head(place)) {
      arch::sync_block();
      finish_head(sm, stage, compensated, params, place, item.head(place), G, beta, rX, rdA, rdQ, rdK);
    }
  }
  store_key_head(sm, params, place, rdQ, rdK);
}

// Empty where no GPU that runs this code has the shared memory.
template <class Smem>
__global__ void __launch_bounds__(kThreads, 1)
    gated_delta_bwd_chunk_kernel(const __grid_constant__ GatedDeltaBwdParams params) {
  if constexpr (sizeof(Smem) <= arch::kMaxSharedBytes) differentiate_chunk<Smem>(params);
}

}  // namespace hypenet::cuda::gated_delta::bwd::chunk
