// HyPE attention, decode: a few query tokens of each sequence against its cache of keys and values.
//
// Math: hype_attention_fwd.cuh for the last T positions of a sequence of L keys after the append:
//   query t stands at position p = L - T + t and sees keys 0 ... p;
//   L = cache_seqlens + T, or cache_seqlens without k.
// A segment of keys leaves per query row its maximum m, l = sum 2^(x_i - m) and sum 2^(x_i - m) v_i; the
// segments of a row are then added with weights 2^(m - max m), in rising order.
//
// Shapes: HypeAttentionDecodeParams (params.h). Caches of any strides, read and written where they are.
//
// Mapping: two launches. (1) A unit is a segment of keys of one sequence, a key head, and kRows of the T H /
// HK query rows that share it, so that keys and values are read once for all of them. Units are numbered with
// the row block fastest, then the head, then the segment; block i takes units i, i + num_blocks, ... of what
// the lengths on the device amount to: any mix of lengths keeps all blocks busy, and the heads of a token,
// neighbours in memory, are read at one time. Within a segment warp w takes the w-th kKeys of every kWarps *
// kKeys keys, alone but for the merge at the end. (2) A block per query row adds its segments, a thread per
// segment for the weights.
//
// Append: new keys and values are read from k and v by every unit that sees them, so that none waits for
// another; the unit that covers them with row block 0 writes them to the cache, where no unit reads them.
//
// Shared memory, per block of (1), D = 128 (64; 256):
//   q      [kRows, D]                       4 KB (2; 8)      the queries, of one unit
//   ring   [kWarps][kStages][2][kKeys, D]   96 KB (48; 128)  keys and values on their way; at the end of a
//                                           unit the sums of each warp, [kRows, D + 8] floats
// Blocks per SM: 2 (4; 1) with 227 KB, 1 (3; 1) with 163 KB.
//
// Pipeline: a warp has kStages steps of kKeys keys in its ring and waits for nobody until the merge. While it
// computes, kStages - 1 steps are under way: 16 KB a warp, 64 KB a block, 128 KB an SM at D = 128.
// Needed by Little's law: 4.3 TB/s x 1 us / 132 = 33 KB an SM. A block that merges leaves the bus to
// its neighbour.
//
// Numerics: as in the forward. The length of segments depends on L alone (segment_length): results are
// bitwise repeatable, and the same in any batch, on any GPU, for any capacity, and for one token or
// several a call as long as the segments are of one length. A length out of range gives NaN and touches
// nothing.
//
// Cost: 4 L HK D bytes per sequence, 2 T H D (and 4 T H L D FLOPs: 2 T H / HK FLOPs a byte, bound by memory);
// for each segment of 256 keys 4 T H (D + 2) bytes of partial results are written and read, 2 % of the
// cache's bytes for 4 rows a key head.
//
// Limits: D <= 256, bf16 or fp16, any T. Caches whose rows are not 16-byte aligned are read element by
// element. A key or value that is not finite spoils every query of the same call that shares its key head.
#pragma once

#include "arch/sm80.cuh"
#include "hype_attention.cuh"
#include "tile.cuh"
#include "view.cuh"

