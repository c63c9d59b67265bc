// The part of the chunk forward of the gated delta rule that needs no state: everything about a chunk of 64 tokens that
// needs no other chunk. Of simple GLA's it is (2) alone.
//
// Math, per chunk and value head; G_i = sum of max(g, -50) log2(e) up to token i of the chunk, gamma = 2^G,
// Gamma_ij = 2^(G_i - G_j) for i >= j and 0 above, s the scale:
//   (1) KK = K K^T, QK = Q K^T                              once for all value heads of a key head
//   (2) G
//   (3) P  = s QK . Gamma
//   (4) T0 = (I + stril(diag(beta) KK))^-1                  not gated: no exponential inside the inverse
//   (5) L  = stril(T0 . Gamma)                              I + L = (I + stril(diag(beta) KK . Gamma))^-1
// Another, small kernel, which runs first, writes the map of chunks (and of segments) for cu_seqlens, and bounds within
// [0, T] that the others read instead of cu_seqlens.
//
// Why P and L are made here and not in the scan: there every tile of value columns would make them again, on
// the one path that is serial in T. Here they cost one write and one read of 13 KB per chunk and value head,
// and the scan is left without a product of C x C x K. L is what the backward needs too. Simple GLA has no L, and its
// scan has the time to make P, which then never goes through memory.
//
// Shapes: GatedDeltaFwdParams (params.h). Of P only the ten blocks [16, 16] on and below the diagonal exist;
// L is a hi/lo pair (gated_delta.cuh). Tokens past a sequence's end act as k = q = v = beta = g = 0: rows and
// columns of zeros in L, G goes on with its last value.
//
// Mapping: a block owns a (chunk, key head), blocks numbered along x, the key head fastest; it finds its
// sequence by binary search in the map. Four warps; warp w computes block row w of KK and block row 3 - w of
// QK, which is the same work for each, and (2) of the w-th value head (then of the w + 4-th, ...). Per value head,
// block barriers between: warp w the inverse of diagonal block w by forward substitution (a lane per column), and
// block row w of P; all warps the rest of T0 in three steps; L; the stores. Simple GLA: a warp per (chunk, value head).
//
// Shared memory, for K = 128: 51 KB, 4 blocks per SM of 228 KB, 3 of 164 KB; for K = 256 83 KB; none for simple GLA
//   q, k      [64, K]  Element        32 KB    until (1)
//   T         [64, 72] fp32           18 KB    in their place, T0, then the two parts of L; rows 8 banks
//                                              apart: fragments B do not collide
//   P         [64, 64] Element         8 KB    in their place
//   products  [64, 68] fp32           17 KB    KK below the diagonal; QK, transposed, on and above it
//   gates     [4] of G, beta [64] fp32 2 KB    of four value heads
//
// Numerics: KK and QK accumulate exact products in fp32. T0 is fp32 throughout: its block products are taken
// of factors split into two tf32 each, three products for one (an error of 2^-21 instead of 2^-11), so that
// beta up to 2 with equal keys keeps its digits; no series anywhere. P is rounded once, L to twice the
// digits. Every exponent is a difference of G, held <= 0.
//
// Cost per chunk: 5/8 4 C^2 K FLOPs per key head, about 0.1 MFLOP x 3 of tf32 per value head; reads 4 C K
// bytes per key head, writes 13.25 KB per value head: bound by memory. Simple GLA: reads and writes 256 bytes per value
// head.
//
// Limits: bf16, fp16; K = 64, 128, 256; 2^31 - 1 blocks.
#pragma once

#include "arch/sm80.cuh"
#include "gated_delta.cuh"
#include "tile.cuh"

