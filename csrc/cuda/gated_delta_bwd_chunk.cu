// Backward of the gated delta rule and of simple GLA (kDelta = false), second of two kernels: every chunk on
// its own, between the states before it and the gradients of the states after it.
//
// Math, per value head and chunk of C tokens, in the notation of gated_delta_bwd_scan.cu; S0 the state before
// the chunk; rs and cs the sums of rows and of columns:
//   Z  = K S0        R = V - gamma Z        B = beta R                                             (1)
//   E  = T B         (without delta E = V, and only X and what follows from it is left)            (2)
//   X  = tril(dO E^T)        dA = -stril(dB E^T)                                                   (3)
//   dQ_S = s gamma (dO S0^T)        dK_S = -gamma beta (dB S0^T)        dK_S1 = gamma_C / gamma (E dS1^T) (4)
//   dV = beta dB                                                                                   (5)
//   dN = s X . Gamma     dM = beta dA . Gamma      gradients of Q K^T and K K^T                    (6)
//   dbeta = rs(R . dB) + rs(dA . Gamma . K K^T)
//   dG = rs - cs of (stril(dN) . Q K^T + dM . K K^T) + rs(Q . dQ_S) - gamma beta rs(dB . Z)
//   dg_t = sum_{i >= t} dG_i + gamma_C <S0, dS1> + sum_{i < t} rs(K . dK_S1)_i, 0 where g < -50   (7)
//   dQ = sum of dQ_S + dN K        dK = sum of dK_S + dK_S1 + dN^T Q + (dM + dM^T) K               (8)
// where the sums run over the value heads of the key head. dA so written is what -T^T (dE B^T) T^T would be,
// without its two products; dg's form never takes a small difference of large sums of different kinds.
//
// Shapes: as in GatedDeltaBwdParams (params.h). Reads everything that the first kernel wrote; dv holds dB and
// is overwritten in place, by the block that alone reads it. Writes dq, dk, dv, dg, dbeta.
//
// Mapping: a block owns one (chunk, key head), blocks numbered along x with the head fastest, and goes
// through the value heads of the group in order, and in each through its column tiles of V: (1) to (5) a
// tile, (6) to (8) a value head. dQ and dK stay in fp32 registers all the time, X and dA over the tiles of a
// head. Blocks past the last chunk leave at once. Warp w owns rows 16 (w % 4) of every product, and the (w /
// 4)-th of four equal parts of its columns.
//
// Shared memory (K = 128, bytes):      lifetime
//   q, k          [C, K]     2 x 16 K   the block; at the end dq, dk
//   T             [C, C]          8 K   a value head; T0, then T in place
//   stage[2].S0, dS1  [K, columns]  2 x 16 K   copied while the tile before is at work
//   stage[2].v    [C, columns]    8 K   likewise; V, B, E in turn; at the end of a value head dN
//   stage[2].dO   [C, columns]    8 K   likewise; at the end of a value head dM + dM^T
//   stage[2].dB   [C, columns]    8 K   likewise
//   sums                          4 K   of rows and columns of one value head: a warp's part each
//   gates, place                  1 K
// One block of 16 warps fits a processor of Ampere and of Hopper: registers allow no second one.
//
// Pipeline: copies run one tile ahead. Barriers: five a tile (before (1), after (1), around the store of E,
// before (5)), one without delta; one or two a value head. The registers are all taken: steps compute their
// addresses anew (Part), and sync_warp between steps keeps the compiler from running them into each other.
//
// Numerics: fp32 accumulation; rounded to dtype are T, B, E, dN, dM, and the outputs; R is rounded only as B.
// All factors gamma and beta of (4) multiply fp32 sums. Every exponent taken is <= 0. Sums in a fixed order:
// results are bitwise repeatable and do not depend on the batch. Tokens past the end are zero in q, k, v, dO,
// dB and beta.
//
// Cost per token and value head: 2 (4 K V + C (3 V + 5 K)) FLOPs, without delta 2 (2 K V + C (V + 3 K)).
// Bytes from and to memory: 2 (4 V + C) + 4 K V / C per token and value head, 8 K per token and key head.
//
// Limits: as of the first kernel.
#include "dtype.cuh"
#include "gated_delta_bwd.cuh"
#include "launch.cuh"

