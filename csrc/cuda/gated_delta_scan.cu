// The part of the chunk forward of the gated delta rule and simple GLA that is serial in T: the state goes
// from chunk to chunk. What does not need the state is in workspace already (gated_delta_prepare.cu).
//
// Math, per chunk of 64 tokens, S the state before it; gamma, Tb and P from workspace, s the scale:
//   (1) Z = K S                      O = Q S
//   (2) R = V - gamma Z
//   (3) E = Tb R                     simple GLA: E = V, and neither (2) nor Z
//   (4) O = s gamma O + P E
//   (5) S := gamma_last S + K^T (gamma_last / gamma E)
//
// Shapes: GatedDeltaFwdParams (params.h); K = 64 or 128, V a multiple of 64. Where the forward keeps h, S is
// written there, rounded, before each chunk.
//
// Mapping: a block owns 16 kWarps columns of V of one (sequence, value head); blocks are numbered along x,
// the column tile fastest. Every warp owns 16 columns from the first chunk to the last and shares nothing
// with the others but the tiles that they read, so that a chunk costs one block barrier. A warp holds S^T
// [16, K] as results of mma. Everything is computed transposed, so that results, rounded where they lie, are
// the next product's operand A: S^T of Z^T = S^T K^T and of O^T = S^T Q^T, R^T, made from Z^T in place, of
// E^T = R^T Tb^T, and E^T of S^T += E^T K and of O^T += E^T P^T. Between the tiles' arrival and the store of
// O nothing passes through shared memory. Four warps or eight is a question of how many blocks there are;
// the results are the same bits.
//
// Shared memory, two stages of (K = 128, eight warps; for four, v is half as large):
//   k, q           [64, K]      Element   32 KB
//   P | Tb         [64, 128]    Element   16 KB    the blocks above the diagonals are never touched
//   v              [8][64, 16]  Element   16 KB    a tile per warp; (4) leaves O there
//   gamma, to_end  [64]         fp32     0.5 KB
// 129 KB: 1 block of 8 warps per processor; 113 KB: 2 blocks of 4 warps where there are 228 KB, else 1.
//
// Pipeline: while a chunk is computed, the copies of the next one run. Top of a chunk: wait for own copies,
// barrier (the chunk is here, and all warps have left the other stage), start the copies of the next.
//
// Numerics: S, Z, R before its rounding, E before its rounding and O accumulate in fp32. Rounded to Element:
// S and R as operands, E, E to the chunk's end, O. There is no exponential here.
//
// Cost per chunk and 16 columns, K = 128: 232 mma (148 without delta) behind 120 ldmatrix (74), each for two
// mma: tensor cores and shared memory are equally busy. Per chunk and block 42 KB of tiles besides v (37 KB
// without delta), which the blocks of one head share in L2. Bound by the latency of a chunk where there are
// few heads, else by mma.
//
// Limits: bf16, fp16; fewer than 2^31 tokens in a sequence; 2^31 - 1 blocks.
#include "arch/sm80.cuh"
#include "dtype.cuh"
#include "gated_delta.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "tile.cuh"