namespace hypenet::cuda::gated_delta::prepare {

constexpr int kThreads = 128;
constexpr int kBlocks = kChunk / kBlock;  // along a side of the triangle
static_assert(kThreads / arch::kWarpSize == kBlocks);

template <class Element_, int K_>
struct Config {
  using Element = Element_;
  static constexpr int K = K_;
};

struct Gates {
  float G[kChunk], beta[kChunk];
};

template <class Element, int K>
struct Smem {
  union {
    struct {
      Tile<Element, kChunk, K> q, k;
    } in;
    struct {
      float T[kChunk][72];
      Tile<Element, kChunk, kChunk> P;
    } out;
  };
  float products[kChunk][68];
  Gates gates[kBlocks];  // of as many value heads
};
static_assert(sizeof(Smem<arch::bf16, 128>) == 102 * 512);

// One block row of Q K^T or K K^T in a warp's registers: column blocks of two results [16, 8].
using BlockRow = float[kBlocks][2][4];

// Where a chunk and its first value head lie.
struct Place {
  int64_t chunk, key_head, batch, token;
  int num_tokens;
};

// d = block row `row` of A B^T, on and below the diagonal.
template <class Tile>
__device__ __forceinline__ void multiply_rows(BlockRow& d, const Tile& a, const Tile& b, int row) {
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) d[n][0][i] = d[n][1][i] = 0.0f;
  }
#pragma unroll
  for (int k = 0; k < Tile::kCols; k += 16) {
    uint32_t ra[4];
    load_a(ra, a, row * kBlock, k);
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      if (n > row) break;
      uint32_t rb[2][2];
      load_b_transposed(rb, b, k, n * kBlock);
      arch::mma_16x8x16<typename Tile::Element>(d[n][0], ra, rb[0]);
      arch::mma_16x8x16<typename Tile::Element>(d[n][1], ra, rb[1]);
    }
  }
}

// run(i, j, element) for the elements of block row `row` with j <= i.
template <class Run>
__device__ __forceinline__ void for_each_below_diagonal(const BlockRow& d, int row, Run&& run) {
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
    if (n > row) break;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int i = row * kBlock + lane_idx() / 4 + e / 2 % 2 * 8;
      const int j = n * kBlock + lane_idx() % 4 * 2 + e % 2 + e / 4 * 8;
      if (j <= i) run(i, j, d[n][e / 4][e % 4]);
    }
  }
}

// A result [16, 8] at (row, col) of an fp32 matrix.
template <int kStride>
__device__ __forceinline__ void store_fp32(float (&to)[kChunk][kStride], int row, int col,
                                           const float (&d)[4], float sign) {
  const int r = row + lane_idx() / 4, c = col + lane_idx() % 4 * 2;
  *reinterpret_cast<float2*>(&to[r][c]) = float2{sign * d[0], sign * d[1]};
  *reinterpret_cast<float2*>(&to[r + 8][c]) = float2{sign * d[2], sign * d[3]};
}

// (2) One warp: G by a scan over the lanes, two tokens each; with delta also to shared memory, beside beta, zero past
// the end.
template <bool kDelta>
__device__ __forceinline__ void sum_decays(const GatedDeltaFwdParams& params, const Place& place, int head,
                                           Gates* gates) {
  const int lane = lane_idx();
  float g[2], beta[2] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int t = 2 * lane + i;
    const bool valid = t < place.num_tokens;
    g[i] = valid ? *row_of<float>(params.g, place.batch, place.token + t, head) : 0.0f;
    g[i] = kLog2E * (g[i] < kMinLogDecay ? kMinLogDecay : g[i]);  // fmaxf would lose a NaN
    if (kDelta && valid) beta[i] = *row_of<float>(params.beta, place.batch, place.token + t, head);
  }
  const float before = sum_below_lane(sum_up_to_lane(g[0] + g[1]));
  const float2 G = {before + g[0], before + (g[0] + g[1])};
  if constexpr (kDelta) {
    *reinterpret_cast<float2*>(&gates->G[2 * lane]) = G;
    *reinterpret_cast<float2*>(&gates->beta[2 * lane]) = float2{beta[0], beta[1]};
  }
  float* to = params.G + (place.chunk * params.HV + head) * kChunk;
  *reinterpret_cast<float2*>(&to[2 * lane]) = G;
}

