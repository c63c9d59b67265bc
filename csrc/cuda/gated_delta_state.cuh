// How the state goes from chunk to chunk: what gated_delta_scan.cuh, which says what is computed and how, and
// gated_delta_segments.cuh, which processes segments alone and computes no output, share.
#pragma once

#include "arch/sm80.cuh"
#include "gated_delta.cuh"
#include "tile.cuh"

namespace hypenet::cuda::gated_delta::scan {

constexpr int kColumns = 16;             // of V, per warp
constexpr int kSteps = kChunk / kBlock;  // fragments along the tokens of a chunk

// Whether a pass over the chunks computes O, for which it needs q and P, or the state alone.
enum class Pass { kOutput, kState };

// kStages: chunks in shared memory. With two, the next one is on its way while one is computed.
template <class Element_, int K_, Rule kRule, Pass kPass, int Warps_, int kStages_ = 2>
struct Config {
  using Element = Element_;
  static constexpr int kStages = kStages_;
  static constexpr int kKeyDim = K_, kWarps = Warps_;
  static constexpr bool kDelta = kRule == Rule::kDelta, kOutput = kPass == Pass::kOutput;
  // Of P, which simple GLA makes as it goes, warps without columns of V take care where registers allow them.
  static constexpr bool kMakesP = kOutput && !kDelta;
  static constexpr int kHelpers = kMakesP && kKeyDim == 128 && kWarps != 4 ? 4 : 0;
  // (5) while P is made, which takes the registers of O longer.
  static constexpr bool kStateFirst = kHelpers > 0 && kWarps == 2;
  static constexpr int kCopiers = kWarps * arch::kWarpSize;  // threads with columns, which also copy
  static constexpr int kThreads = kCopiers + kHelpers * arch::kWarpSize;
  static constexpr int kLColumn = kOutput ? kChunk : 0;  // of L beside P
  // S fills half of the registers: E waits in shared memory, and (1) makes O when Z has gone.
  static constexpr bool kWide = kKeyDim > 128;
  using Rows = Tile<Element, kChunk, kKeyDim>;
  static constexpr int kNumMatrices = int{kDelta} + int{kOutput};
  using Matrices = Tile<Element, kChunk, kChunk*(kNumMatrices == 0 ? 1 : kNumMatrices)>;
  using Slab = Tile<Element, kChunk, kColumns>;
};

// Unused tiles take no memory: q and P without output, L without delta, values that registers hold.
template <class C, bool kOutput = C::kOutput, bool kDelta = C::kDelta>
struct StageTiles {
  typename C::Rows k, q;
  typename C::Matrices matrices;  // P, and L on its right
};
template <class C>
struct StageTiles<C, false, true> {
  typename C::Rows k;
  typename C::Matrices matrices;  // L
};
template <class C>
struct StageTiles<C, false, false> {
  typename C::Rows k;
};

template <class C>
struct Stage : StageTiles<C> {
  typename C::Slab v[C::kWarps];
  float G[kChunk], beta[kChunk];
};

// E^T of a warp as operands, every lane's part: the high parts of its four steps, then the low parts.
using ValuesSmem = uint4[2][kSteps][arch::kWarpSize];

template <class C, bool kWide = C::kWide>
struct ScanSmem {
  Stage<C> stages[C::kStages];
  ValuesSmem values[C::kWarps];
};
template <class C>
struct ScanSmem<C, false> {
  Stage<C> stages[C::kStages];
  static constexpr ValuesSmem* values = nullptr;
};

// Results of mma along a row of a warp: [16, 8 n].
template <int n>
using Results = float[n][4];
// The same, rounded, as operands A [16, 16].
template <int n>
using Operands = uint32_t[n][4];

// A warp's place: 16 columns of a head of a sequence or segment, whose tokens an int can count.
struct Place {
  int64_t batch, token, chunk;  // token, chunk: the first
  unsigned head, key_head, column;
  int num_tokens;
};

__device__ __forceinline__ Place place_in(const GatedDeltaFwdParams& params, const Segment& segment,
                                          unsigned head, unsigned column) {
  return {.batch = segment.sequence.batch,
          .token = segment.sequence.start + segment.first,
          .chunk = segment.sequence.first_chunk + segment.first / kChunk,
          .head = head,
          .key_head = head / static_cast<unsigned>(params.HV / params.H),
          .column = column,
          .num_tokens = static_cast<int>(segment.length)};
}

// The place that follows from a block's number: its segment, and this warp's columns of a value head.
template <class C>
struct Slot {
  int64_t segment;
  unsigned head, column;

