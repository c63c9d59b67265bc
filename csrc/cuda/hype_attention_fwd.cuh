// HyPE attention, forward: causal grouped-query softmax attention without position encoding.
//
// Math, per query head h (key head h / (H / HK)) and query t, at position p = query_offset + t:
//   x_i = c_p q_t . k_i,  c_p = scale log2(e) s_p,  s_p = ln(p + a) / ln(a)          logits of base 2, i <= p
//   m = max_i x_i,  l = sum_i 2^(x_i - m),  o_ungated = sum_i 2^(x_i - m) v_i / l
//   o = o_ungated sigmoid(gate_t),  lse = (m + log2 l) ln 2
// over tiles of keys: a tile that raises m multiplies l and the output so far by 2^(old m - m).
//
// Shapes: HypeAttentionFwdParams (params.h). q, k, v, gate: any strides of a multiple of 16 bytes.
//
// Mapping: a block owns kQueries queries of one head, a warp kWarpRows of them; all warps do the same and
// meet twice a tile, before the products that read what was copied. Blocks are numbered along x, the head
// fastest (heads of a group share keys in L2), the longest tiles first. With cu_seqlens a block finds its
// sequence by bisection; at most one block a sequence finds nothing to do. Blocks after the last sequence write zeros.
//
// Shared memory:
//   q      [kQueries, D]         the queries; at last each warp's rows of the output
//   ring   [kStages][kKeys, D]   a stream of pieces: keys, then values of tile 0, of tile 1, ...; then the
//                                gate
//   place, rows                  what the block owns and copies, out of the way of the products' registers
// 40, 80 and 160 KB at D = 64, 128 and 256: two blocks per SM, which is what registers allow; one at
// 256.
//
// Pipeline: while piece j is multiplied, j + 1 and j + 2 are under way; j + 2 takes the place of j - 1, with
// which every warp is done at the barrier before j. The gate is thus there when the last product ends.
//
// Numerics: products in fp32; c_p multiplies the fp32 product inside the fma before the exponential, so that
// q is never rounded again; weights are rounded once, for their product with v; l sums them unrounded. The
// maximum is taken of q . k (negated for a negative scale), which has the order of x because c_p > 0. Key 0
// is seen by all, so m is finite from the first tile on, and no exponent taken is positive. Results do not
// depend on the batch.
//
// Cost: 4 D FLOPs per visible (query, key) pair: compute bound. Bytes from L2: 4 D per key and block.
//
// Limits: D = 64, 128 or 256, bf16 or fp16, S < 2^31. A key or value that is not finite spoils every query of
// its own tile, earlier ones too.
#pragma once

#include "arch/sm80.cuh"
#include "hype_attention.cuh"
#include "tile.cuh"