// (3) Block row `row` of P, by one warp.
template <class Smem>
__device__ __forceinline__ void scale_and_decay(Smem& smem, const Gates& gates, int row, float scale) {
  const int r = row * kBlock + lane_idx() / 4;
  const float G[2] = {gates.G[r], gates.G[r + 8]};
#pragma unroll 1
  for (int n = 0; n < 2 * row + 2; ++n) {
    const int c = n * 8 + lane_idx() % 4 * 2;
    float p[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int i = r + e / 2 * 8, j = c + e % 2;
      p[e] = j <= i ? scale * smem.products[j][i] * decay_between(G[e / 2], gates.G[j]) : 0.0f;
    }
    store_d(smem.out.P, row * kBlock, n * 8, p);
  }
}

// (4) Inverse of a diagonal block, I + stril(diag(beta) KK), a column per lane (lanes 16 to 31 repeat them):
// x_i = e_i - beta_i sum_{j < i} KK_ij x_j.
template <class Smem>
__device__ __forceinline__ void invert_diagonal_block(Smem& smem, const Gates& gates, int block) {
  const int lane = lane_idx(), column = lane % kBlock, first = block * kBlock;
  float x[kBlock];
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < i; j += 4) {
      const float4 kk = *reinterpret_cast<const float4*>(&smem.products[first + i][first + j]);
      sum += kk.x * x[j];
      if (j + 1 < i) sum += kk.y * x[j + 1];
      if (j + 2 < i) sum += kk.z * x[j + 2];
      if (j + 3 < i) sum += kk.w * x[j + 3];
    }
    x[i] = (i == column ? 1.0f : 0.0f) - gates.beta[first + i] * sum;
  }
  if (lane < kBlock) {
#pragma unroll
    for (int i = 0; i < kBlock; ++i) smem.out.T[first + i][first + column] = x[i];
  }
}

// split_tf32 in two instructions a part, where cvt.rna.tf32 takes four. NaN is lost in `high` and stays in `low`.
__device__ __forceinline__ void split_finite(uint32_t& high, uint32_t& low, float x) {
  constexpr uint32_t kHalf = 0x1000, kKept = 0xffffe000;
  high = (__builtin_bit_cast(uint32_t, x) + kHalf) & kKept;
  low = (__builtin_bit_cast(uint32_t, x - __builtin_bit_cast(float, high)) + kHalf) & kKept;
}

// d [16, 16] += diag(factor) A B of blocks at (a_row, a_col) and (b_row, b_col), to fp32's precision but
// three bits.
template <int kStrideA, int kStrideB>
__device__ __forceinline__ void multiply_blocks(float (&d)[2][4], const float (&A)[kChunk][kStrideA],
                                                int a_row, int a_col, const float (&factor)[2],
                                                const float (&B)[kChunk][kStrideB], int b_row, int b_col) {
  const int r = lane_idx() / 4, c = lane_idx() % 4;
#pragma unroll
  for (int k = 0; k < kBlock; k += 8) {
    uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float a = A[a_row + r + i % 2 * 8][a_col + k + c + i / 2 * 4];
      split_finite(a_high[i], a_low[i], factor[i % 2] * a);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        split_finite(b_high[i], b_low[i], B[b_row + k + c + i * 4][b_col + n * 8 + r]);
      arch::mma_16x8x8_tf32(d[n], a_low, b_high);
      arch::mma_16x8x8_tf32(d[n], a_high, b_low);
      arch::mma_16x8x8_tf32(d[n], a_high, b_high);
    }
  }
}