  // num_tiles: in which a head's columns are cut.
  __device__ Slot(const GatedDeltaFwdParams& params, unsigned num_tiles) {
    const auto HV = static_cast<unsigned>(params.HV);
    const unsigned block = arch::block_idx();
    segment = block / num_tiles / HV;
    head = block / num_tiles % HV;
    column = (block % num_tiles * C::kWarps + warp_idx()) * kColumns;
  }
  // Where the warp's columns of the head's state n lie in [n, HV, K, V].
  __device__ int64_t state(const GatedDeltaFwdParams& params, int64_t n) const {
    return (n * params.HV + head) * C::kKeyDim * params.V + column;
  }
  // The same of sequence n in initial_state and final_state.
  __device__ int64_t state_of_sequence(const GatedDeltaFwdParams& params, int64_t n) const {
    return slot_of(params, n) * slot_stride(params) + head * C::kKeyDim * params.V + column;
  }
};

// The next reads of a thread: its rows of the coming chunk.
template <class C>
struct Cursor {
  const typename C::Element *k, *q, *v;
  const float* beta;
  int64_t matrix;  // (chunk, head) among all
  int num_tokens;  // from the chunk on

  __device__ Cursor(const GatedDeltaFwdParams& params, const Place& place) {
    using Element = typename C::Element;
    const unsigned thread = arch::thread_idx(), lane = lane_idx();
    constexpr unsigned kRowPieces = C::Rows::kPieces, kSlabPieces = C::Slab::kPieces;
    const int row = thread / kRowPieces, col = thread % kRowPieces * kPiece;
    k = row_of<Element>(params.k, place.batch, place.token + row, place.key_head) + col;
    q = row_of<Element>(params.q, place.batch, place.token + row, place.key_head) + col;
    v = row_of<Element>(params.v, place.batch, place.token + lane / kSlabPieces, place.head) + place.column +
        lane % kSlabPieces * kPiece;
    if constexpr (C::kDelta) {
      beta = row_of<float>(params.beta, place.batch, place.token + thread, place.head);
    }
    matrix = place.chunk * params.HV + place.head;
    num_tokens = place.num_tokens;
  }

  __device__ void advance(const GatedDeltaFwdParams& params) {
    k += kChunk * params.k.token, q += kChunk * params.q.token, v += kChunk * params.v.token;
    if constexpr (C::kDelta) beta += kChunk * params.beta.token;
    matrix += params.HV;
    num_tokens -= kChunk;
  }
};

template <int n>
__device__ __forceinline__ void set_zero(Results<n>& x) {
#pragma unroll
  for (int i = 0; i < n; ++i) x[i][0] = x[i][1] = x[i][2] = x[i][3] = 0.0f;
}

// d [16, 16] += a b
template <class Element>
__device__ __forceinline__ void multiply(float (&left)[4], float (&right)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[4]) {
  arch::mma_16x8x16<Element>(left, a, {b[0], b[1]});
  arch::mma_16x8x16<Element>(right, a, {b[2], b[3]});
}

// Where a lane's rows of fragments lie, in bytes from the fragment's first row and column 0. A fragment's
// column then flips bits of it: three registers stand for the addresses of all fragments.
template <class C>
struct Lanes {
  int rows, rows_transposed;  // B of k [tokens, K], and of its and q's transpose
  int matrices_transposed;    // B of the transposes of P and of L's high part
  int matrices;               // B of the transpose of L's low part, as that is how it lies