namespace hypenet::cuda::attention::decode {

constexpr int kRows = 16;
constexpr int kKeys = 16;  // of a warp's step
constexpr int kCombineThreads = 256, kCombineWarps = kCombineThreads / arch::kWarpSize;
static_assert(kCombineThreads == kDecodeMaxSegments);

// kStages: steps of keys and values in a warp's ring.
template <class Element_, int kDim_, int kStages_ = kDim_ <= 128 ? 3 : 2>
struct Config {
  using Element = Element_;
  static constexpr int kDim = kDim_;  // D, or the next that is built: columns past D are zero
  static constexpr int kWarps = 4, kThreads = kWarps * arch::kWarpSize;
  static constexpr int kStep = kWarps * kKeys;
  static constexpr int kStages = kStages_;
  static constexpr int kBlocksPerProcessor = kDim > 128 ? 1 : kDim > 64 ? 2 : 4;
  static constexpr int kSumStride = kDim + 8;  // rows that a warp stores at once then differ in their banks
  static_assert(kDecodeSegment % kStep == 0);
};

template <class C>
struct Smem {
  using Element = typename C::Element;
  struct Stage {
    Tile<Element, kKeys, C::kDim> k, v;
  };
  union Ring {
    Stage stages[C::kStages];
    float sums[kRows][C::kSumStride];
  };
  Tile<Element, kRows, C::kDim> q;
  Ring rings[C::kWarps];
  float max[C::kWarps][kRows], sum[C::kWarps][kRows];
};

// The params of the kernels: the caller's struct, and what the launcher decides.
struct DecodeParams {
  HypeAttentionDecodeParams p;
  LogitScale logit_scale;
  int64_t num_blocks;
  int group, row_blocks;
  bool aligned_caches, aligned;  // all rows of the caches, and of k and v too, are whole 16-byte pieces
};

// Keys of sequence b after the append; 0 where its length is out of range.
__device__ __forceinline__ int num_keys(const HypeAttentionDecodeParams& p, int64_t b) {
  const int64_t length = index_at(p.cache_seqlens, b), added = p.k.data == nullptr ? 0 : p.T;
  const bool valid = length >= p.T - added && length <= p.capacity - added;
  return valid ? static_cast<int>(length + added) : 0;
}

// kDecodeSegment, or the least multiple of it that makes at most kDecodeMaxSegments of them.
__device__ __forceinline__ int segment_length(int L) {
  constexpr int kLongest = kDecodeSegment * kDecodeMaxSegments;
  return kDecodeSegment * ((L + kLongest - 1) / kLongest);
}

__device__ __forceinline__ int num_segments(int L) {
  const int length = L == 0 ? 1 : segment_length(L);
  return (L + length - 1) / length;
}

// Where partial results of query row (t, head) for a segment lie, counted in rows.
__device__ __forceinline__ int64_t partial_row(const HypeAttentionDecodeParams& p, int64_t b, int segment,
                                               int64_t t, int64_t head) {
  return ((b * p.num_segments + segment) * p.T + t) * p.H + head;
}

// ---- (1): which unit

struct Unit {
  int64_t b;
  int L, held;     // keys of sequence b after the append, and those that its cache holds
  int begin, end;  // the unit's
  int segment, key_head, row_block;
};

// The sequences that lanes 0 ... 31 look at: from b on. `before`: segments of the sequences before b.
struct Window {
  int64_t b, before;
};

// Finds unit `number` at or after the window, which moves along. False where there are fewer units.
__device__ __forceinline__ bool find_unit(const DecodeParams& params, int64_t number, Window& window,
                                          Unit& unit) {
  const HypeAttentionDecodeParams& p = params.p;
  const int64_t per_segment = p.HK * params.row_blocks, target = number / per_segment;
  const int rest = static_cast<int>(number % per_segment), lane = lane_idx();
  for (; window.b < p.B; window.b += arch::kWarpSize) {
    const int64_t b = window.b + lane;
    const int L = b < p.B ? num_keys(p, b) : 0;
    const int own = num_segments(L);
    const int upto =
        sum_up_to_lane(own);  // segments of this lane's sequence and those before it in the window
    const int total = arch::shuffle(upto, arch::kWarpSize - 1);
    if (target < window.before + total) {
      int owner = window.before + upto <= target;  // lanes whose sequences end before the target
#pragma unroll
      for (int mask = 1; mask < arch::kWarpSize; mask *= 2) owner += arch::shuffle_xor(owner, mask);
      unit.b = window.b + owner;
      unit.L = arch::shuffle(L, owner);
      unit.held = unit.L - (p.k.data == nullptr ? 0 : static_cast<int>(p.T));
      unit.segment = static_cast<int>(target - window.before) - arch::shuffle(upto - own, owner);
      unit.begin = unit.segment * segment_length(unit.L);
      unit.end = unit.begin + segment_length(unit.L);
      if (unit.end > unit.L) unit.end = unit.L;
      unit.key_head = rest / params.row_blocks;
      unit.row_block = rest % params.row_blocks;
      return true;
    }
    window.before += total;
  }
  return false;
}

// ---- (1): keys and values

// Row `key` of the unit's keys or values: in the cache, or among those to be appended.
template <class Element>
__device__ __forceinline__ const Element* key_row(const View& cache, const View& added, const Unit& unit,
                                                  int key) {
  return key < unit.held ? row_of<Element>(cache, unit.b, key, unit.key_head)
                         : row_of<Element>(added, unit.b, key - unit.held, unit.key_head);
}

// Starts the copies of keys and values [first, first + kKeys), all of them in the cache.
template <class C>
__device__ __forceinline__ void copy_cached(const HypeAttentionDecodeParams& p, const Unit& unit, int first,
                                            typename Smem<C>::Stage& stage) {
  using Element = typename C::Element;
  constexpr int kPieces = C::kDim / kPiece, kStep = arch::kWarpSize / kPieces;
  const int row = lane_idx() / kPieces, col = lane_idx() % kPieces * kPiece;
  const bool valid = col < p.D;
  const Element* k = row_of<Element>(p.k_cache, unit.b, first + row, unit.key_head) + (valid ? col : 0);
  const Element* v = row_of<Element>(p.v_cache, unit.b, first + row, unit.key_head) + (valid ? col : 0);
#pragma unroll
  for (int i = 0; i < kKeys; i += kStep) {
    arch::copy_16_async(stage.k.at(row + i, col), k, valid);
    arch::copy_16_async(stage.v.at(row + i, col), v, valid);
    k += kStep * p.k_cache.token, v += kStep * p.v_cache.token;
  }
}

// The same for any keys and any alignment; what lies past the unit's end becomes zero.
template <class C>
__device__ __forceinline__ void copy_any(const DecodeParams& params, const Unit& unit, int first,
                                         typename Smem<C>::Stage& stage) {
  using Element = typename C::Element;
  const HypeAttentionDecodeParams& p = params.p;
  constexpr int kPieces = C::kDim / kPiece;
#pragma unroll 1
  for (int piece = lane_idx(); piece < kKeys * kPieces; piece += arch::kWarpSize) {
    const int row = piece / kPieces, col = piece % kPieces * kPiece;
    const bool valid = first + row < unit.end && col < p.D;
    const int key = valid ? first + row : unit.begin, from = valid ? col : 0;
    const Element* k = key_row<Element>(p.k_cache, p.k, unit, key) + from;
    const Element* v = key_row<Element>(p.v_cache, p.v, unit, key) + from;
    Element *to_k = stage.k.at(row, col), *to_v = stage.v.at(row, col);
    if (params.aligned) {
      arch::copy_16_async(to_k, k, valid);
      arch::copy_16_async(to_v, v, valid);
      continue;
    }
#pragma unroll 1
    for (int i = 0; i < kPiece; ++i) {
      const bool exists = valid && col + i < p.D;
      to_k[i] = exists ? k[i] : Element{};
      to_v[i] = exists ? v[i] : Element{};
    }
  }
}

// The new keys and values of the unit go behind those that the cache holds.
template <class C>
__device__ __forceinline__ void append(const DecodeParams& params, const Unit& unit) {
  using Element = typename C::Element;
  const HypeAttentionDecodeParams& p = params.p;
  if (p.k.data == nullptr || unit.row_block != 0) return;
  for (int key = unit.held > unit.begin ? unit.held : unit.begin; key < unit.end; ++key) {
    const Element* k = key_row<Element>(p.k_cache, p.k, unit, key);
    const Element* v = key_row<Element>(p.v_cache, p.v, unit, key);
    for (int d = arch::thread_idx(); d < p.D; d += C::kThreads) {
      row_of<Element>(p.k_cache, unit.b, key, unit.key_head)[d] = k[d];
      row_of<Element>(p.v_cache, unit.b, key, unit.key_head)[d] = v[d];
    }
  }
}

// ---- (1): the attention of a warp over its keys

// Query row `row` of a unit is token t, head `head`; rows past the last are not there.
struct QueryRow {
  int t, head;
  bool exists;