namespace hypenet::cuda {
namespace gated_delta_bwd {
namespace {

constexpr int kRowWarps = 4, kColWarps = 4;
constexpr int kThreads = kRowWarps * kColWarps * arch::kWarpSize;
constexpr int kColumns = 64;  // of V, per tile
constexpr int kChunkPart = kChunk / kColWarps;
constexpr float kLowestDecay = -50.0f;
static_assert(kRowWarps * 16 == kChunk && kColumns == kChunk);

using Square = float[1][kChunkPart / 8][4];  // a warp's part of a product [C, C] or [C, columns]
template <int K>
using Wide = float[1][K / kColWarps / 8][4];  // of a product [C, K]

// What a block works on.
struct Place {
  Sequence sequence;
  int64_t chunk, token, row;  // first token: in the batch row, and in the outputs
  int64_t value_stride;       // of a token in dv
  int key_head, group, num_tokens;
  int num_tiles;  // of V
  float scale;

  // num_tokens = 0 for a block past the last chunk.
  __device__ void find(const GatedDeltaBwdParams& params) {
    const unsigned block = arch::block_idx(), H = static_cast<unsigned>(params.H);
    key_head = static_cast<int>(block % H);
    chunk = block / H;
    group = static_cast<int>(static_cast<unsigned>(params.HV) / H);
    num_tiles = static_cast<int>(static_cast<unsigned>(params.V) / kColumns);
    const int64_t n = sequence_of_chunk(params, chunk);
    scale = static_cast<float>(params.scale);
    num_tokens = 0;
    if (n < 0) return;
    sequence = gated_delta::sequence(params, n);
    const int64_t first = (chunk - sequence.first_chunk) * kChunk;
    token = sequence.start + first;
    row = sequence.batch * params.T + token;
    value_stride = params.HV * params.V;
    num_tokens = tokens_from(sequence, first);
  }
};

// A value head of the group and a column tile of it, counted together.
struct Item {
  int number = 0, member = 0, tile = 0;

  __device__ int head(const Place& place) const { return place.key_head * place.group + member; }
  __device__ int column() const { return tile * kColumns; }
  __device__ bool ends_head(const Place& place) const { return tile + 1 == place.num_tiles; }
  __device__ Item next(const Place& place) const {
    return tile + 1 < place.num_tiles ? Item{number + 1, member, tile + 1} : Item{number + 1, member + 1, 0};
  }
};

template <class Element_, int K_, bool kDelta_>
struct Smem {
  using Element = Element_;
  static constexpr int K = K_;
  static constexpr bool kDelta = kDelta_;

  struct Stage {
    Tile<Element, K, kColumns> S0, dS1;
    Tile<Element, kChunk, kColumns> v, dO, dB;
  };
  Tile<Element, kChunk, K> q, k;
  Tile<Element, kChunk, kChunk> T;
  Stage stages[2];
  float G[2][kChunk], beta[2][kChunk];  // of two value heads in turn
  // (7), across warps
  float dbeta[kColWarps][kChunk], dG[kColWarps][kChunk], next[kColWarps][kChunk], columns[kRowWarps][kChunk];
  float states[kRowWarps * kColWarps];
  Place place;  // kept here rather than in everybody's registers
};
static_assert(sizeof(Smem<arch::bf16, 128, true>) <= 163 * 1024, "Ampere's shared memory of a block");

// Where this lane's part of a product lies. Every step asks anew: addresses that outlive a step cost more
// registers than there are.
struct Part {
  int row, lane_row;  // the warp's first row; the first of this lane's two rows, the other is 8 below
  int col_warp;