namespace hypenet::cuda::gated_delta {
namespace {

constexpr int kColumns = 16;             // of V, per warp
constexpr int kSteps = kChunk / kBlock;  // fragments along the tokens of a chunk

template <class Element_, int K_, bool Delta_, int Warps_>
struct Config {
  using Element = Element_;
  static constexpr int kKeyDim = K_, kWarps = Warps_, kThreads = kWarps * arch::kWarpSize;
  static constexpr bool kDelta = Delta_;
  using Rows = Tile<Element, kChunk, kKeyDim>;
  using Matrices = Tile<Element, kChunk, kDelta ? 2 * kChunk : kChunk>;  // P, and Tb on its right
  using Slab = Tile<Element, kChunk, kColumns>;
};

template <class C>
struct Stage {
  typename C::Rows k, q;
  typename C::Matrices matrices;
  typename C::Slab v[C::kWarps];
  alignas(16) float gamma[kChunk], to_end[kChunk];
};

template <class C>
struct ScanSmem {
  Stage<C> stages[2];
};
static_assert(sizeof(ScanSmem<Config<arch::bf16, 128, true, 8>>) == 129 * 1024);
static_assert(2 * (sizeof(ScanSmem<Config<arch::bf16, 128, true, 4>>) + 1024) <= 228 * 1024);

// Results of mma along a row of a warp: [16, 8 n].
template <int n>
using Results = float[n][4];
// The same, rounded, as operands A [16, 16].
template <int n>
using Operands = uint32_t[n][4];

// A warp's place: 16 columns of a head of a sequence, whose tokens an int can count.
struct Place {
  int64_t batch, token, chunk;  // token, chunk: the sequence's first
  unsigned n, head, key_head, column;
  int num_tokens;
};

// What a thread reads next: its rows of the coming chunk.
template <class C>
struct Cursor {
  const typename C::Element *k, *q, *v;
  int64_t matrix;  // (chunk, head) among all
  int num_tokens;  // of the sequence from the chunk on

  __device__ Cursor(const GatedDeltaFwdParams& params, const Place& place) {
    using Element = typename C::Element;
    const unsigned thread = arch::thread_idx(), lane = lane_idx();
    constexpr unsigned kRowPieces = C::Rows::kPieces, kSlabPieces = C::Slab::kPieces;
    const int row = thread / kRowPieces, col = thread % kRowPieces * kPiece;
    k = row_of<Element>(params.k, place.batch, place.token + row, place.key_head) + col;
    q = row_of<Element>(params.q, place.batch, place.token + row, place.key_head) + col;
    v = row_of<Element>(params.v, place.batch, place.token + lane / kSlabPieces, place.head) + place.column +
        lane % kSlabPieces * kPiece;
    matrix = place.chunk * params.HV + place.head;
    num_tokens = place.num_tokens;
  }

  __device__ void advance(const GatedDeltaFwdParams& params) {
    k += kChunk * params.k.token, q += kChunk * params.q.token, v += kChunk * params.v.token;
    matrix += params.HV;
    num_tokens -= kChunk;
  }
};

template <int n>
__device__ __forceinline__ void set_zero(Results<n>& x) {
#pragma unroll
  for (int i = 0; i < n; ++i) x[i][0] = x[i][1] = x[i][2] = x[i][3] = 0.0f;
}

// d [16, 16] += a b for the fragment b whose row in shared memory is given.
template <class Element, bool kTransposed = true>
__device__ __forceinline__ void multiply(float (&left)[4], float (&right)[4], const uint32_t (&a)[4],
                                         const void* row) {
  uint32_t b[4];
  if constexpr (kTransposed) {
    arch::ldmatrix_x4(b, row);
  } else {
    arch::ldmatrix_x4_trans(b, row);
  }
  arch::mma_16x8x16<Element>(left, a, {b[0], b[1]});
  arch::mma_16x8x16<Element>(right, a, {b[2], b[3]});
}

// Where a lane's rows of fragments lie, in bytes from the fragment's first row and column 0. A fragment's
// column then flips bits of it: three registers stand for the addresses of all fragments.
template <class C>
struct Lanes {
  int rows, rows_transposed;  // B of k [tokens, K], and of its and q's transpose
  int matrices_transposed;    // B of the transposes of P and Tb

