// Data of the backward's chunk kernel: a block's place, its shared memory and the copies
// into it, and which part of a product a warp has. gated_delta_bwd_chunk.cuh says what for.
#pragma once

#include "gated_delta_bwd.cuh"

namespace hypenet::cuda::gated_delta::bwd::chunk {

constexpr int kRowWarps = 4, kColWarps = 4;
constexpr int kThreads = kRowWarps * kColWarps * arch::kWarpSize;
constexpr int kColumns = 64;  // of V, per tile
constexpr int kChunkPart = kChunk / kColWarps;
static_assert(kRowWarps * 16 == kChunk && kColumns == kChunk);

using Square = float[1][kChunkPart / 8][4];  // a warp's part of a product [C, C] or [C, columns]
template <class Smem>
using Wide = float[1][Smem::kOut / kColWarps / 8][4];  // of a product [C, kOut]

// The chunk and key head of a block.
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

constexpr int kMostOut = 128;

// kPart: which columns of dq and dk are made, of K > kMostOut half of them, and with them what else is a sum
// over these columns. Part 0 makes dbeta and the rest of dg, the last part dv.
template <class Element_, int K_, Rule kRule, int kPart_ = 0>
struct Smem {
  using Element = Element_;
  static constexpr int K = K_, kPart = kPart_;
  static constexpr bool kDelta = kRule == Rule::kDelta;
  static constexpr int kOut = K < kMostOut ? K : kMostOut, kFirst = kPart * kOut;
  static constexpr bool kFirstPart = kFirst == 0, kLastPart = kFirst + kOut == K;

  struct Stage {
    Tile<Element, K, kColumns> S0;
    Tile<Element, kOut, kColumns> dS1;
    Tile<Element, kChunk, kColumns> v, dO, dB;
  };
  Tile<Element, kChunk, K> q, k;
  Tile<Element, kChunk, kChunk> L;
  Stage stages[2];
  float G[2][kChunk], beta[2][kChunk];  // of two value heads in turn
  // (7), across warps
  float dbeta[kColWarps][kChunk], dG[kColWarps][kChunk], next[kColWarps][kChunk], columns[kRowWarps][kChunk];
  float states[kRowWarps * kColWarps];
  Place place;  // kept here rather than in everybody's registers
};
static_assert(sizeof(Smem<arch::bf16, 128, Rule::kDelta>) <= 163 * 1024, "Ampere's shared memory of a block");
static_assert(sizeof(Smem<arch::bf16, 256, Rule::kDelta>) <= 227 * 1024, "Hopper's");

// Block row of every warp, two bits each: that of warp w is 3 (w % 4) + 2 (w / 4) in the field of four
// elements. Warps w, w + 4, w + 8, w + 12 share a quarter of the SM, and columns go by w / 4: of a
// triangle of blocks no quarter has more than three.
constexpr uint32_t kBlockRows = 0xc963369c;
__device__ constexpr int block_row(int warp) { return kBlockRows >> 2 * warp & 3; }

__device__ constexpr bool balanced() {
  unsigned blocks = 0;  // that have a warp
  for (int quarter = 0; quarter < 4; ++quarter) {
    int rows = 0, in_triangle = 0;
    for (int col = 0; col < kColWarps; ++col) {
      const int row = block_row(quarter + 4 * col);
      rows += row, in_triangle += row >= col;
      blocks |= 1u << (kColWarps * row + col);
    }
    if (rows != 0 + 1 + 2 + 3 || in_triangle > 3) return false;
  }
  return blocks == 0xffff;
}
static_assert(balanced());

// Where this lane's part of a product lies. Every step asks anew: addresses that outlive a step cost more
// registers than there are.
struct Part {
  int row, lane_row;  // the warp's first row; the first of this lane's two rows, the other is 8 below
  int col_warp;