namespace hypenet::cuda::attention::fwd {

constexpr double kMinScale = 1e-30;  // stands for a scale of 0, so that -inf times it is -inf

template <int D_>
struct Config {
  static constexpr int D = D_;
  static constexpr int kQueries = 128;
  static constexpr int kKeys = 64;
  // 32 rows: each fragment of keys or values serves two products; 16 where the output fills the registers
  static constexpr int kWarpRows = D == 256 ? 16 : 32;
  static constexpr int kBlocks = kWarpRows / 16;
  static constexpr int kThreads = kQueries / kWarpRows * arch::kWarpSize;
  static constexpr int kBlocksPerProcessor = D == 256 ? 1 : 2;
  static constexpr int kStages = 3;
  static_assert(kQueries / kKeys < kStages && kKeys % kWarpRows == 0);
};

using Params = HypeAttentionFwdParams;

struct Arguments {
  Params params;
  LogitScale logit_scale;  // of |scale|
  bool negative;           // the scale's sign
  unsigned num_slots;      // tiles of queries per head
};

// The tile of queries of a block. `begin` is its first query's row in the sequence.
struct Place {
  Sequence sequence;
  int begin, head, num_tiles;
};

// Rows of one head, copied kKeys at a time.
template <class Element>
struct Rows {
  const Element* first;
  int64_t stride;
  int count;
};
enum Operand { kKeyRows, kValueRows, kGateRows, kNumOperands };

template <class Element, class C>
struct Smem {
  Tile<Element, C::kQueries, C::D> q;
  Tile<Element, C::kKeys, C::D> ring[C::kStages];
  Place place;
  Rows<Element> rows[kNumOperands];
};
static_assert(sizeof(Smem<arch::bf16, Config<64>>) < 41 * 1024);
static_assert(sizeof(Smem<arch::bf16, Config<128>>) < 81 * 1024);
static_assert(sizeof(Smem<arch::bf16, Config<256>>) < 161 * 1024);

template <class C>
__device__ __forceinline__ Place find_place(const Params& p, unsigned num_slots) {
  const auto H = static_cast<unsigned>(p.H);
  Place place;
  place.head = static_cast<int>(arch::block_idx() % H);
  const unsigned slot = num_slots - 1 - arch::block_idx() / H;
  place.sequence = find_tile<C::kQueries>(p, slot, place.begin);
  const Sequence& s = place.sequence;
  const int end = place.begin + C::kQueries < s.T ? place.begin + C::kQueries : s.T;
  place.num_tiles = place.begin < s.T ? (s.offset + end - 1) / C::kKeys + 1 : 0;
  return place;
}

// The rows that a block copies: keys and values from row 0 of the sequence on, the gate from its first query on.
template <class Element>
__device__ __forceinline__ void set_rows(Rows<Element> (&rows)[kNumOperands], const Params& p,
                                         const Place& place) {
  const Sequence& s = place.sequence;
  const int key_head = place.head / static_cast<int>(p.H / p.HK);
  const int batch = s.cached < 0 ? s.batch : s.cached, first = s.cached < 0 ? s.first : 0;
  rows[kKeyRows] = {row_of<Element>(p.k, batch, first, key_head), p.k.token, s.S};
  rows[kValueRows] = {row_of<Element>(p.v, batch, first, key_head), p.v.token, s.S};
  rows[kGateRows] = {row_of<Element>(p.gate, s.batch, s.first + place.begin, place.head), p.gate.token,
                     p.gate.data == nullptr ? 0 : s.T - place.begin};
}

// Starts the copy of the keys or the values of tile number `tile`. After the last tile come two pieces of the gate.
template <class C, class Element, class Tile>
__device__ __forceinline__ void copy_piece(Tile& to, const Rows<Element> (&rows)[kNumOperands], int num_tiles,
                                           int tile, Operand operand) {
  const bool is_gate = tile >= num_tiles;
  const Rows<Element>& from = rows[is_gate ? kGateRows : operand];
  const int start = (is_gate ? operand : tile) * C::kKeys;
  if (start < from.count) {
    copy_tile_async<C::kThreads>(to, from.first + start * from.stride, from.stride, from.count - start,
                                 arch::thread_idx());
  }
  arch::commit_copies();
}

// Of a thread's queries, two per block of 16: c_p, the largest q . k so far, and its share of l.
template <int kBlocks>
struct Softmax {
  float factor[kBlocks][2], max[kBlocks][2], sum[kBlocks][2];
};

template <int kBlocks, int kColumns>
__device__ __forceinline__ void negate(float (&S)[kBlocks][kColumns][4]) {
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) S[i][j][e] = -S[i][j][e];
    }
  }
}

// -inf for the keys after each query; the warp's row r sees the tile's keys [0, visible + r).
template <int kBlocks, int kColumns>
__device__ __forceinline__ void mask_future(float (&S)[kBlocks][kColumns][4], int visible) {
  const int row = lane_idx() / 4, col = lane_idx() % 4 * 2;
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (col + 8 * j + e % 2 >= visible + row + 16 * i + e / 2 * 8) S[i][j][e] = -kInfinity;
      }
    }
  }
}