// (4) T0 below the diagonal, from the inverses T_ii of the diagonal blocks, by all warps; N = diag(beta) KK. Of
// [[A, 0], [N, B]], where A and B are two blocks wide, the inverse is [[A^-1, 0], [-B^-1 N A^-1, B^-1]], and so for A and
// B: a chain of five products of blocks instead of nine.
//   first                         then                        then
//   warp 0   T10 = -T11 N10 T00   T21 = -T22 M21              T20 = -T22 M20
//   warp 1   T32 = -T33 N32 T22                               T30 = -T32 M20 - T33 M30
//   warp 2   M21 = N21 T11        M20 = N20 T00 + N21 T10     T31 = -T32 M21 - T33 M31
//   warp 3   M31 = N31 T11        M30 = N30 T00 + N31 T10
// M_ij lies above the diagonal, where T0 is zero, in block (j, i).
template <class Smem>
__device__ __forceinline__ void solve(Smem& smem, const Gates& gates, int warp) {
  using Block = float[2][4];
  auto& T = smem.out.T;
  const auto add_N_T = [&](Block& d, int i, int k, int column) {  // d += N_ik T_k,column
    const int row = i * kBlock + lane_idx() / 4;
    multiply_blocks(d, smem.products, i * kBlock, k * kBlock, {gates.beta[row], gates.beta[row + 8]}, T,
                    k * kBlock, column * kBlock);
  };
  const auto add_T_M = [&](Block& d, int i, int k, int column) {  // d += T_ik M_k,column
    multiply_blocks(d, T, i * kBlock, k * kBlock, {1.0f, 1.0f}, T, column * kBlock, k * kBlock);
  };
  const auto store = [&](int row, int col, const Block& d, float sign) {
    store_fp32(T, row * kBlock, col * kBlock, d[0], sign);
    store_fp32(T, row * kBlock, col * kBlock + 8, d[1], sign);
  };

  Block d = {}, M = {};
  const int i = warp == 2 ? 2 : warp == 0 ? 1 : 3, k = warp == 0 ? 0 : warp == 1 ? 2 : 1;
  add_N_T(d, i, k, k);
  store(k, i, d, 1.0f);
  if (warp < 2) {
    arch::sync_warp();
    Block product = {};
    add_T_M(product, i, i, k);
    store(i, k, product, -1.0f);
  } else {
    add_N_T(M, warp, 0, 0);
  }
  arch::sync_block();
  if (warp >= 2) {
    add_N_T(M, warp, 1, 0);
    store(0, warp, M, 1.0f);
  } else if (warp == 0) {
    Block product = {};
    add_T_M(product, 2, 2, 1);
    store(2, 1, product, -1.0f);
  }
  arch::sync_block();
  if (warp < 3) {
    const int row = warp == 0 ? 2 : 3, column = warp == 2 ? 1 : 0;
    Block product = {};
#pragma unroll 1
    for (int n = 2; n <= row; ++n) add_T_M(product, row, n, column);
    store(row, column, product, -1.0f);
  }
}

template <class Element>
__device__ __forceinline__ uint4 pack_piece(const float (&x)[kPiece]) {
  return {arch::pack<Element>(x[0], x[1]), arch::pack<Element>(x[2], x[3]), arch::pack<Element>(x[4], x[5]),
          arch::pack<Element>(x[6], x[7])};
}

// (5) The two parts of L in place of T0: rounded, and transposed what the rounding left off. A warp takes
// patches of four rows and eight columns, which keeps the banks of the transposed elements two at a time.
template <class Element, class Smem>
__device__ __forceinline__ void split_gated_inverse(Smem& smem, const Gates& gates) {
  constexpr int kRows = 4, kCols = arch::kWarpSize / kRows;
  const int lane = lane_idx();
#pragma unroll 1
  for (int row = kRows * warp_idx(); row < kChunk; row += kRows * kBlocks) {
#pragma unroll 1
    for (int col = 0; col < row + kRows - 1; col += kCols) {
      const int i = row + lane / kCols, j = col + lane % kCols;
      if (j >= i) continue;
      const float x = smem.out.T[i][j] * decay_between(gates.G[i], gates.G[j]);
      Element rounded;
      arch::from_float(rounded, x);
      smem.out.T[i][j] = arch::to_float(rounded);
      smem.out.T[j][i] = x - arch::to_float(rounded);
    }
  }
}