  __device__ Lanes() {
    const int lane = lane_idx(), row = lane % 8 + lane / 16 * 8, col = lane / 8 % 2 * kPiece;
    rows = C::Rows::offset(lane % 16, lane / 16 * kPiece) * 2;
    rows_transposed = C::Rows::offset(row, col) * 2;
    matrices_transposed = C::Matrices::offset(row, col) * 2;
  }
};

// This lane's row of the fragment at (row, col).
template <class Tile>
__device__ __forceinline__ const void* fragment_row(const Tile& tile, int lane_offset, int row, int col) {
  constexpr int kRowBytes = Tile::kCols * 2;
  constexpr int kSwizzled = 8 * kPiece * 2;  // bytes of a row within which a key moves its pieces
  static_assert(kRowBytes % kSwizzled == 0);
  const int flips = col * 2 % kSwizzled, ahead = col * 2 / kSwizzled * kSwizzled;
  return reinterpret_cast<const char*>(tile.data) + (lane_offset ^ flips) + ahead + row * kRowBytes;
}

// run(address in columns of a matrix [K, V], element) for the elements of S^T that a lane holds. One address
// is kept and moved on, here and below: registers are scarce.
template <int n, class Float, class Run>
__device__ __forceinline__ void for_each_of_state(Results<n>& S, Float* matrix, int64_t V, Run&& run) {
  matrix += lane_idx() % 4 * 2 * V + lane_idx() / 4;
#pragma unroll
  for (int i = 0; i < n; ++i, matrix += 8 * V) {
    run(matrix, S[i][0]);
    run(matrix + V, S[i][1]);
    run(matrix + 8, S[i][2]);
    run(matrix + V + 8, S[i][3]);
  }
}

// Starts the copy of rows [0, num_rows) of a tile; the other rows become zero. `global`: this thread's first
// piece.
template <int kThreads, class Tile>
__device__ __forceinline__ void copy_rows_async(Tile& tile, const typename Tile::Element* global,
                                                int64_t stride, int num_rows, unsigned thread) {
  constexpr int kRowsAtOnce = kThreads / Tile::kPieces;
  static_assert(kRowsAtOnce % 8 == 0 && Tile::kRows % kRowsAtOnce == 0);
  const int first = thread / Tile::kPieces, col = thread % Tile::kPieces * kPiece;
#pragma unroll
  for (int i = 0; i < Tile::kRows; i += kRowsAtOnce, global += kRowsAtOnce * stride) {
    arch::copy_16_async(tile.at(first + i, col), global, first + i < num_rows);
  }
}

// Starts the copy of the blocks on and below the diagonal of a matrix [64, 64] to a tile's columns from `to`
// on.
template <int kThreads, class Tile>
__device__ __forceinline__ void copy_triangle_async(Tile& tile, int to, const void* matrices, int64_t idx,
                                                    unsigned thread) {
  using Element = typename Tile::Element;
  constexpr int kPieces = kChunk / kPiece, kRowsAtOnce = kThreads / kPieces;
  const int first = thread / kPieces, col = thread % kPieces * kPiece;
  const Element* global = static_cast<const Element*>(matrices) + idx * kChunk * kChunk + thread * kPiece;
#pragma unroll
  for (int i = 0; i < kChunk; i += kRowsAtOnce, global += kThreads * kPiece) {
    const int row = first + i;
    if (col < row / kBlock * kBlock + kBlock) arch::copy_16_async(tile.at(row, to + col), global, true);
  }
}

// Starts the copies of the chunk at the cursor.
template <class C>
__device__ __forceinline__ void copy_chunk_async(Stage<C>& stage, const GatedDeltaFwdParams& params,
                                                 const Cursor<C>& at) {
  const unsigned thread = arch::thread_idx();
  copy_rows_async<C::kThreads>(stage.k, at.k, params.k.token, at.num_tokens, thread);
  copy_rows_async<C::kThreads>(stage.q, at.q, params.q.token, at.num_tokens, thread);
  copy_rows_async<arch::kWarpSize>(stage.v[warp_idx()], at.v, params.v.token, at.num_tokens, lane_idx());
  copy_triangle_async<C::kThreads>(stage.matrices, 0, params.P, at.matrix, thread);
  if constexpr (C::kDelta) {
    copy_triangle_async<C::kThreads>(stage.matrices, kChunk, params.Tb, at.matrix, thread);
  }
  constexpr int kPieces = kChunk / 4;  // of a vector of 64 floats
  if (thread < 2 * kPieces) {
    float* to = thread < kPieces ? stage.gamma + 4 * thread : stage.to_end + 4 * (thread - kPieces);
    arch::copy_16_async(to, params.decays + at.matrix * 2 * kChunk + 4 * thread, true);
  }
}

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

// (1) Z^T = S^T K^T and O^T = S^T Q^T. Together, so that S is rounded once and its rounded form is not kept.
template <class C>
__device__ __forceinline__ void read_state(Results<kChunk / 8>& Z, Results<kChunk / 8>& O,
                                           const Results<C::kKeyDim / 8>& S, const Stage<C>& stage,
                                           const Lanes<C>& lanes) {
  using Element = typename C::Element;
  set_zero(Z);
  set_zero(O);
#pragma unroll
  for (int k = 0; k < C::kKeyDim; k += 16) {
    uint32_t s[4];
    round_to_a<Element>(s, S[k / 8], S[k / 8 + 1]);
#pragma unroll
    for (int t = 0; t < kSteps; ++t) {
      if constexpr (C::kDelta) {
        multiply<Element>(Z[2 * t], Z[2 * t + 1], s, fragment_row(stage.k, lanes.rows_transposed, 16 * t, k));
      }
      multiply<Element>(O[2 * t], O[2 * t + 1], s, fragment_row(stage.q, lanes.rows_transposed, 16 * t, k));
    }
  }
}

// D^T += A^T M^T for the lower triangular matrix M at column `col` of the stage's matrices.
template <class C>
__device__ __forceinline__ void multiply_by_triangle(Results<kChunk / 8>& D, const Operands<kSteps>& A,
                                                     const Stage<C>& stage, const Lanes<C>& lanes, int col) {
#pragma unroll
  for (int t = 0; t < kSteps; ++t) {
#pragma unroll
    for (int i = t; i < kSteps; ++i) {
      const void* row = fragment_row(stage.matrices, lanes.matrices_transposed, 16 * i, col + 16 * t);
      multiply<typename C::Element>(D[2 * i], D[2 * i + 1], A[t], row);
    }
  }
}

// Of a vector over the chunk, what belongs to pair i of an operand A whose columns are the 16 tokens from 16
// t on.
__device__ __forceinline__ float2 load_pair(const float (&x)[kChunk], int t, int i) {
  return *reinterpret_cast<const float2*>(&x[16 * t + i / 2 * 8 + lane_idx() % 4 * 2]);
}

// (2) R^T = V^T - gamma Z^T, rounded; V^T itself without delta.
template <class C>
__device__ __forceinline__ void form_residual(Operands<kSteps>& R, const Results<kChunk / 8>& Z,
                                              const Stage<C>& stage) {
  using Element = typename C::Element;
#pragma unroll
  for (int t = 0; t < kSteps; ++t) {
    load_a_transposed(R[t], stage.v[warp_idx()], 0, 16 * t);
    if constexpr (C::kDelta) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 gamma = load_pair(stage.gamma, t, i);
        const float2 v = arch::unpack<Element>(R[t][i]);
        const float* z = &Z[2 * t + i / 2][i % 2 * 2];
        R[t][i] = arch::pack<Element>(v.x - gamma.x * z[0], v.y - gamma.y * z[1]);
      }
    }
  }
}

