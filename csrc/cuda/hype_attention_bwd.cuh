// HyPE attention, backward: dq, dk, dv and the gate's gradient, from lse and the output before the gate.
//
// Math, with x_ti, c_p and lse as in hype_attention_fwd.cuh, z = sigmoid(gate), do the gradient of o:
//   do'_t = do_t z_t,  dgate_t = do_t o_ungated_t z_t (1 - z_t),  delta_t = do'_t . o_ungated_t
//   P_ti = 2^(x_ti - lse_t log2 e),  dP_ti = do'_t . v_i,  dX_ti = P_ti (c_p dP_ti - c_p delta_t)
//   dv_i = sum_t P_ti do'_t,  dk_i = ln 2 sum_t dX_ti q_t,  dq_t = ln 2 sum_i dX_ti k_i
// dk and dv sum over the query heads of the group as well.
//
// Shapes: HypeAttentionBwdParams (params.h). Workspace: do_ungated = do' [B, T, H, D], only with a gate, and
// row_terms [3][B, H, T]: c_p, lse log2 e, c_p delta.
//
// Mapping: three kernels, one after another.
//   (1) prepare: D / 8 neighbouring threads own a row (t, head): do', dgate, row_terms.
//   (2) keys: a block owns kRows keys of a key head and takes the tiles of kStreamed queries that see them,
//       head by head of the group. A warp owns 16 keys and takes S^T = K Q^T, so that P^T and dX^T in its
//       registers are at once the left operands of dV = P^T dO' and dK = dX^T Q: no product passes through
//       shared memory.
//   (3) queries: a block owns kRows queries of a head and takes the tiles of keys that they see, a warp 16.
// Longest blocks first; heads are neighbours. With cu_seqlens a block finds its sequence by bisection; rows after the
// last one get zeros.
//
// Shared memory of (2) and (3):
//   owned     [2][kRows, D]               K and V, or Q and dO'; at last each warp's rows of the output
//   streamed  [kStages][2][kStreamed, D]  Q and dO', or K and V
//   terms     [kStages][3][kStreamed]     (2) row_terms of the streamed queries
//   place     1                           (2) what the block owns, out of the way of the products' registers
// 130 KB at D = 128 and 256: one block per SM, of 8 or 4 warps. At D = 256, (2) runs for dv, then for
// dk.
//
// Pipeline: while a tile is multiplied, the next is under way into the other stage; one barrier a tile.
//
// Numerics: products and sums in fp32. do', P and dX are rounded once, for their products; delta is taken of
// the rounded do', so that it cancels dP as far as it should. c_p multiplies in fp32. The future is masked
// before the exponential, and x - lse <= 0 but for rounding. No atomics: every sum has one order, whatever
// the batch.
//
// Cost: (2) 8 D, at D = 256 10 D, and (3) 6 D FLOPs per visible (query, key) pair: compute bound. That (3)
// takes S and dP anew is the price of sums in one order.
//
// Limits: as in the forward.
#pragma once

#include <limits>

#include "arch/sm80.cuh"
#include "hype_attention.cuh"
#include "tile.cuh"