  __device__ QueryRow(const DecodeParams& params, const Unit& unit, int row) {
    const int all = unit.row_block * kRows + row;
    t = all / params.group;
    head = unit.key_head * params.group + all % params.group;
    exists = t < params.p.T;
  }
};

template <class C>
__device__ __forceinline__ void load_queries(const DecodeParams& params, const Unit& unit, Smem<C>& smem) {
  using Element = typename C::Element;
  for (int i = arch::thread_idx(); i < kRows * C::kDim; i += C::kThreads) {
    const QueryRow row(params, unit, i / C::kDim);
    const int d = i % C::kDim;
    Element x{};
    if (row.exists && d < params.p.D) x = row_of<Element>(params.p.q, unit.b, row.t, row.head)[d];
    *smem.q.at(i / C::kDim, d) = x;
  }
}

// A warp's running result for its keys so far. A lane has rows lane / 4 and lane / 4 + 8 of the queries.
template <class C>
struct State {
  float factor[2];       // log2(e) scale s_t
  int last[2];           // the last key that the row sees
  float max[2], sum[2];  // sum: over this lane's keys
  float o[1][C::kDim / 8][4];

  __device__ State(const DecodeParams& params, const Unit& unit) : o{} {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const QueryRow row(params, unit, lane_idx() / 4 + 8 * half);
      last[half] = unit.L - static_cast<int>(params.p.T) + (row.exists ? row.t : 0);
      factor[half] = params.logit_scale(last[half]);
      max[half] = -kInfinity, sum[half] = 0;
    }
  }
};