// Rounds E [16, 16] at token 16 t to e, and times its decay to the chunk's end to e_end. Without delta e is
// there: V.
template <class C>
__device__ __forceinline__ void round_values(uint32_t (&e)[4], uint32_t (&e_end)[4],
                                             const Results<kChunk / 8>& E, const Stage<C>& stage, int t) {
  using Element = typename C::Element;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 x;
    if constexpr (C::kDelta) {
      const float* pair = &E[2 * t + i / 2][i % 2 * 2];
      x = {pair[0], pair[1]};
      e[i] = arch::pack<Element>(x.x, x.y);
    } else {
      x = arch::unpack<Element>(e[i]);
    }
    const float2 to_end = load_pair(stage.to_end, t, i);
    e_end[i] = arch::pack<Element>(to_end.x * x.x, to_end.y * x.y);
  }
}

// (5) S^T = gamma_last S^T + (gamma_last / gamma E)^T K; E, rounded, to `rounded`.
template <class C>
__device__ __forceinline__ void update_state(Results<C::kKeyDim / 8>& S, Operands<kSteps>& rounded,
                                             const Results<kChunk / 8>& E, const Stage<C>& stage,
                                             const Lanes<C>& lanes) {
  const float whole = stage.gamma[kChunk - 1];
#pragma unroll
  for (int k = 0; k < C::kKeyDim / 8; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) S[k][i] *= whole;
  }