// P and L to memory.
template <class Element, class Smem>
__device__ __forceinline__ void store_matrices(const GatedDeltaFwdParams& params, const Smem& smem,
                                               int64_t offset) {
  auto *L = static_cast<Element*>(params.L) + offset, *P = static_cast<Element*>(params.P) + offset;
  for_each_piece<kThreads, Tile<Element, kChunk, kChunk>>(arch::thread_idx(), [&](int, int row, int col) {
    const int64_t at = row * kChunk + col;
    if (col / kBlock <= row / kBlock)
      arch::store_16_bytes(P + at, arch::load_16_bytes(smem.out.P.at(row, col)));
    alignas(16) float x[kPiece];
#pragma unroll
    for (int i = 0; i < kPiece; i += 4) {
      *reinterpret_cast<float4*>(&x[i]) = *reinterpret_cast<const float4*>(&smem.out.T[row][col + i]);
    }
    arch::store_16_bytes(L + at, pack_piece<Element>(x));
  });
}

// Where chunk `chunk` of all lies, which is one of sequence n.
__device__ __forceinline__ Place place_of(const GatedDeltaFwdParams& params, int64_t n, int64_t chunk,
                                          int64_t key_head) {
  const Sequence seq = sequence(params, n);
  const int64_t first = (chunk - seq.first_chunk) * kChunk;
  return {chunk, key_head, seq.batch, seq.start + first, tokens_from(seq, first)};
}

template <class C>
__global__ void __launch_bounds__(kThreads, 4)
    gated_delta_prepare_kernel(const __grid_constant__ GatedDeltaFwdParams params) {
  using Element = typename C::Element;
  constexpr int K = C::K;
  auto& smem = arch::shared_memory<Smem<Element, K>>();
  const int thread = arch::thread_idx(), warp = warp_idx();
  const auto H = static_cast<unsigned>(params.H);
  const int64_t chunk = arch::block_idx() / H, key_head = arch::block_idx() % H;
  const int64_t n = sequence_of_chunk(params, chunk);
  if (n < 0) return;
  const Place place = place_of(params, n, chunk, key_head);

  // (1) KK and QK
  copy_tile_async<kThreads>(smem.in.k, row_of<Element>(params.k, place.batch, place.token, key_head),
                            params.k.token, place.num_tokens, thread);
  copy_tile_async<kThreads>(smem.in.q, row_of<Element>(params.q, place.batch, place.token, key_head),
                            params.q.token, place.num_tokens, thread);
  arch::commit_copies();
  // (2), a value head a warp
  const int group = static_cast<int>(params.HV / params.H);
  const auto sum_decays_of_heads = [&](int i) {
    if (i + warp >= group) return;
    sum_decays<true>(params, place, static_cast<int>(key_head) * group + i + warp, &smem.gates[warp]);
  };
  sum_decays_of_heads(0);
  arch::wait_copies<0>();
  arch::sync_block();
  const int row = kBlocks - 1 - warp;
  BlockRow kk, qk;
  multiply_rows(kk, smem.in.k, smem.in.k, warp);
  for_each_below_diagonal(kk, warp, [&](int i, int j, float x) {
    if (j < i) smem.products[i][j] = x;
  });
  multiply_rows(qk, smem.in.q, smem.in.k, row);
  for_each_below_diagonal(qk, row, [&](int i, int j, float x) { smem.products[j][i] = x; });

#pragma unroll 1
  for (int i = 0; i < group; ++i) {
    if (i != 0 && i % kBlocks == 0) sum_decays_of_heads(i);
    if (i % kBlocks == 0) arch::sync_block();
    const Gates& gates = smem.gates[i % kBlocks];
    scale_and_decay(smem, gates, warp, static_cast<float>(params.scale));  // (3)
    // (4)
    invert_diagonal_block(smem, gates, warp);
    arch::sync_block();
    solve(smem, gates, warp);
    arch::sync_block();
    split_gated_inverse<Element>(smem, gates);  // (5)
    arch::sync_block();
    const int64_t head = key_head * group + i;
    store_matrices<Element>(params, smem, (chunk * params.HV + head) * kChunk * kChunk);
    arch::sync_block();
  }
}