  __device__ Part() {
    const unsigned thread = fresh_thread();
    row = 16 * (thread / arch::kWarpSize % kRowWarps);
    lane_row = row + thread % arch::kWarpSize / 4;
    col_warp = thread / arch::kWarpSize / kRowWarps;
  }
  __device__ int column() const { return kChunkPart * col_warp; }  // of a product [C, C]
  template <int K>
  __device__ int wide_column() const {
    return K / kColWarps * col_warp;
  }  // of a product [C, K]
};

// sums of row lane_row + 8 half += x, of the four lanes that share it. The first of them alone touches the
// sum.
__device__ __forceinline__ void add_to_row(float (&sums)[kColWarps][kChunk], const Part& part, int half,
                                           float x) {
  const float sum = sum_row(x);
  if (lane_idx() % 4 == 0) sums[part.col_warp][part.lane_row + 8 * half] += sum;
}

// Before the first tile of a value head: every sum by the lane that will add to it.
template <class Smem>
__device__ __forceinline__ void clear_sums(Smem& sm) {
  const Part part;
  if (lane_idx() == 0) sm.states[warp_idx()] = 0;
  if (lane_idx() % 4 != 0) return;
#pragma unroll
  for (int row = part.lane_row; row < part.lane_row + 16; row += 8) {
    sm.dbeta[part.col_warp][row] = sm.dG[part.col_warp][row] = sm.next[part.col_warp][row] = 0;
  }
}

template <class Element>
__device__ __forceinline__ Element* dv_row(const GatedDeltaBwdParams& params, const Place& place,
                                           const Item& item) {
  return static_cast<Element*>(params.dv) + place.row * place.value_stride + item.head(place) * params.V +
         item.column();
}

// T0 and the gates of the item's value head
template <class Smem>
__device__ __forceinline__ void copy_head_async(Smem& sm, const GatedDeltaBwdParams& params,
                                                const Place& place, const Item& item) {
  using Element = typename Smem::Element;
  const int head = item.head(place), parity = item.member % 2;
  if constexpr (Smem::kDelta) {
    const int64_t offset = (place.chunk * params.HV + head) * kChunk * kChunk;
    copy_tile_async<kThreads>(sm.T, static_cast<const Element*>(params.T0) + offset, kChunk, kChunk,
                              fresh_thread());
  }
  copy_gates_async<Smem::kDelta>(sm.G[parity], sm.beta[parity], params, place.chunk, head,
                                 place.sequence.batch, place.token, place.num_tokens);
}

template <class Smem>
__device__ __forceinline__ void copy_stage_async(Smem& sm, const GatedDeltaBwdParams& params,
                                                 const Place& place, const Item& item) {
  using Element = typename Smem::Element;
  auto& stage = sm.stages[item.number % 2];
  const int thread = fresh_thread(), head = item.head(place), column = item.column();
  const int64_t batch = place.sequence.batch, V = params.V;
  const int64_t state = (place.chunk * params.HV + head) * Smem::K * V + column;
  copy_tile_async<kThreads>(stage.S0, static_cast<const Element*>(params.h) + state, V, Smem::K, thread);
  copy_tile_async<kThreads>(stage.v, row_of<Element>(params.v, batch, place.token, head) + column,
                            params.v.token, place.num_tokens, thread);
  if constexpr (Smem::kDelta) {
    copy_tile_async<kThreads>(stage.dB, dv_row<Element>(params, place, item), place.value_stride,
                              place.num_tokens, thread);
  }
  copy_tile_async<kThreads>(stage.dO, row_of<Element>(params.do_, batch, place.token, head) + column,
                            params.do_.token, place.num_tokens, thread);
  copy_tile_async<kThreads>(stage.dS1, static_cast<const Element*>(params.dstates) + state, V, Smem::K,
                            thread);
}

template <class Smem>
__device__ __forceinline__ void copy_key_head_async(Smem& sm, const GatedDeltaBwdParams& params,
                                                    const Place& place) {
  using Element = typename Smem::Element;
  const int64_t batch = place.sequence.batch;
  copy_tile_async<kThreads>(sm.k, row_of<Element>(params.k, batch, place.token, place.key_head),
                            params.k.token, place.num_tokens, fresh_thread());
  copy_tile_async<kThreads>(sm.q, row_of<Element>(params.q, batch, place.token, place.key_head),
                            params.q.token, place.num_tokens, fresh_thread());
}

// (1) Z, R; B in place of V
template <class Smem>
__device__ __forceinline__ void form_residual(Smem& sm, typename Smem::Stage& stage, const float (&G)[kChunk],
                                              const float (&beta)[kChunk]) {
  using Element = typename Smem::Element;
  const Part part;
  const int col = part.column();
  Square rZ;
  set_zero(rZ);
  multiply_in_pairs<Element, Smem::K>(
      rZ, [&](auto& a, int m, int k) { load_a(a, sm.k, part.row + m, k); },
      [&](auto& b, int k, int n) { load_b(b, stage.S0, k, col + n); });
  arch::sync_warp();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = part.lane_row + 8 * half;
    const float gamma = arch::exp2(G[row]), factor = beta[row];
    float dbeta = 0, dG = 0;
#pragma unroll
    for (int n = 0; n < kChunkPart / 8; ++n) {
      const int lane_col = col + 8 * n + lane_idx() % 4 * 2;
      auto* pair = reinterpret_cast<uint32_t*>(stage.v.at(row, lane_col));
      const float2 v = arch::unpack<Element>(*pair);
      const float2 dB = arch::unpack<Element>(*reinterpret_cast<uint32_t*>(stage.dB.at(row, lane_col)));
      const float z[2] = {gamma * rZ[0][n][2 * half], gamma * rZ[0][n][2 * half + 1]};
      const float r[2] = {v.x - z[0], v.y - z[1]};
      dbeta += r[0] * dB.x + r[1] * dB.y;
      dG -= factor * (z[0] * dB.x + z[1] * dB.y);
      *pair = arch::pack<Element>(factor * r[0], factor * r[1]);
    }
    add_to_row(sm.dbeta, part, half, dbeta);
    add_to_row(sm.dG, part, half, dG);
  }
}

// (2) E in place of B; afterwards T is free
template <class Smem, class Release>
__device__ __forceinline__ void form_pseudo_values(Smem& sm, typename Smem::Stage& stage,
                                                   Release&& release_T) {
  const Part part;
  const int col = part.column();
  Square rE;
  set_zero(rE);
  multiply_in_pairs<typename Smem::Element, kChunk>(
      rE, [&](auto& a, int m, int k) { load_a(a, sm.T, part.row + m, k); },
      [&](auto& b, int k, int n) { load_b(b, stage.v, k, col + n); });
  arch::sync_block();
  release_T();
  store_product(stage.v, part.row, col, rE);
  arch::sync_block();
}

// (3) product += from E^T
template <class Element, class Tile>
__device__ __forceinline__ void multiply_by_pseudo_values(Square& product, const Tile& from, const Tile& E) {
  arch::sync_warp();
  const Part part;
  const int col = part.column();
  multiply_in_pairs<Element, kColumns>(
      product, [&](auto& a, int m, int k) { load_a(a, from, part.row + m, k); },
      [&](auto& b, int k, int n) { load_b_transposed(b, E, k, col + n); });
}

// (4) total += factor . (from state^T); dots += rs(x . that), of this lane's part
template <bool kDots, class Smem, class From, class State, class X, class Factor>
__device__ __forceinline__ void through_state(Wide<Smem::K>& total, const From& from, const State& state,
                                              const X& x, Factor&& factor, float (&dots)[kColWarps][kChunk]) {
  using Element = typename Smem::Element;
  arch::sync_warp();
  const Part part;
  const int col = part.template wide_column<Smem::K>();
  Wide<Smem::K> product;
  set_zero(product);
  multiply_in_pairs<Element, kColumns>(
      product, [&](auto& a, int m, int k) { load_a(a, from, part.row + m, k); },
      [&](auto& b, int k, int n) { load_b_transposed(b, state, k, col + n); });
  arch::sync_warp();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = part.lane_row + 8 * half;
    const float by = factor(row);
    float dot = 0;
#pragma unroll
    for (int n = 0; n < Smem::K / kColWarps / 8; ++n) {
      const float y[2] = {by * product[0][n][2 * half], by * product[0][n][2 * half + 1]};
      total[0][n][2 * half] += y[0], total[0][n][2 * half + 1] += y[1];
      if constexpr (kDots) {
        const auto* pair = reinterpret_cast<const uint32_t*>(x.at(row, col + 8 * n + lane_idx() % 4 * 2));
        const float2 other = arch::unpack<Element>(*pair);
        dot += y[0] * other.x + y[1] * other.y;
      }
    }
    if constexpr (kDots) add_to_row(dots, part, half, dot);
  }
}

// Adds to this warp's part of <S0, dS1>.
template <class Smem>
__device__ __forceinline__ void dot_states(Smem& sm, const typename Smem::Stage& stage) {
  using Element = typename Smem::Element;
  arch::sync_warp();
  float sum = 0;
  for_each_piece<kThreads, Tile<Element, Smem::K, kColumns>>(fresh_thread(), [&](int, int row, int col) {
    const uint4 x = arch::load_16_bytes(stage.S0.at(row, col)),
                y = arch::load_16_bytes(stage.dS1.at(row, col));
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
__device__ __forceinline__ void store_dv(typename Smem::Stage& stage, const GatedDeltaBwdParams& params,
                                         const Place& place, const Item& item, const float (&beta)[kChunk]) {
  using Element = typename Smem::Element;
  const int thread = fresh_thread();
  scale_rows<kThreads>(stage.dB, stage.dB, [&](int row) { return beta[row]; });  // a thread's own pieces
  store_tile<kThreads>(dv_row<Element>(params, place, item), place.value_stride, place.num_tokens, stage.dB,
                       thread);
}

// (6) gradient -> factor of the row . gradient . Gamma, below the diagonal (or on it too). Of that times x
// K^T below the diagonal, columns += cs, and row_sum(half, rs without the factor), of this lane's part.
template <bool kDiagonal, class Smem, class X, class Factor, class RowSum>
__device__ __forceinline__ void through_product(Square& gradient, const X& x, Smem& sm,
                                                const float (&G)[kChunk], Factor&& factor, RowSum&& row_sum,
                                                float (&columns)[kChunkPart / 8][2]) {
  const Part part;
  const int col = part.column();
  Square product;
  set_zero(product);
  multiply_in_pairs<typename Smem::Element, Smem::K>(
      product, [&](auto& a, int m, int k) { load_a(a, x, part.row + m, k); },
      [&](auto& b, int k, int n) { load_b_transposed(b, sm.k, k, col + n); });
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
    row_sum(part, half, by, sum);
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
  const float from_start = states + sum_of_lanes_below(next[0] + next[1]);
  const float dG[2] = {sum_parts(sm.dG, late) - sum_parts(sm.columns, late),
                       sum_parts(sm.dG, late - 1) - sum_parts(sm.columns, late - 1)};
  const float from_end = sum_of_lanes_below(dG[0] + dG[1]) + dG[0];
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
    static_cast<float*>(params.dg)[to + row * params.HV] = g < kLowestDecay ? 0.0f : dg[i];
    if constexpr (Smem::kDelta) {
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

// (8) dQ += dN K, dK += dN^T Q + (dM + dM^T) K
template <class Smem, class Tile>
__device__ __forceinline__ void through_key_head(Smem& sm, const Tile& dN, const Tile& dM, Wide<Smem::K>& rdQ,
                                                 Wide<Smem::K>& rdK) {
  using Element = typename Smem::Element;
  const Part part;
  const int col = part.template wide_column<Smem::K>();
  const auto load_k = [&](auto& b, int k, int n) { load_b(b, sm.k, k, col + n); };
  multiply_in_pairs<Element, kChunk>(
      rdQ, [&](auto& a, int m, int k) { load_a(a, dN, part.row + m, k); }, load_k);
  multiply_in_pairs<Element, kChunk>(
      rdK, [&](auto& a, int m, int k) { load_a_transposed(a, dN, part.row + m, k); },
      [&](auto& b, int k, int n) { load_b(b, sm.q, k, col + n); });
  if constexpr (Smem::kDelta) {
    multiply_in_pairs<Element, kChunk>(
        rdK, [&](auto& a, int m, int k) { load_a(a, dM, part.row + m, k); }, load_k);
  }
}

// (1) to (4) of one column tile
template <class Smem, class Release>
__device__ __forceinline__ void add_tile(Smem& sm, typename Smem::Stage& stage, const float (&G)[kChunk],
                                         const float (&beta)[kChunk], Square& rX, Square& rdA,
                                         Wide<Smem::K>& rdQ, Wide<Smem::K>& rdK, Release&& release_T) {
  using Element = typename Smem::Element;
  if constexpr (Smem::kDelta) {
    form_residual(sm, stage, G, beta);  // (1)
    arch::sync_block();
    form_pseudo_values(sm, stage, release_T);                    // (2)
    multiply_by_pseudo_values<Element>(rdA, stage.dB, stage.v);  // (3)
  } else {
    release_T();
  }
  multiply_by_pseudo_values<Element>(rX, stage.dO, stage.v);
  through_state<true, Smem>(
      rdQ, stage.dO, stage.S0, sm.q, [&](int row) { return sm.place.scale * arch::exp2(G[row]); },
      sm.dG);  // (4)
  if constexpr (Smem::kDelta) {
    through_state<false, Smem>(
        rdK, stage.dB, stage.S0, sm.k, [&](int row) { return -arch::exp2(G[row]) * beta[row]; }, sm.dG);
  }
  through_state<true, Smem>(
      rdK, stage.v, stage.dS1, sm.k, [&](int row) { return decay_between(G, kChunk - 1, row); }, sm.next);
  dot_states(sm, stage);
}

// (6) to (8) of one value head, dN and dM in tiles that nobody reads any more
template <class Smem, class Tile>
__device__ __forceinline__ void finish_head(Smem& sm, Tile& dN, Tile& dM, const GatedDeltaBwdParams& params,
                                            const Place& place, int head, const float (&G)[kChunk],
                                            const float (&beta)[kChunk], Square& rX, Square& rdA,
                                            Wide<Smem::K>& rdQ, Wide<Smem::K>& rdK) {
  float columns[kChunkPart / 8][2] = {};
  through_product<true>(
      rX, sm.q, sm, G, [&](int) { return place.scale; },
      [&](const Part& part, int half, float by, float sum) { add_to_row(sm.dG, part, half, by * sum); },
      columns);  // (6)
  store_product(dN, Part().row, Part().column(), rX);
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
  through_key_head(sm, dN, dM, rdQ, rdK);                                             // (8)
}

template <class Smem>
__device__ __forceinline__ void store_key_head(Smem& sm, const GatedDeltaBwdParams& params,
                                               const Place& place, const Wide<Smem::K>& rdQ,
                                               const Wide<Smem::K>& rdK) {
  using Element = typename Smem::Element;
  const Part part;
  const int col = part.template wide_column<Smem::K>(), thread = fresh_thread();
  arch::sync_block();
  store_product(sm.q, part.row, col, rdQ);
  store_product(sm.k, part.row, col, rdK);
  arch::sync_block();
  const int64_t to = (place.row * params.H + place.key_head) * Smem::K, stride = params.H * Smem::K;
  store_tile<kThreads>(static_cast<Element*>(params.dq) + to, stride, place.num_tokens, sm.q, thread);
  store_tile<kThreads>(static_cast<Element*>(params.dk) + to, stride, place.num_tokens, sm.k, thread);
}

template <class Smem>
__global__ void __launch_bounds__(kThreads, 1)
    chunk_kernel(const __grid_constant__ GatedDeltaBwdParams params) {
  Smem& sm = arch::shared_memory<Smem>();
  if (arch::thread_idx() == 0) sm.place.find(params);
  arch::sync_block();
  const Place& place = sm.place;
  if (place.num_tokens == 0) return;
  copy_key_head_async(sm, params, place);
  copy_head_async(sm, params, place, Item{});
  copy_stage_async(sm, params, place, Item{});
  arch::commit_copies();
  Wide<Smem::K> rdQ, rdK;
  Square rX, rdA;
  set_zero(rdQ), set_zero(rdK);
  for (Item item; item.member < place.group; item = item.next(place)) {
    auto& stage = sm.stages[item.number % 2];
    const auto &G = sm.G[item.member % 2], &beta = sm.beta[item.member % 2];
    arch::wait_copies<0>();
    arch::sync_block();
    if (const Item next = item.next(place); next.member < place.group)
      copy_stage_async(sm, params, place, next);
    if (item.tile == 0) {
      clear_sums(sm);
      set_zero(rX), set_zero(rdA);
      if constexpr (Smem::kDelta) apply_decay<kThreads>(sm.T, G);
    }
    const auto copy_next_head = [&] {
      const Item next = item.next(place);
      if (next.tile == 0 && next.member < place.group) copy_head_async(sm, params, place, next);
      arch::commit_copies();
    };
    add_tile(sm, stage, G, beta, rX, rdA, rdQ, rdK, copy_next_head);
    if (Smem::kDelta || item.ends_head(place)) arch::sync_block();
    if constexpr (Smem::kDelta) store_dv<Smem>(stage, params, place, item, beta);  // (5)
    if (item.ends_head(place)) {
      finish_head(sm, stage.v, stage.dO, params, place, item.head(place), G, beta, rX, rdA, rdQ, rdK);
    }
  }
  store_key_head(sm, params, place, rdQ, rdK);
}

template <class Smem>
Status launch_chunks(const GatedDeltaBwdParams& params, Stream stream) {
  return launch("gated_delta_bwd_chunk", chunk_kernel<Smem>, params.num_chunks * params.H, kThreads,
                sizeof(Smem), stream, params);
}

}  // namespace

Status finish(const GatedDeltaBwdParams& params, Stream stream) {
  return dispatch_half_dtype(params.dtype, [&]<class Element>() -> Status {
    return dispatch_key_dim(params.K, [&]<int K>() -> Status {
      return params.delta ? launch_chunks<Smem<Element, K, true>>(params, stream)
                          : launch_chunks<Smem<Element, K, false>>(params, stream);
    });
  });
}

}  // namespace gated_delta_bwd
}  // namespace hypenet::cuda