namespace hypenet::cuda::attention::bwd {

// kStreamed: queries or keys of a tile that a block takes, of those it does not own.
template <int D_, int kStreamed_ = D_ == 256 ? 32 : 64>
struct Shape {
  static constexpr int D = D_, kStreamed = kStreamed_;
  static constexpr int kRows = D == 256 ? 64 : 128;  // keys or queries that a block owns
  static constexpr int kThreads = kRows / 16 * arch::kWarpSize;
  static constexpr bool kApart = D == 256;  // dv, then dk: registers hold one of them
  static constexpr int kStages = 2;
  static constexpr int kPrepareThreads = 256;
  static constexpr int kPrepareRows = kPrepareThreads / (D / kPiece);
  static_assert(3 * kStreamed <= kThreads && arch::kWarpSize % (D / kPiece) == 0);
};

enum Term { kFactor, kLse, kDelta, kNumTerms };

// Keys from row `begin` of a sequence on, and the tiles of queries that see them: [first_tile, end_tile) of
// the heads [first_head, end_head).
struct Place {
  Sequence sequence;
  int begin, key_head, first_tile, end_tile, first_head, end_head;
};

template <class Element, class Shape>
struct Smem {
  Tile<Element, Shape::kRows, Shape::D> owned[2];
  Tile<Element, Shape::kStreamed, Shape::D> streamed[Shape::kStages][2];
  float terms[Shape::kStages][kNumTerms][Shape::kStreamed];
  Place place;
};
static_assert(sizeof(Smem<arch::bf16, Shape<64>>) < 67 * 1024);
static_assert(sizeof(Smem<arch::bf16, Shape<128>>) < 131 * 1024);
static_assert(sizeof(Smem<arch::bf16, Shape<256>>) < 131 * 1024);

using Params = HypeAttentionBwdParams;

struct Arguments {
  Params params;
  LogitScale logit_scale;
  unsigned num_slots;  // tiles of keys or queries per head
};

// NVRTC up to 12.8 crashes where kColumns is made of a local constant of a function; Shape::D will do.
template <int kColumns>
using Result = float[1][kColumns][4];

// do' as the main kernels read it: do itself without gate.
template <int D>
__device__ __forceinline__ View do_ungated(const Params& p) {
  return p.gate.data == nullptr ? p.do_ : View{p.do_ungated, p.T * p.H * D, p.H * D, D};
}

// Row term number `term` of a head, from row `first` of `batch` on.
__device__ __forceinline__ float* row_terms(const Params& p, int term, int64_t batch, int64_t head,
                                            int64_t first) {
  return static_cast<float*>(p.row_terms) + ((term * p.B + batch) * p.H + head) * p.T + first;
}

// ---- (1)

__device__ __forceinline__ int position_of(const Params& p, int64_t t) {
  if (p.cu_seqlens == nullptr) return static_cast<int>(p.query_offset + t);
  const int64_t n = last_at_most(p.N, t, [&](int64_t i) { return bound(p, i); });
  return static_cast<int>(t) - bound(p, n);
}

template <class Element>
union Pack {
  uint4 bytes;
  uint32_t pairs[kPiece / 2];
};

// do z, rounded, and dgate of one piece of a row; returns the piece's part of delta.
template <class Element>
__device__ __forceinline__ float open_gate(const Pack<Element>& grad, const Pack<Element>& o,
                                           const Pack<Element>& gate, bool gated, Pack<Element>& grad_ungated,
                                           Pack<Element>& dgate) {
  float delta = 0;
#pragma unroll
  for (int i = 0; i < kPiece / 2; ++i) {
    const float2 x = arch::unpack<Element>(grad.pairs[i]), y = arch::unpack<Element>(o.pairs[i]);
    float2 ungated = x;
    if (gated) {
      const float2 logit = arch::unpack<Element>(gate.pairs[i]);
      const float2 z = {sigmoid(logit.x), sigmoid(logit.y)};
      dgate.pairs[i] = arch::pack<Element>(x.x * y.x * z.x * (1.0f - z.x), x.y * y.y * z.y * (1.0f - z.y));
      grad_ungated.pairs[i] = arch::pack<Element>(x.x * z.x, x.y * z.y);
      ungated = arch::unpack<Element>(grad_ungated.pairs[i]);
    }
    delta += ungated.x * y.x + ungated.y * y.y;
  }
  return delta;
}

template <class Shape, class Element>
__global__ void __launch_bounds__(Shape::kPrepareThreads, 4)
    hype_attention_bwd_prepare_kernel(const __grid_constant__ Arguments arguments) {
  constexpr int D = Shape::D, kLanes = D / kPiece;
  const Params& p = arguments.params;
  const unsigned thread = arch::thread_idx(), col = thread % kLanes * kPiece;
  const int64_t num_rows = p.B * p.T * p.H;
  const int64_t wanted = static_cast<int64_t>(arch::block_idx()) * Shape::kPrepareRows + thread / kLanes;
  const int64_t row = wanted < num_rows ? wanted : num_rows - 1;  // every lane takes part in the shuffles
  const int64_t head = row % p.H, t = row / p.H % p.T, batch = row / p.H / p.T;

  const bool gated = p.gate.data != nullptr;
  Pack<Element> grad, o, gate{}, grad_ungated, dgate;
  grad.bytes = arch::load_16_bytes(row_of<Element>(p.do_, batch, t, head) + col);
  o.bytes = arch::load_16_bytes(static_cast<const Element*>(p.o_ungated) + row * D + col);
  if (gated) gate.bytes = arch::load_16_bytes(row_of<Element>(p.gate, batch, t, head) + col);
  float delta = open_gate<Element>(grad, o, gate, gated, grad_ungated, dgate);
#pragma unroll
  for (int mask = 1; mask < kLanes; mask *= 2) delta += arch::shuffle_xor(delta, mask);

  if (row != wanted) return;
  if (gated) {
    arch::store_16_bytes(static_cast<Element*>(p.do_ungated) + row * D + col, grad_ungated.bytes);
    const bool is_tail = p.cu_seqlens != nullptr && t >= p.cu_seqlens[p.N];
    arch::store_16_bytes(static_cast<Element*>(p.dgate) + row * D + col,
                         is_tail ? uint4{0, 0, 0, 0} : dgate.bytes);
  }
  if (col == 0) {
    const float factor = arguments.logit_scale(position_of(p, t));
    *row_terms(p, kFactor, batch, head, t) = factor;
    *row_terms(p, kLse, batch, head, t) =
        static_cast<const float*>(p.lse)[(batch * p.H + head) * p.T + t] * kLog2E;
    *row_terms(p, kDelta, batch, head, t) = factor * delta;
  }
}

// ---- (2) and (3)

// One pair: S becomes P, dP becomes dX. `hidden`: the key is after the query.
__device__ __forceinline__ void differentiate(float& S, float& dP, bool hidden, float factor, float lse,
                                              float delta) {
  S = arch::exp2(hidden ? -kInfinity : fmaf(S, factor, -lse));
  dP = S * fmaf(dP, factor, -delta);
}

// The same for a tile [keys, queries]; with kMasked, query `col` sees key `row` only where col >= first +
// row.
template <bool kMasked, int kColumns>
__device__ __forceinline__ void differentiate_keys(Result<kColumns>& S, Result<kColumns>& dP, int first,
                                                   const float (&terms)[kNumTerms][8 * kColumns]) {
  const int row = lane_idx() / 4;
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    const int col = 8 * j + lane_idx() % 4 * 2;
    float2 pair[kNumTerms];
#pragma unroll
    for (int term = 0; term < kNumTerms; ++term)
      pair[term] = *reinterpret_cast<const float2*>(&terms[term][col]);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const bool hidden = kMasked && col + e % 2 < first + row + e / 2 * 8;
      differentiate(S[0][j][e], dP[0][j][e], hidden, e % 2 ? pair[kFactor].y : pair[kFactor].x,
                    e % 2 ? pair[kLse].y : pair[kLse].x, e % 2 ? pair[kDelta].y : pair[kDelta].x);
    }
  }
}