// (2) for simple GLA.
static __global__ void __launch_bounds__(kThreads, 1)
    gated_delta_decays_kernel(const __grid_constant__ GatedDeltaFwdParams params) {
  const int64_t unit = int64_t{arch::block_idx()} * (kThreads / arch::kWarpSize) + warp_idx();
  const int64_t chunk = unit / params.HV;
  if (chunk >= params.num_chunks) return;
  const int64_t n = sequence_of_chunk(params, chunk);
  if (n < 0) return;
  sum_decays<false>(params, place_of(params, n, chunk, 0), static_cast<int>(unit % params.HV), nullptr);
}

constexpr int kMapThreads = 256;

struct MapSmem {
  int64_t ends[kMapThreads / arch::kWarpSize], sums[kMapThreads / arch::kWarpSize];
};

__device__ __forceinline__ int64_t larger(int64_t x, int64_t y) { return x > y ? x : y; }

// Bound n of the sequences, at least 0 and at most T whatever cu_seqlens holds.
__device__ __forceinline__ int64_t bound(const GatedDeltaFwdParams& params, int64_t n) {
  const int64_t bound = larger(params.cu_seqlens[n], 0);
  return bound < params.T ? bound : params.T;
}

// chunk_offsets[0][n] = chunks of the sequences before n, and chunk_offsets[1] = cu_seqlens, raised where it falls and
// kept within [0, T], by block 0; segment_offsets like the former, by block 1 where sequences are split. The other
// kernels read these bounds, with which no sequence leaves its tensors. kMapThreads sequences a turn.
static __global__ void __launch_bounds__(kMapThreads, 1)
    gated_delta_map_kernel(const __grid_constant__ GatedDeltaFwdParams params) {
  auto& smem = arch::shared_memory<MapSmem>();
  const int thread = arch::thread_idx(), lane = lane_idx(), warp = warp_idx();
  const bool chunks = arch::block_idx() == 0;
  int64_t* offsets = chunks ? params.chunk_offsets : params.segment_offsets;
  int64_t* bounds = params.chunk_offsets + params.N + 1;
  int64_t before = 0, reached = bound(params, 0);  // in the turns so far
  if (chunks && thread == 0) bounds[0] = reached;
  for (int64_t first = 0; first < params.N; first += kMapThreads) {
    const int64_t n = first + thread;
    int64_t stop = n < params.N ? bound(params, n + 1) : 0;
#pragma unroll
    for (int delta = 1; delta < arch::kWarpSize; delta *= 2) {
      const int64_t below = arch::shuffle_up(stop, delta);
      if (lane >= delta) stop = larger(stop, below);
    }
    int64_t start = arch::shuffle_up(stop, 1);
    if (lane == 0) start = 0;
    if (lane == arch::kWarpSize - 1) smem.ends[warp] = stop;
    arch::sync_block();
    for (int w = 0; w < kMapThreads / arch::kWarpSize; ++w) {
      if (w == warp) start = larger(start, reached), stop = larger(stop, reached);
      reached = larger(reached, smem.ends[w]);
    }
    int64_t count = 0;
    if (n < params.N) {
      if (chunks) bounds[n + 1] = stop;
      const int64_t length = stop - start;
      count = chunks ? (length + kChunk - 1) / kChunk : num_segments(length, params.segment_chunks * kChunk);
    }
    int64_t sum = sum_up_to_lane(count);
    if (lane == arch::kWarpSize - 1) smem.sums[warp] = sum;
    arch::sync_block();
    int64_t total = 0;
    for (int w = 0; w < kMapThreads / arch::kWarpSize; ++w) {
      if (w == warp) sum += before + total;
      total += smem.sums[w];
    }
    if (n < params.N) offsets[n] = sum - count;
    before += total;
    arch::sync_block();
  }
  if (thread == 0) offsets[params.N] = before;
}

}  // namespace hypenet::cuda::gated_delta::prepare