  __device__ Part() {
    const unsigned thread = fresh_thread();
    row = 16 * block_row(thread / arch::kWarpSize);
    lane_row = row + thread % arch::kWarpSize / 4;
    col_warp = thread / arch::kWarpSize / kRowWarps;
  }
  __device__ int column() const { return kChunkPart * col_warp; }    // of a product [C, C]
  __device__ bool above_diagonal() const { return column() > row; }  // all of the part
  template <class Smem>
  __device__ int wide_column() const {
    return Smem::kOut / kColWarps * col_warp;
  }  // of a product [C, kOut]
};

// Of the item's first token and column in dv and dB_low.
__device__ __forceinline__ int64_t value_offset(const GatedDeltaBwdParams& params, const Place& place,
                                                const Item& item) {
  return place.row * place.value_stride + item.head(place) * params.V + item.column();
}

template <class Tile>
__device__ __forceinline__ void copy_L_async(Tile& L, const GatedDeltaBwdParams& params, const Place& place,
                                             int head) {
  const int64_t offset = (place.chunk * params.HV + head) * kChunk * kChunk;
  copy_tile_async<kThreads>(L, static_cast<const typename Tile::Element*>(params.L) + offset, kChunk, kChunk,
                            fresh_thread());
}

// L and the gates of the item's value head
template <class Smem>
__device__ __forceinline__ void copy_head_async(Smem& sm, const GatedDeltaBwdParams& params,
                                                const Place& place, const Item& item) {
  const int head = item.head(place), parity = item.member % 2;
  if constexpr (Smem::kDelta) copy_L_async(sm.L, params, place, head);
  copy_gates_async<Smem::kDelta>(sm.G[parity], sm.beta[parity], params, place.chunk, head,
                                 place.sequence.batch, place.token, place.num_tokens);
}

// The item's columns of v or of dO.
template <class Tile>
__device__ __forceinline__ void copy_columns_async(Tile& tile, const View& x, const Place& place,
                                                   const Item& item) {
  copy_tile_async<kThreads>(
      tile,
      row_of<typename Tile::Element>(x, place.sequence.batch, place.token, item.head(place)) + item.column(),
      x.token, place.num_tokens, fresh_thread());
}

template <class Smem>
__device__ __forceinline__ void copy_v_async(Smem& sm, const GatedDeltaBwdParams& params, const Place& place,
                                             const Item& item) {
  copy_columns_async(sm.stages[item.number % 2].v, params.v, place, item);
}

// The item's columns of dB or of its low part.
template <class Tile>
__device__ __forceinline__ void copy_dB_async(Tile& tile, const void* dB, const GatedDeltaBwdParams& params,
                                              const Place& place, const Item& item) {
  copy_tile_async<kThreads>(
      tile, static_cast<const typename Tile::Element*>(dB) + value_offset(params, place, item),
      place.value_stride, place.num_tokens, fresh_thread());
}

// All but v and dB
template <class Smem>
__device__ __forceinline__ void copy_stage_async(Smem& sm, const GatedDeltaBwdParams& params,
                                                 const Place& place, const Item& item) {
  using Element = typename Smem::Element;
  auto& stage = sm.stages[item.number % 2];
  const int thread = fresh_thread(), head = item.head(place), column = item.column();
  const int64_t batch = place.sequence.batch, V = params.V;
  const int64_t state = (place.chunk * params.HV + head) * Smem::K * V + column;
  copy_tile_async<kThreads>(stage.S0, static_cast<const Element*>(params.h) + state, V, Smem::K, thread);
  copy_tile_async<kThreads>(stage.dO, row_of<Element>(params.do_, batch, place.token, head) + column,
                            params.do_.token, place.num_tokens, thread);
  copy_tile_async<kThreads>(stage.dS1, static_cast<const Element*>(params.dstates) + state + Smem::kFirst * V,
                            V, Smem::kOut, thread);
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

}  // namespace hypenet::cuda::gated_delta::bwd::chunk