// The largest logit of row (i, half) of a tile, over the four lanes that share it.
template <int kColumns>
__device__ __forceinline__ float row_max(const float (&S)[kColumns][4], int half, float max) {
#pragma unroll
  for (int j = 0; j < kColumns; ++j) max = fmaxf(max, fmaxf(S[j][2 * half], S[j][2 * half + 1]));
  max = fmaxf(max, arch::shuffle_xor(max, 1));
  return fmaxf(max, arch::shuffle_xor(max, 2));
}

// S becomes the weights 2^(x - m); l and o follow the maximum.
template <int kBlocks, int kColumns, int kColumnsO>
__device__ __forceinline__ void weigh(float (&S)[kBlocks][kColumns][4], Softmax<kBlocks>& rows,
                                      float (&o)[kBlocks][kColumnsO][4]) {
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float max = row_max(S[i], half, rows.max[i][half]), factor = rows.factor[i][half];
      const float rescale = arch::exp2((rows.max[i][half] - max) * factor), shift = max * factor;
      rows.max[i][half] = max;
      rows.sum[i][half] *= rescale;
#pragma unroll
      for (int j = 0; j < kColumnsO; ++j) o[i][j][2 * half] *= rescale, o[i][j][2 * half + 1] *= rescale;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          S[i][j][e] = arch::exp2(fmaf(S[i][j][e], factor, -shift));
          rows.sum[i][half] += S[i][j][e];
        }
      }
    }
  }
}

// o / l in place; writes lse [rows of the warp].
template <int kBlocks, int kColumnsO>
__device__ __forceinline__ void normalize(float (&o)[kBlocks][kColumnsO][4], Softmax<kBlocks>& rows,
                                          float* lse, int num_rows) {
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = rows.sum[i][half];
      sum += arch::shuffle_xor(sum, 1);
      sum += arch::shuffle_xor(sum, 2);
      const float inverse = arch::reciprocal(sum);
#pragma unroll
      for (int j = 0; j < kColumnsO; ++j) o[i][j][2 * half] *= inverse, o[i][j][2 * half + 1] *= inverse;
      const int row = 16 * i + 8 * half + lane_idx() / 4;
      if (lane_idx() % 4 == 0 && row < num_rows) {
        lse[row] = (rows.max[i][half] * rows.factor[i][half] + log2f(sum)) * kLn2;
      }
    }
  }
}

// o sigmoid(gate) in place; the gate's rows of this warp are [m, ...) of the tile.
template <int kBlocks, int kColumnsO, class Tile>
__device__ __forceinline__ void apply_gate(float (&o)[kBlocks][kColumnsO][4], const Tile& gate, int m) {
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
    for (int j = 0; j < kColumnsO; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto* pair = gate.at(m + 16 * i + 8 * half + lane_idx() / 4, 8 * j + lane_idx() % 4 * 2);
        const float2 x = arch::unpack<typename Tile::Element>(*reinterpret_cast<const uint32_t*>(pair));
        o[i][j][2 * half] *= sigmoid(x.x);
        o[i][j][2 * half + 1] *= sigmoid(x.y);
      }
    }
  }
}

// The outputs of rows that belong to no sequence.
template <class C, class Element>
__device__ __forceinline__ void zero_tail(const Params& p, int64_t first, int head) {
  constexpr int kRows = C::kQueries, kThreads = C::kThreads, D = C::D;
  zero_rows<kRows, kThreads, D, Element>(p.o, p.T, p.H, head, first);
  if (p.o_ungated != nullptr) zero_rows<kRows, kThreads, D, Element>(p.o_ungated, p.T, p.H, head, first);
  for (int i = arch::thread_idx(); i < kRows && first + i < p.T; i += kThreads) {
    static_cast<float*>(p.lse)[head * p.T + first + i] = 0;
  }
}