  __device__ Lanes() {
    const int lane = lane_idx(), row = lane % 8 + lane / 16 * 8, col = lane / 8 % 2 * kPiece;
    rows = C::Rows::offset(lane % 16, lane / 16 * kPiece) * 2;
    rows_transposed = C::Rows::offset(row, col) * 2;
    matrices_transposed = C::Matrices::offset(row, col) * 2;
    matrices = C::Matrices::offset(lane % 16, lane / 16 * kPiece) * 2;
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
  static_assert(kThreads % Tile::kPieces == 0 && Tile::kRows % kRowsAtOnce == 0);
  const int first = thread / Tile::kPieces, col = thread % Tile::kPieces * kPiece;
#pragma unroll
  for (int i = 0; i < Tile::kRows; i += kRowsAtOnce, global += kRowsAtOnce * stride) {
    arch::copy_16_async(tile.at(first + i, col), global, first + i < num_rows);
  }
}

// Starts the copy of a matrix [64, 64] to a tile's columns from `to` on; if kTriangle, of its blocks on and
// below the diagonal.
template <int kThreads, bool kTriangle, class Tile>
__device__ __forceinline__ void copy_matrix_async(Tile& tile, int to, const void* matrices, int64_t idx,
                                                  unsigned thread) {
  using Element = typename Tile::Element;
  constexpr int kPieces = kChunk / kPiece, kRowsAtOnce = kThreads / kPieces;
  const int first = thread / kPieces, col = thread % kPieces * kPiece;
  const Element* global = static_cast<const Element*>(matrices) + idx * kChunk * kChunk + thread * kPiece;
#pragma unroll
  for (int i = 0; i < kChunk; i += kRowsAtOnce, global += kThreads * kPiece) {
    const int row = first + i;
    if (!kTriangle || col < row / kBlock * kBlock + kBlock) {
      arch::copy_16_async(tile.at(row, to + col), global, true);
    }
  }
}

// Starts the copies of the chunk at the cursor; of v, of num_values tokens.
template <class C>
__device__ __forceinline__ void copy_chunk_async(Stage<C>& stage, const GatedDeltaFwdParams& params,
                                                 const Cursor<C>& at, int num_values) {
  const unsigned thread = arch::thread_idx();
  copy_rows_async<C::kCopiers>(stage.k, at.k, params.k.token, at.num_tokens, thread);
  copy_rows_async<arch::kWarpSize>(stage.v[warp_idx()], at.v, params.v.token, num_values, lane_idx());
  if constexpr (C::kOutput) {
    copy_rows_async<C::kCopiers>(stage.q, at.q, params.q.token, at.num_tokens, thread);
  }
  if constexpr (C::kOutput && C::kDelta) {
    copy_matrix_async<C::kCopiers, true>(stage.matrices, 0, params.P, at.matrix, thread);
  }
  if constexpr (C::kDelta) {
    copy_matrix_async<C::kCopiers, false>(stage.matrices, C::kLColumn, params.L, at.matrix, thread);
  }
  if (thread >= kChunk) return;
  arch::copy_4_async(&stage.G[thread], params.G + at.matrix * kChunk + thread, true);
  if constexpr (C::kDelta) {
    arch::copy_4_async(&stage.beta[thread], at.beta, static_cast<int>(thread) < at.num_tokens);
  }
}

// Whether a chunk is compensated (gated_delta.cuh): known when compiled, or asked at every step.
enum class Compensation { kNever, kAlways, kAtRunTime };

// run.template operator()<...>() for a chunk. One branch for all its steps, where registers allow two bodies: a
// branch waits for the products before it, and no fragment behind it is loaded ahead.
template <class C, class Run>
__device__ __forceinline__ void with_compensation(bool compensated, Run&& run) {
  if constexpr (!C::kDelta) {
    run.template operator()<Compensation::kNever>();
  } else if constexpr (C::kWide) {
    run.template operator()<Compensation::kAtRunTime>();
  } else if (compensated) {
    run.template operator()<Compensation::kAlways>();
  } else {
    run.template operator()<Compensation::kNever>();
  }
}

// (1) Z^T = S^T K^T if kZ, O^T = S^T Q^T if kO. Compensated: S of the first is one.
template <class C, bool kZ, bool kO, Compensation kCompensation>
__device__ __forceinline__ void read_state(Results<kChunk / 8>& Z, Results<kChunk / 8>& O,
                                           const Results<C::kKeyDim / 8>& S, const Stage<C>& stage,
                                           const Lanes<C>& lanes, bool compensated) {
  using Element = typename C::Element;
  if constexpr (kZ) set_zero(Z);
  if constexpr (kO) set_zero(O);
#pragma unroll
  for (int k = 0; k < C::kKeyDim; k += 16) {
    uint32_t s[4];
    round_to_a<Element>(s, S[k / 8], S[k / 8 + 1]);
#pragma unroll
    for (int t = 0; t < kSteps; ++t) {
      if constexpr (kZ) {
        uint32_t b[4];
        arch::ldmatrix_x4(b, fragment_row(stage.k, lanes.rows_transposed, 16 * t, k));
        multiply<Element>(Z[2 * t], Z[2 * t + 1], s, b);
      }
      if constexpr (kO) {
        uint32_t b[4];
        arch::ldmatrix_x4(b, fragment_row(stage.q, lanes.rows_transposed, 16 * t, k));
        multiply<Element>(O[2 * t], O[2 * t + 1], s, b);
      }
    }
    if constexpr (kZ && kCompensation != Compensation::kNever) {
      if (kCompensation == Compensation::kAtRunTime && !compensated) continue;
      uint32_t high[4], low[4];
      split_hi_lo<Element>(high, low, S[k / 8], S[k / 8 + 1]);
#pragma unroll
      for (int t = 0; t < kSteps; ++t) {
        uint32_t b[4];
        arch::ldmatrix_x4(b, fragment_row(stage.k, lanes.rows_transposed, 16 * t, k));
        multiply<Element>(Z[2 * t], Z[2 * t + 1], low, b);
      }
    }
  }
}

// Of a vector over the chunk, what belongs to pair i of an operand A whose columns are the 16 tokens from 16
// t on.
__device__ __forceinline__ float2 load_pair(const float (&x)[kChunk], int t, int i) {
  return *reinterpret_cast<const float2*>(&x[16 * t + i / 2 * 8 + lane_idx() % 4 * 2]);
}

// The decay from the chunk's start to such a pair of tokens, and from it to the chunk's end.
__device__ __forceinline__ float2 decay_from_start(const float (&G)[kChunk], int t, int i) {
  const float2 x = load_pair(G, t, i);
  return {arch::exp2(x.x), arch::exp2(x.y)};
}
__device__ __forceinline__ float2 decay_to_end(const float (&G)[kChunk], int t, int i) {
  const float2 x = load_pair(G, t, i);
  return {decay_between(G[kChunk - 1], x.x), decay_between(G[kChunk - 1], x.y)};
}

// (2) B^T = beta (V^T - gamma Z^T), in the place of Z^T.
template <class C>
__device__ __forceinline__ void form_residual(Results<kChunk / 8>& Z, const Stage<C>& stage) {
#pragma unroll
  for (int t = 0; t < kSteps; ++t) {
    uint32_t values[4];
    load_a_transposed(values, stage.v[warp_idx()], 0, 16 * t);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 gamma = decay_from_start(stage.G, t, i), beta = load_pair(stage.beta, t, i);
      const float2 v = arch::unpack<typename C::Element>(values[i]);
      float* z = &Z[2 * t + i / 2][i % 2 * 2];
      z[0] = beta.x * (v.x - gamma.x * z[0]);
      z[1] = beta.y * (v.y - gamma.y * z[1]);
    }
  }
}

// Block (i, t) of L, i >= t, as operand B of its transpose.
template <class C>
__device__ __forceinline__ void load_inverse(uint32_t (&high)[4], uint32_t (&low)[4], const Stage<C>& stage,
                                             const Lanes<C>& lanes, int i, int t) {
  constexpr int kColumn = C::kLColumn;
  arch::ldmatrix_x4(high, fragment_row(stage.matrices, lanes.matrices_transposed, 16 * i, kColumn + 16 * t));
  arch::ldmatrix_x4_trans(low, fragment_row(stage.matrices, lanes.matrices, 16 * t, kColumn + 16 * i));
  if (i != t) return;
  keep_triangle<true, 1>(high);
  keep_triangle<true, 1>(low);
}

// E^T, of which output and state take a step of 16 tokens at a time as a hi/lo pair, without delta as it is.
template <bool kInSmem>
struct Values;

template <>
struct Values<false> {
  Operands<kSteps> parts[2];