// The same for a tile [queries, keys]; with kMasked, query `row` sees only the keys [0, visible + row).
template <bool kMasked, int kColumns>
__device__ __forceinline__ void differentiate_queries(Result<kColumns>& S, Result<kColumns>& dP, int visible,
                                                      const float (&terms)[kNumTerms][2]) {
  const int row = lane_idx() / 4;
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    const int col = 8 * j + lane_idx() % 4 * 2;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const bool hidden = kMasked && col + e % 2 >= visible + row + e / 2 * 8;
      differentiate(S[0][j][e], dP[0][j][e], hidden, terms[kFactor][e / 2], terms[kLse][e / 2],
                    terms[kDelta][e / 2]);
    }
  }
}

template <int kColumns>
__device__ __forceinline__ void scale_by(Result<kColumns>& x, float factor) {
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) x[0][j][e] *= factor;
  }
}

// Starts the copies of rows [start, start + rows of a tile) of two matrices of one head into two tiles.
template <int kThreads, class Tile>
__device__ __forceinline__ void copy_rows(Tile (&tiles)[2], const View& x, const View& y, const Sequence& s,
                                          int64_t head, int start, int end) {
  using Element = typename Tile::Element;
  copy_tile_async<kThreads>(tiles[0], row_of<Element>(x, s.batch, s.first + start, head), x.token,
                            end - start, arch::thread_idx());
  copy_tile_async<kThreads>(tiles[1], row_of<Element>(y, s.batch, s.first + start, head), y.token,
                            end - start, arch::thread_idx());
}