#pragma unroll
  for (int t = 0; t < kSteps; ++t) {
    uint32_t e_end[4];
    round_values<C>(rounded[t], e_end, E, stage, t);
#pragma unroll
    for (int k = 0; k < C::kKeyDim; k += 16) {
      const void* row = fragment_row(stage.k, lanes.rows, 16 * t, k);
      multiply<typename C::Element, false>(S[k / 8], S[k / 8 + 1], e_end, row);
    }
  }
}

// (4) O^T = s gamma O^T + E^T P^T; rounded and transposed to the warp's tile of v.
template <class C>
__device__ __forceinline__ void compute_output(Stage<C>& stage, Results<kChunk / 8>& O,
                                               const Operands<kSteps>& E, float scale,
                                               const Lanes<C>& lanes) {
  using Element = typename C::Element;
#pragma unroll
  for (int t = 0; t < kChunk / 8; ++t) {
    const float2 gamma = load_pair(stage.gamma, t / 2, t % 2 * 2);
    O[t][0] *= scale * gamma.x, O[t][1] *= scale * gamma.y;
    O[t][2] *= scale * gamma.x, O[t][3] *= scale * gamma.y;
  }
  multiply_by_triangle(O, E, stage, lanes, 0);
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

template <class C>
__device__ __forceinline__ Place place_of(const GatedDeltaFwdParams& params) {
  const auto num_tiles = static_cast<unsigned>(params.V / (C::kWarps * kColumns));
  const auto HV = static_cast<unsigned>(params.HV);
  const unsigned block = arch::block_idx(), n = block / num_tiles / HV, head = block / num_tiles % HV;
  const Sequence seq = sequence(params, n);
  return {.batch = seq.batch,
          .token = seq.start,
          .chunk = seq.first_chunk,
          .n = n,
          .head = head,
          .key_head = head / (HV / static_cast<unsigned>(params.H)),
          .column = (block % num_tiles * C::kWarps + warp_idx()) * kColumns,
          .num_tokens = static_cast<int>(seq.length)};
}

// The warp's columns of the sequence's state.
template <class C, class Float>
__device__ __forceinline__ Float* state_of(Float* states, const GatedDeltaFwdParams& params,
                                           const Place& place) {
  return states + (int64_t{place.n} * params.HV + place.head) * C::kKeyDim * params.V + place.column;
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    gated_delta_scan_kernel(const __grid_constant__ GatedDeltaFwdParams params) {
  using Element = typename C::Element;
  auto& smem = arch::shared_memory<ScanSmem<C>>();
  const Place place = place_of<C>(params);
  const Lanes<C> lanes;
  const int64_t V = params.V;
  const auto o_stride = static_cast<unsigned>(params.HV * V);
  Cursor<C> next(params, place);
  if (next.num_tokens > 0) copy_chunk_async(smem.stages[0], params, next);
  arch::commit_copies();

  Results<C::kKeyDim / 8> S;
  if (params.initial_state == nullptr) {
    set_zero(S);
  } else {
    for_each_of_state(S, state_of<C>(static_cast<const float*>(params.initial_state), params, place), V,
                      [](const float* from, float& x) { x = *from; });
  }
  constexpr unsigned kSlabPieces = C::Slab::kPieces;
  auto* o = static_cast<Element*>(params.o) +
            (place.batch * params.T + place.token + lane_idx() / kSlabPieces) * params.HV * V +
            place.head * V + place.column + lane_idx() % kSlabPieces * kPiece;

  for (int c = 0; next.num_tokens > 0; ++c) {
    Stage<C>& stage = smem.stages[c % 2];
    const int num_tokens = next.num_tokens;
    arch::wait_copies<0>();
    arch::sync_block();
    if (params.h != nullptr) {
      store_state(static_cast<Element*>(params.h) + next.matrix * C::kKeyDim * V, V, place.column, S);
    }
    next.advance(params);
    if (next.num_tokens > 0) copy_chunk_async(smem.stages[(c + 1) % 2], params, next);
    arch::commit_copies();

    Results<kChunk / 8> Z, O;
    read_state<C>(Z, O, S, stage, lanes);  // (1)
    Operands<kSteps> R;
    form_residual<C>(R, Z, stage);  // (2)
    Results<kChunk / 8> E;
    if constexpr (C::kDelta) {
      set_zero(E);
      multiply_by_triangle(E, R, stage, lanes, kChunk);  // (3)
    }
    update_state<C>(S, R, E, stage, lanes);                                   // (5), leaves E, rounded, in R
    compute_output<C>(stage, O, R, static_cast<float>(params.scale), lanes);  // (4)
    store_output<C>(o, o_stride, num_tokens, stage.v[warp_idx()]);
  }

  for_each_of_state(S, state_of<C>(static_cast<float*>(params.final_state), params, place), V,
                    [](float* to, float x) { *to = x; });
}

template <class C>
Status launch_scan(const GatedDeltaFwdParams& params, Stream stream) {
  const int64_t num_tiles = params.V / (C::kWarps * kColumns);
  return launch("gated_delta_scan", gated_delta_scan_kernel<C>, params.N * params.HV * num_tiles, C::kThreads,
                sizeof(ScanSmem<C>), stream, params);
}

}  // namespace

// Eight warps share their tiles and so need half the traffic of four; worth it where most processors have
// such a block.
Status scan(const GatedDeltaFwdParams& params, Stream stream) {
  constexpr int kWide = 8, kNarrow = 4;
  if (params.V % (kNarrow * kColumns) != 0) return "V must be a multiple of 64";
  int processors = 0;
  if (const Status status = num_processors(processors); status != nullptr) return status;
  const int64_t wide_blocks = params.N * params.HV * (params.V / (kWide * kColumns));
  const bool wide = params.V % (kWide * kColumns) == 0 && 4 * wide_blocks >= 3 * processors;
  return dispatch_half_dtype(params.dtype, [&]<class Element>() {
    return dispatch_key_dim(params.K, [&]<int K>() {
      if (params.delta) {
        return wide ? launch_scan<Config<Element, K, true, kWide>>(params, stream)
                    : launch_scan<Config<Element, K, true, kNarrow>>(params, stream);
      }
      return wide ? launch_scan<Config<Element, K, false, kWide>>(params, stream)
                  : launch_scan<Config<Element, K, false, kNarrow>>(params, stream);
    });
  });
}

}  // namespace hypenet::cuda::gated_delta

namespace hypenet::cuda {

Status gated_delta_chunk_fwd(const GatedDeltaFwdParams& params, Stream stream) {
  if (params.cu_seqlens != nullptr) {
    if (const Status status = gated_delta::map_chunks(params, stream); status != nullptr) return status;
  }
  if (const Status status = gated_delta::prepare(params, stream); status != nullptr) return status;
  return gated_delta::scan(params, stream);
}

}  // namespace hypenet::cuda