  __device__ explicit Values(const ValuesSmem*) {}
  template <int part>
  __device__ void set(int t, const uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) parts[part][t][i] = a[i];
  }
  template <int part>
  __device__ void get(uint32_t (&a)[4], int t) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = parts[part][t][i];
  }
};

template <>
struct Values<true> {
  uint4 (*parts)[kSteps][arch::kWarpSize];

  __device__ explicit Values(ValuesSmem* smem) : parts(smem[warp_idx()]) {}
  template <int part>
  __device__ void set(int t, const uint32_t (&a)[4]) {
    parts[part][t][lane_idx()] = {a[0], a[1], a[2], a[3]};
  }
  template <int part>
  __device__ void get(uint32_t (&a)[4], int t) const {
    const uint4 x = parts[part][t][lane_idx()];
    a[0] = x.x, a[1] = x.y, a[2] = x.z, a[3] = x.w;
  }
};

constexpr int kHigh = 0, kLow = 1;

// (3) E^T = B^T + B^T L^T; B^T is overwritten.
template <class C>
__device__ __forceinline__ void solve(Values<C::kWide>& E, Results<kChunk / 8>& B, const Stage<C>& stage,
                                      const Lanes<C>& lanes) {
  using Element = typename C::Element;
#pragma unroll
  for (int t = kSteps - 1; t >= 0; --t) {  // from the last: what goes into B_i is from B_t, t <= i
    uint32_t b_high[4], b_low[4];
    split_hi_lo<Element>(b_high, b_low, B[2 * t], B[2 * t + 1]);
#pragma unroll
    for (int i = t; i < kSteps; ++i) {
      uint32_t high[4], low[4];
      load_inverse<C>(high, low, stage, lanes, i, t);
      multiply<Element>(B[2 * i], B[2 * i + 1], b_low, high);
      multiply<Element>(B[2 * i], B[2 * i + 1], b_high, low);
      multiply<Element>(B[2 * i], B[2 * i + 1], b_high, high);
    }
  }
#pragma unroll
  for (int t = 0; t < kSteps; ++t) {
    uint32_t high[4], low[4];
    split_hi_lo<Element>(high, low, B[2 * t], B[2 * t + 1]);
    E.template set<kHigh>(t, high);
    E.template set<kLow>(t, low);
  }
}