// 2^(x - max) of the logits of keys [first, first + kKeys), in place; the sums so far follow a maximum that
// rises.
template <class C>
__device__ __forceinline__ void weigh(float (&x)[2][4], int first, State<C>& state) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int visible = state.last[half] - first;
    float top = state.max[half];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& logit = x[i / 2][half * 2 + i % 2];
      const int key = i / 2 * 8 + lane_idx() % 4 * 2 + i % 2;
      logit = key <= visible ? logit * state.factor[half] : -kInfinity;
      top = fmaxf(top, logit);
    }
    top = fmaxf(top, arch::shuffle_xor(top, 1));
    top = fmaxf(top, arch::shuffle_xor(top, 2));
    const float base = top == -kInfinity ? 0.0f : top;  // nothing seen so far: all weights are 0
    const float decay = arch::exp2(state.max[half] - base);
    state.max[half] = top;
    state.sum[half] *= decay;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& logit = x[i / 2][half * 2 + i % 2];
      logit = arch::exp2(logit - base);
      state.sum[half] += logit;
    }
#pragma unroll
    for (int n = 0; n < C::kDim / 8; ++n)
      state.o[0][n][half * 2] *= decay, state.o[0][n][half * 2 + 1] *= decay;
  }
}

// The warp's keys of the unit, one step of kKeys after the other, kStages - 1 steps ahead on their way.
template <class C>
__device__ __forceinline__ void attend(const DecodeParams& params, const Unit& unit, Smem<C>& smem,
                                       State<C>& state) {
  auto& stages = smem.rings[warp_idx()].stages;
  const int own = unit.begin + warp_idx() * kKeys;
  const auto copy = [&](int first, int slot) {
    const int cached = unit.held < unit.end ? unit.held : unit.end;
    if (params.aligned_caches && first + kKeys <= cached) {
      copy_cached<C>(params.p, unit, first, stages[slot]);
    } else if (first < unit.end) {
      copy_any<C>(params, unit, first, stages[slot]);
    }
    arch::commit_copies();
  };
#pragma unroll 1
  for (int slot = 0; slot < C::kStages; ++slot) copy(own + slot * C::kStep, slot);
  load_queries(params, unit, smem);
  append<C>(params, unit);
  arch::sync_block();
  int slot = 0;
  for (int first = own; first < unit.end; first += C::kStep) {
    arch::wait_copies<C::kStages - 1>();
    arch::sync_warp();
    float x[1][2][4] = {};
    multiply_transposed(x, smem.q, 0, stages[slot].k);
    weigh(x[0], first, state);
    multiply_result(state.o, x, stages[slot].v);
    arch::sync_warp();
    copy(first + C::kStages * C::kStep, slot);
    slot = slot + 1 == C::kStages ? 0 : slot + 1;
  }
  arch::wait_copies<0>();
  arch::sync_warp();
}