// (2)
template <class Shape>
__device__ __forceinline__ Place find_keys(const Params& p) {
  const auto HK = static_cast<unsigned>(p.HK);
  const int group = static_cast<int>(p.H / p.HK);
  Place place;
  const Sequence& s = place.sequence = find_tile<Shape::kRows>(p, arch::block_idx() / HK, place.begin);
  place.key_head = static_cast<int>(arch::block_idx() % HK);
  place.first_tile = place.begin > s.offset ? (place.begin - s.offset) / Shape::kStreamed : 0;
  place.end_tile = (s.T + Shape::kStreamed - 1) / Shape::kStreamed;
  place.first_head = place.key_head * group;
  place.end_head = place.first_head + group;
  return place;
}

enum class Gradient { kKeysAndValues, kKeys, kValues };

template <class Shape_, class Element_, Gradient kGradient_>
struct KeysConfig {
  using Shape = Shape_;
  using Element = Element_;
  static constexpr Gradient kGradient = kGradient_;
};

template <class C>
__global__ void __launch_bounds__(C::Shape::kThreads, 1)
    hype_attention_bwd_keys_kernel(const __grid_constant__ Arguments arguments) {
  using Shape = typename C::Shape;
  using Element = typename C::Element;
  constexpr Gradient kGradient = C::kGradient;
  constexpr int D = Shape::D, kStreamed = Shape::kStreamed, kThreads = Shape::kThreads;
  constexpr bool kWithKeys = kGradient != Gradient::kValues, kWithValues = kGradient != Gradient::kKeys;
  if (sizeof(Smem<Element, Shape>) > arch::kMaxSharedBytes) return;  // no GPU that runs this has it
  auto& smem = arch::shared_memory<Smem<Element, Shape>>();
  const Params& p = arguments.params;

  // (2.1) the keys and values, the first queries
  const Place found = find_keys<Shape>(p);
  if (found.sequence.is_tail) {
    const int64_t first = found.sequence.first + found.begin;
    if constexpr (kWithKeys)
      zero_rows<Shape::kRows, kThreads, D, Element>(p.dk, p.S, p.HK, found.key_head, first);
    if constexpr (kWithValues)
      zero_rows<Shape::kRows, kThreads, D, Element>(p.dv, p.S, p.HK, found.key_head, first);
    return;
  }
  if (found.begin >= found.sequence.S) return;
  if (arch::thread_idx() == 0) smem.place = found;
  arch::sync_block();
  const Place& place = smem.place;
  const Sequence& s = place.sequence;
  const auto copy_queries = [&](int stage, int head, int tile) {
    const int start = tile * kStreamed;
    copy_rows<kThreads>(smem.streamed[stage], p.q, do_ungated<D>(p), s, head, start, s.T);
    const unsigned thread = arch::thread_idx();
    const int term = thread / kStreamed, row = thread % kStreamed;
    if (term < kNumTerms) {
      const float* from = row_terms(p, term, s.batch, head, s.first + start) + row;
      arch::copy_4_async(&smem.terms[stage][term][row], from, start + row < s.T);
    }
  };
  copy_rows<kThreads>(smem.owned, p.k, p.v, s, place.key_head, place.begin, s.S);
  copy_queries(0, place.first_head, place.first_tile);
  arch::commit_copies();

  const int m = warp_idx() * 16;
  Result<Shape::D / 8> dk = {}, dv = {};
  int stage = 0, tile = place.first_tile, head = place.first_head;
  while (head < place.end_head) {
    // (2.2) this tile is there, the next one starts
    arch::wait_copies<0>();
    arch::sync_block();
    const int first = place.begin + m - s.offset - tile * kStreamed;  // query that sees the warp's first key
    if (++tile == place.end_tile) tile = place.first_tile, ++head;
    if (head < place.end_head) copy_queries(1 - stage, head, tile);
    arch::commit_copies();

    if (first < kStreamed && place.begin + m < s.S) {
      // (2.3) S^T = K Q^T, dP^T = V dO'^T, and from them P^T and dX^T
      Result<Shape::kStreamed / 8> S = {}, dP = {};
      const auto& [queries, grads] = smem.streamed[stage];
      multiply_transposed(S, smem.owned[0], m, queries);
      if constexpr (kWithKeys) multiply_transposed(dP, smem.owned[1], m, grads);
      if (first + 15 > 0) {
        differentiate_keys<true>(S, dP, first, smem.terms[stage]);
      } else {
        differentiate_keys<false>(S, dP, first, smem.terms[stage]);
      }

      // (2.4) dV += P^T dO', dK += dX^T Q
      if constexpr (kWithValues) multiply_result(dv, S, grads);
      if constexpr (kWithKeys) multiply_result(dk, dP, queries);
    }
    stage = 1 - stage;
  }

  // (2.5) the output
  const int row = s.first + place.begin + m, num_rows = s.S - place.begin - m;
  if constexpr (kWithKeys) {
    scale_by(dk, kLn2);
    store_rows(contiguous_row<D, Element>(p.dk, p.S, p.HK, s.batch, row, place.key_head), p.HK * D, num_rows,
               smem.owned[0], m, dk);
  }
  if constexpr (kWithValues) {
    store_rows(contiguous_row<D, Element>(p.dv, p.S, p.HK, s.batch, row, place.key_head), p.HK * D, num_rows,
               smem.owned[1], m, dv);
  }
}