// Without delta E is V.
template <class C>
__device__ __forceinline__ void load_values(Values<C::kWide>& E, const Stage<C>& stage) {
#pragma unroll
  for (int t = 0; t < kSteps; ++t) {
    uint32_t v[4];
    load_a_transposed(v, stage.v[warp_idx()], 0, 16 * t);
    E.template set<kHigh>(t, v);
  }
}

// Step t of (gamma_last / gamma E)^T.
template <class C>
__device__ __forceinline__ void decay_values(float2 (&x)[4], const Values<C::kWide>& E, const Stage<C>& stage,
                                             int t) {
  using Element = typename C::Element;
  uint32_t high[4], low[4];
  E.template get<kHigh>(high, t);
  if constexpr (C::kDelta) E.template get<kLow>(low, t);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[i] = arch::unpack<Element>(high[i]);
    if constexpr (C::kDelta) {
      const float2 rest = arch::unpack<Element>(low[i]);
      x[i].x += rest.x, x[i].y += rest.y;
    }
    const float2 decay = decay_to_end(stage.G, t, i);
    x[i].x *= decay.x, x[i].y *= decay.y;
  }
}

// S^T += e K for step t of the chunk.
template <class C>
__device__ __forceinline__ void add_to_state(Results<C::kKeyDim / 8>& S, const uint32_t (&e)[4],
                                             const Stage<C>& stage, const Lanes<C>& lanes, int t) {
#pragma unroll
  for (int k = 0; k < C::kKeyDim; k += 16) {
    uint32_t b[4];
    arch::ldmatrix_x4_trans(b, fragment_row(stage.k, lanes.rows, 16 * t, k));
    multiply<typename C::Element>(S[k / 8], S[k / 8 + 1], e, b);
  }
}

// (5) S^T = gamma_last S^T + (gamma_last / gamma E)^T K. Compensated: E is one here too.
template <class C, Compensation kCompensation>
__device__ __forceinline__ void update_state(Results<C::kKeyDim / 8>& S, const Values<C::kWide>& E,
                                             const Stage<C>& stage, const Lanes<C>& lanes, bool compensated) {
  using Element = typename C::Element;
  const float whole = arch::exp2(stage.G[kChunk - 1]);
#pragma unroll
  for (int k = 0; k < C::kKeyDim / 8; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) S[k][i] *= whole;
  }
#pragma unroll
  for (int t = 0; t < kSteps; ++t) {
    float2 x[4];
    decay_values<C>(x, E, stage, t);
    uint32_t high[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) high[i] = arch::pack<Element>(x[i].x, x[i].y);
    add_to_state<C>(S, high, stage, lanes, t);
    if constexpr (kCompensation != Compensation::kNever) {
      if (kCompensation == Compensation::kAtRunTime && !compensated) continue;
      uint32_t low[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) pack_hi_lo<Element>(high[i], low[i], x[i].x, x[i].y);
      add_to_state<C>(S, low, stage, lanes, t);
    }
  }
}

}  // namespace hypenet::cuda::gated_delta::scan