template <class C, class Element>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksPerProcessor)
    hype_attention_fwd_kernel(const __grid_constant__ Arguments arguments) {
  constexpr int D = C::D, kKeys = C::kKeys, kBlocks = C::kBlocks, kStages = C::kStages;
  if (sizeof(Smem<Element, C>) > arch::kMaxSharedBytes) return;  // no GPU that runs this has it
  auto& smem = arch::shared_memory<Smem<Element, C>>();
  const Params& p = arguments.params;
  const Place place = find_place<C>(p, arguments.num_slots);
  const Sequence& s = place.sequence;
  if (s.is_tail) return zero_tail<C, Element>(p, s.first + place.begin, place.head);
  if (place.num_tiles == 0) return;
  if (arch::thread_idx() == 0) {
    smem.place = place;
    set_rows(smem.rows, p, place);
  }
  arch::sync_block();

  // (1) the queries and the first two pieces; c_p of this thread's rows
  copy_tile_async<C::kThreads>(smem.q, row_of<Element>(p.q, s.batch, s.first + place.begin, place.head),
                               p.q.token, s.T - place.begin, arch::thread_idx());
  copy_piece<C>(smem.ring[0], smem.rows, place.num_tiles, 0, kKeyRows);
  copy_piece<C>(smem.ring[1], smem.rows, place.num_tiles, 0, kValueRows);
  const int m = warp_idx() * C::kWarpRows, position = s.offset + place.begin + m;
  const int num_rows = s.T - place.begin - m;
  Softmax<kBlocks> rows;
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      rows.factor[i][half] = arguments.logit_scale(position + 16 * i + 8 * half + lane_idx() / 4);
      rows.max[i][half] = -kInfinity;
      rows.sum[i][half] = 0;
    }
  }

  float o[kBlocks][D / 8][4] = {};
  int stage = 0;
  const auto next_piece = [&](int tile, Operand operand) {
    arch::wait_copies<1>();
    arch::sync_block();
    copy_piece<C>(smem.ring[(stage + 2) % kStages], smem.rows, place.num_tiles, tile + 1, operand);
    const auto& piece = smem.ring[stage];
    stage = stage + 1 == kStages ? 0 : stage + 1;
    return &piece;
  };
  for (int tile = 0; tile < place.num_tiles; ++tile) {
    const int visible = position + 1 - tile * kKeys;
    const bool seen = visible + C::kWarpRows > 1 && num_rows > 0;

    // (2) S = Q K^T; the future is masked where it reaches into the tile
    float S[kBlocks][kKeys / 8][4] = {};
    uint32_t P[kBlocks][kKeys / 16][4];
    const auto* keys = next_piece(tile, kKeyRows);
    if (seen) {
      multiply_transposed(S, smem.q, m, *keys);
      if (arguments.negative) negate(S);
      if (visible < kKeys) mask_future(S, visible);

      // (3) weights; l and o follow the maximum
      weigh(S, rows, o);
      // (4) P is rounded among its products, or before the barrier where that would take too many registers
      if constexpr (arch::kIsBlackwell) round_results<Element>(P, S);
    }

    // (4) o += P V
    const auto* values = next_piece(tile, kValueRows);
    if (seen) {
      if constexpr (!arch::kIsBlackwell) round_results<Element>(P, S);
      multiply_rounded(o, P, *values);
    }
  }

  // (5) o / l and lse, the gate, the output
  const Place& same = smem.place;
  const int64_t row = same.sequence.first + same.begin + m;
  auto* lse = static_cast<float*>(p.lse) + (same.sequence.batch * p.H + same.head) * p.T + row;
  normalize(o, rows, lse, num_rows);
  const auto store = [&](void* to) {
    store_rows(contiguous_row<D, Element>(to, p.T, p.H, same.sequence.batch, row, same.head), p.H * D,
               num_rows, smem.q, m, o);
  };
  if (p.gate.data != nullptr) {
    if (p.o_ungated != nullptr) store(p.o_ungated);
    arch::wait_copies<0>();
    arch::sync_block();
    apply_gate(o, smem.ring[(stage + m / kKeys) % kStages], m % kKeys);
  }
  store(p.o);
}

}  // namespace hypenet::cuda::attention::fwd