// (3)
template <class Shape, class Element>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    hype_attention_bwd_queries_kernel(const __grid_constant__ Arguments arguments) {
  constexpr int D = Shape::D, kStreamed = Shape::kStreamed, kThreads = Shape::kThreads;
  if (sizeof(Smem<Element, Shape>) > arch::kMaxSharedBytes) return;  // no GPU that runs this has it
  auto& smem = arch::shared_memory<Smem<Element, Shape>>();
  const Params& p = arguments.params;
  const int H = static_cast<int>(p.H), head = static_cast<int>(arch::block_idx()) % H;
  const int key_head = head / (H / static_cast<int>(p.HK));
  int begin;
  const Sequence s = find_tile<Shape::kRows>(p, arguments.num_slots - 1 - arch::block_idx() / H, begin);
  if (s.is_tail) return zero_rows<Shape::kRows, kThreads, D, Element>(p.dq, p.T, H, head, s.first + begin);
  if (begin >= s.T) return;

  // (3.1) the queries, and the keys that they see: tiles [0, num_tiles)
  const int end = begin + Shape::kRows < s.T ? begin + Shape::kRows : s.T;
  const int num_tiles = (s.offset + end - 1) / kStreamed + 1;
  copy_rows<kThreads>(smem.owned, p.q, do_ungated<D>(p), s, head, begin, s.T);
  copy_rows<kThreads>(smem.streamed[0], p.k, p.v, s, key_head, 0, s.S);
  arch::commit_copies();
  const int m = warp_idx() * 16, position = s.offset + begin + m, num_rows = s.T - begin - m;
  float terms[kNumTerms][2];
#pragma unroll
  for (int term = 0; term < kNumTerms; ++term) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m + 8 * half + lane_idx() / 4;
      terms[term][half] = begin + row < s.T ? row_terms(p, term, s.batch, head, s.first + begin)[row] : 0.0f;
    }
  }

  Result<Shape::D / 8> dq = {};
  for (int tile = 0; tile < num_tiles; ++tile) {
    // (3.2) this tile is there, the next one starts
    arch::wait_copies<0>();
    arch::sync_block();
    const int stage = tile % Shape::kStages, next = tile + 1;
    if (next < num_tiles)
      copy_rows<kThreads>(smem.streamed[1 - stage], p.k, p.v, s, key_head, next * kStreamed, s.S);
    arch::commit_copies();

    // (3.3) S = Q K^T, dP = dO' V^T, and from them dX
    const int visible = position + 1 - tile * kStreamed;
    if (visible + 15 > 0 && num_rows > 0) {
      Result<Shape::kStreamed / 8> S = {}, dP = {};
      const auto& [keys, values] = smem.streamed[stage];
      multiply_transposed(S, smem.owned[0], m, keys);
      multiply_transposed(dP, smem.owned[1], m, values);
      if (visible < kStreamed) {
        differentiate_queries<true>(S, dP, visible, terms);
      } else {
        differentiate_queries<false>(S, dP, visible, terms);
      }

      // (3.4) dQ += dX K
      multiply_result(dq, dP, keys);
    }
  }

  // (3.5) the output
  scale_by(dq, kLn2);
  store_rows(contiguous_row<D, Element>(p.dq, p.T, p.H, s.batch, s.first + begin + m, head), p.H * D,
             num_rows, smem.owned[0], m, dq);
}

}  // namespace hypenet::cuda::attention::bwd