// ---- (1): the merge of a block's warps

template <class C>
__device__ __forceinline__ void publish(const State<C>& state, Smem<C>& smem) {
  const int warp = warp_idx(), lane = lane_idx();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    float sum = state.sum[half];
    sum += arch::shuffle_xor(sum, 1);
    sum += arch::shuffle_xor(sum, 2);
    if (lane % 4 == 0) smem.max[warp][row] = state.max[half], smem.sum[warp][row] = sum;
    float* to = smem.rings[warp].sums[row] + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < C::kDim / 8; ++n) {
      *reinterpret_cast<float2*>(to + 8 * n) = float2{state.o[0][n][half * 2], state.o[0][n][half * 2 + 1]};
    }
  }
}

template <class C>
__device__ __forceinline__ void store_partial(const DecodeParams& params, const Unit& unit,
                                              const Smem<C>& smem) {
  const HypeAttentionDecodeParams& p = params.p;
  constexpr int kVectors = C::kDim / 4;
  const int64_t stride = (p.D + 3) / 4 * 4;
  for (int i = arch::thread_idx(); i < kRows * kVectors; i += C::kThreads) {
    const int r = i / kVectors, col = i % kVectors * 4;
    const QueryRow row(params, unit, r);
    if (!row.exists || col >= stride) continue;
    float top = smem.max[0][r], sum = 0;
#pragma unroll
    for (int warp = 1; warp < C::kWarps; ++warp) top = fmaxf(top, smem.max[warp][r]);
    float4 o{};
#pragma unroll
    for (int warp = 0; warp < C::kWarps; ++warp) {
      const float weight = top == -kInfinity ? 0.0f : arch::exp2(smem.max[warp][r] - top);
      const float4 x = *reinterpret_cast<const float4*>(smem.rings[warp].sums[r] + col);
      sum += weight * smem.sum[warp][r];
      o.x += weight * x.x, o.y += weight * x.y, o.z += weight * x.z, o.w += weight * x.w;
    }
    const int64_t to = partial_row(p, unit.b, unit.segment, row.t, row.head);
    arch::store_16_bytes(static_cast<float*>(p.partial_o) + to * stride + col, o);
    if (col == 0) static_cast<float2*>(p.partial_softmax)[to] = float2{top, sum};
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksPerProcessor)
    hype_attention_decode_split_kernel(const __grid_constant__ DecodeParams params) {
  auto& smem = arch::shared_memory<Smem<C>>();
  Window window{0, 0};
  Unit unit;
  for (int64_t number = arch::block_idx(); find_unit(params, number, window, unit);
       number += params.num_blocks) {
    State<C> state(params, unit);
    attend(params, unit, smem, state);
    publish(state, smem);
    arch::sync_block();
    store_partial(params, unit, smem);
    arch::sync_block();
  }
}

// ---- (2)

struct CombineSmem {
  float max[kCombineWarps], sum[kCombineWarps];
  float weights[kDecodeMaxSegments];
  float o[kCombineWarps][kDecodeMaxDim];
};

// The weight of each of n segments of a row, to smem; returns the sum over them of weight times softmax sum.
__device__ __forceinline__ float weigh_segments(const HypeAttentionDecodeParams& p, int64_t row,
                                                int64_t stride, int n, CombineSmem& smem) {
  const int thread = arch::thread_idx(), warp = warp_idx();
  float2 own{-kInfinity, 0};
  if (thread < n) own = static_cast<const float2*>(p.partial_softmax)[row + thread * stride];
  float top = own.x;
#pragma unroll
  for (int mask = 1; mask < arch::kWarpSize; mask *= 2) top = fmaxf(top, arch::shuffle_xor(top, mask));
  if (lane_idx() == 0) smem.max[warp] = top;
  arch::sync_block();
#pragma unroll
  for (int i = 0; i < kCombineWarps; ++i) top = fmaxf(top, smem.max[i]);
  const float weight = top == -kInfinity ? 0.0f : arch::exp2(own.x - top);
  smem.weights[thread] = weight;
  float sum = thread < n ? weight * own.y : 0.0f;
#pragma unroll
  for (int mask = 1; mask < arch::kWarpSize; mask *= 2) sum += arch::shuffle_xor(sum, mask);
  if (lane_idx() == 0) smem.sum[warp] = sum;
  arch::sync_block();
  sum = smem.sum[0];
#pragma unroll
  for (int i = 1; i < kCombineWarps; ++i) sum += smem.sum[i];
  return sum;
}

// Every warp adds its segments; the sums of all warps are then added in order.
__device__ __forceinline__ void add_segments(const HypeAttentionDecodeParams& p, int64_t row, int64_t stride,
                                             int n, CombineSmem& smem) {
  const int64_t columns = (p.D + 3) / 4 * 4;
  const auto* partial_o = static_cast<const float*>(p.partial_o);
  for (int col = lane_idx() * 4; col < columns; col += arch::kWarpSize * 4) {
    float4 o{};
#pragma unroll 8
    for (int i = warp_idx(); i < n; i += kCombineWarps) {
      const float4 x = *reinterpret_cast<const float4*>(partial_o + (row + i * stride) * columns + col);
      const float weight = smem.weights[i];
      o.x += weight * x.x, o.y += weight * x.y, o.z += weight * x.z, o.w += weight * x.w;
    }
    *reinterpret_cast<float4*>(smem.o[warp_idx()] + col) = o;
  }
  arch::sync_block();
}

template <class Element>
__global__ void __launch_bounds__(kCombineThreads, 4)
    hype_attention_decode_combine_kernel(const __grid_constant__ DecodeParams params) {
  const HypeAttentionDecodeParams& p = params.p;
  auto& smem = arch::shared_memory<CombineSmem>();
  const auto T = static_cast<unsigned>(p.T), H = static_cast<unsigned>(p.H), block = arch::block_idx();
  const int64_t b = block / H / T, t = block / H % T, head = block % H;
  const int n = num_segments(num_keys(p, b));
  const int64_t row = partial_row(p, b, 0, t, head), stride = p.T * p.H;
  const float sum = weigh_segments(p, row, stride, n, smem);
  add_segments(p, row, stride, n, smem);
  auto* o = static_cast<Element*>(p.o) + ((b * p.T + t) * p.H + head) * p.D;
  for (int d = arch::thread_idx(); d < p.D; d += kCombineThreads) {
    float x = smem.o[0][d];
#pragma unroll
    for (int warp = 1; warp < kCombineWarps; ++warp) x += smem.o[warp][d];
    x /= sum;  // 0 / 0 where there is no segment: the length is out of range
    if (p.gate.data != nullptr) x *= sigmoid(to_float(row_of<Element>(p.gate, b, t, head)[d]));
    from_float(o[d], x);
  }
}

}  // namespace hypenet::cuda::attention::decode
