// Backward of the gated delta rule and of simple GLA (kDelta = false), first of two kernels: the gradient of
// the state, chunk after chunk from the last to the first. gated_delta_bwd_chunk.cuh does the rest.
//
// Math, per value head and chunk of C tokens; s the scale, G the running sum of g, gamma = e^G, Gamma_ij =
// e^(G_i - G_j) for j <= i else 0, L = stril((I + stril(diag(beta) K K^T . Gamma))^-1) from the forward, dS1
// the gradient of the state after the chunk, dS0 of the one before it:
//   P   = s Q K^T . Gamma                                                                          (1)
//   dE  = P^T dO + gamma_C / gamma (K dS1)                                                         (2)
//   dB  = dE + L^T dE              (dE itself without delta)                                       (3)
//   dS0 = gamma_C dS1 + Q^T (s gamma dO) + K^T dZ      with dZ = -gamma beta dB, 0 without delta  (2, 4)
//
// Shapes: as in GatedDeltaBwdParams (params.h). Reads q, k, do, G, beta, L, dfinal_state; writes dS1 of
// every chunk to dstates, dB to dv (which the second kernel turns into dv = beta dB), its low part to dB_low
// where some beta of the chunk exceeds 1, and dinitial_state.
//
// Mapping: a block owns kColumns columns of V of one (sequence or segment, value head), blocks numbered along
// x with the column tile fastest, so that neighbours share q, k and L in L2. Every formula above needs only
// its own columns. dS stays in fp32 registers. Warp w of 4 owns rows 16 w of every [C, kColumns] product, and
// rows K / 4 w of dS.
//
// Shared memory (K = 128, bytes):      lifetime
//   stage[2].k   [C, K]         16 K   copied while the chunk before is at work
//   stage[2].L   [C, C]          8 K   likewise
//   stage[2].dO  [C, columns]    4 K   likewise; after (3) dZ
//   q            [C, K]         16 K   copied during (3) and (4) of the chunk before
//   P            [C, C]          8 K   (1) to (2); after (3) the low parts of dB and dZ
//   dS           [K, columns]    8 K   dS1 rounded, (0) to (2)
//   dS_low       [K, columns]    8 K   its low part, (1) to (2)
//   scaled_dO    [C, columns]    4 K   s gamma dO, (1) to (2); after (3) dB
//   dE, low part [C, columns]  2 x 4 K   (2) to (3)
// 109 KB: two blocks per SM of compute capability 9.0 and 10.0, one of 8.0; K = 256 (173 KB) fits 9.0 and 10.0 only.
// Where a block has 99 KB (8.6, 8.9, 12.0), K = 128 has one buffer of L and dO instead of two, and dZ is stored in
// dS_low, which nobody reads after (2): 97 KB (kStages = 1).
//
// Pipeline: four barriers a chunk, one at the end of each of (0) to (3). With kStages = 1 the copies of dO start with
// those of q, after (2), and those of L after (3), in a group of their own, for which the next (2) waits.
//
// Numerics: fp32 accumulation; rounded to dtype are dS1, P, s gamma dO, dZ and dB, each once. In L^T dE both
// factors are hi/lo pairs; where some beta of the chunk exceeds 1, dZ, dB, and dS1 in K dS1 are hi/lo pairs too. Every
// exponent taken is <= 0. Sums run in a fixed order, which depends on nothing but the shapes of one sequence.
// Tokens past the end are zero in k, q, dO and beta, and contribute nothing; their memory is not read.
//
// Cost per token and value head: 2 (3 K V + C (K V / kColumns + 23 / 8 V)) FLOPs, 4 K V more with some beta
// > 1. Bytes from and to memory: 2 (2 K + 2 V + C) and 2 K V / C for dS1. The chain of chunks is serial:
// latency bounds it unless blocks fill the device. Where sequences are split, a pass over segments alone
// comes first, of which gated_delta_segments.cuh makes the gradient after each.
//
// Limits: K 64, 128 or 256, V a multiple of 64, bf16 or fp16, rows aligned to 16 bytes.
#pragma once

#include "gated_delta_bwd.cuh"

namespace hypenet::cuda::gated_delta::bwd::scan {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * arch::kWarpSize;
constexpr int kColumns = 32;  // of V, per block
constexpr int kRows = kChunk / kWarps;
static_assert(kRows == 16);

// The inputs of a chunk, without q. With one stage only k and the gates are there twice, L and dO apart.
template <class Element, int K, int kStages>
struct Stage {
  Tile<Element, kChunk, K> k;
  Tile<Element, kChunk, kChunk> L;
  Tile<Element, kChunk, kColumns> dO;
  float G[kChunk], beta[kChunk];
};
template <class Element, int K>
struct Stage<Element, K, 1> {
  Tile<Element, kChunk, K> k;
  float G[kChunk], beta[kChunk];
};

template <class Element, int kStages>
struct Apart {};
template <class Element>
struct Apart<Element, 1> {
  Tile<Element, kChunk, kChunk> apart_L;
  Tile<Element, kChunk, kColumns> apart_dO;
};

template <class Element_, int K_, Rule kRule, int kStages_>
struct Smem : Apart<Element_, kStages_> {
  using Element = Element_;
  static constexpr int K = K_, kStages = kStages_;
  static constexpr bool kDelta = kRule == Rule::kDelta;
  static constexpr int kStateRows = K / kWarps;  // of a warp
  // Steps of a sum over K in line. CUDA 12 spills with 16, and for 12.0 with 8 and one stage.
  static constexpr int kInLine = kStages == 1 ? 4 : K < 256 ? K / 16 : 8;

  using Stage = scan::Stage<Element, K, kStages>;
  Stage stages[2];
  Tile<Element, kChunk, K> q;
  union {
    Tile<Element, kChunk, kChunk> P;
    struct {
      Tile<Element, kChunk, kColumns> dB, dZ;
    } low;
  };
  Tile<Element, K, kColumns> dS;
  union {
    Tile<Element, K, kColumns> dS_low;
    Tile<Element, kChunk, kColumns> apart_dZ;
  };
  Tile<Element, kChunk, kColumns> scaled_dO, dE, dE_low;

  __device__ auto& L(Stage& stage) {
    if constexpr (kStages == 2) {
      return stage.L;
    } else {
      return this->apart_L;
    }
  }
  __device__ auto& dO(Stage& stage) {
    if constexpr (kStages == 2) {
      return stage.dO;
    } else {
      return this->apart_dO;
    }
  }
  __device__ auto& dZ(Stage& stage) {
    if constexpr (kStages == 2) {
      return stage.dO;
    } else {
      return apart_dZ;
    }
  }
};
constexpr size_t kSharedOfHopper = 228 * 1024, kReserved = 1024;  // of an SM, and of it per block
static_assert(2 * (sizeof(Smem<arch::bf16, 128, Rule::kDelta, 2>) + kReserved) <= kSharedOfHopper);
static_assert(sizeof(Smem<arch::bf16, 128, Rule::kDelta, 1>) <= 99 * 1024, "a block of 8.6, 8.9 and 12.0");

template <class Smem>
using State = float[Smem::kStateRows / 16][kColumns / 8][4];
using Product = float[1][kColumns / 8][4];

// The sequence or segment, head and columns of a block.
struct Place {
  Segment segment;
  Sequence span;  // the segment's tokens and chunks
  int64_t number, column;
  int head, key_head;

  __device__ explicit Place(const GatedDeltaBwdParams& params) {
    const unsigned num_tiles = static_cast<unsigned>(params.V) / kColumns;
    const unsigned block = arch::block_idx(), HV = static_cast<unsigned>(params.HV);
    column = block % num_tiles * kColumns;
    head = static_cast<int>(block / num_tiles % HV);
    key_head = head / static_cast<int>(HV / static_cast<unsigned>(params.H));
    number = block / num_tiles / HV;
    segment = gated_delta::segment(params, number);
    const Sequence& whole = segment.sequence;
    span = {whole.batch, whole.start + segment.first, segment.length,
            whole.first_chunk + segment.first / kChunk};
  }
  __device__ int64_t chunk(int64_t i) const { return span.first_chunk + i; }
};

template <class Smem>
__device__ __forceinline__ void copy_q_async(Smem& sm, const GatedDeltaBwdParams& params, const Place& place,
                                             int64_t i) {
  const int64_t token = place.span.start + i * kChunk;
  copy_tile_async<kThreads>(sm.q,
                            row_of<typename Smem::Element>(params.q, place.span.batch, token, place.key_head),
                            params.q.token, tokens_from(place.span, i * kChunk), arch::thread_idx());
}

template <class Smem>
__device__ __forceinline__ void copy_dO_async(Smem& sm, const GatedDeltaBwdParams& params, const Place& place,
                                              int64_t i) {
  const int64_t token = place.span.start + i * kChunk;
  copy_tile_async<kThreads>(
      sm.dO(sm.stages[i % 2]),
      row_of<typename Smem::Element>(params.do_, place.span.batch, token, place.head) + place.column,
      params.do_.token, tokens_from(place.span, i * kChunk), arch::thread_idx());
}

template <class Smem>
__device__ __forceinline__ void copy_L_async(Smem& sm, const GatedDeltaBwdParams& params, const Place& place,
                                             int64_t i) {
  const int64_t offset = (place.chunk(i) * params.HV + place.head) * kChunk * kChunk;
  copy_tile_async<kThreads>(sm.L(sm.stages[i % 2]),
                            static_cast<const typename Smem::Element*>(params.L) + offset, kChunk, kChunk,
                            arch::thread_idx());
}

// With one stage of L and dO, all but these.
template <class Smem>
__device__ __forceinline__ void copy_stage_async(Smem& sm, const GatedDeltaBwdParams& params,
                                                 const Place& place, int64_t i) {
  using Element = typename Smem::Element;
  auto& stage = sm.stages[i % 2];
  const int thread = arch::thread_idx(), num_tokens = tokens_from(place.span, i * kChunk);
  const int64_t batch = place.span.batch, token = place.span.start + i * kChunk;
  copy_tile_async<kThreads>(stage.k, row_of<Element>(params.k, batch, token, place.key_head), params.k.token,
                            num_tokens, thread);
  if constexpr (Smem::kStages == 2) {
    copy_dO_async(sm, params, place, i);
    if constexpr (Smem::kDelta) copy_L_async(sm, params, place, i);
  }
  copy_gates_async<Smem::kDelta>(stage.G, stage.beta, params, place.chunk(i), place.head, batch, token,
                                 num_tokens);
}

// The block's columns of state n of [n, HV, K, V].
template <class Smem, class Float>
__device__ __forceinline__ Float* columns_of(Float* states, int64_t n, const GatedDeltaBwdParams& params,
                                             const Place& place) {
  return states + (n * params.HV + place.head) * Smem::K * params.V + place.column;
}

// The gradient of the state after the segment; zeros where it is processed alone, as is no last one.
template <class Smem, bool kAlone>
__device__ __forceinline__ void load_state(State<Smem>& rS, const GatedDeltaBwdParams& params,
                                           const Place& place) {
  set_zero(rS);
  const bool last = place.segment.ends();
  const auto* states = last     ? static_cast<const float*>(params.dfinal_state)
                       : kAlone ? nullptr
                                : params.segment_states;
  if (states == nullptr) return;
  const float* from = columns_of<Smem>(states, last ? place.segment.n : place.number, params, place);
  for_each_element(rS, Smem::kStateRows * warp_idx(), 0,
                   [&](float& x, int row, int col) { x = from[row * params.V + col]; });
}

// The gradient of the state before the segment: in the place of the one after the segment before.
template <class Smem>
__device__ __forceinline__ void store_state(State<Smem>& rS, const GatedDeltaBwdParams& params,
                                            const Place& place) {
  const bool first = place.segment.starts();
  auto* states = first ? static_cast<float*>(params.dinitial_state) : params.segment_states;
  float* to = columns_of<Smem>(states, first ? place.segment.n : place.number - 1, params, place);
  for_each_element(rS, Smem::kStateRows * warp_idx(), 0,
                   [&](float& x, int row, int col) { to[row * params.V + col] = x; });
}

// (1) P, s gamma dO; dS_low
template <class Smem>
__device__ __forceinline__ void apply_decays(Smem& sm, typename Smem::Stage& stage, const State<Smem>& rS,
                                             float scale, bool compensated) {
  using Element = typename Smem::Element;
  const int row = kRows * warp_idx();
  float rP[1][kChunk / 8][4];
  set_zero(rP);
  multiply<Element, Smem::K, Smem::kInLine>(
      rP, [&](auto& a, int m, int k) { load_a(a, sm.q, row + m, k); },
      [&](auto& b, int k, int n) { load_b_transposed(b, stage.k, k, n); });
  for_each_element(rP, row, 0, [&](float& x, int i, int j) { x *= scale * decay_between(stage.G, i, j); });
  store_product(sm.P, row, 0, rP);
  if (compensated) store_low(sm.dS_low, Smem::kStateRows * warp_idx(), 0, rS);
  scale_rows<kThreads>(sm.scaled_dO, sm.dO(stage), [&](int i) { return scale * arch::exp2(stage.G[i]); });
}

// (2) dE; and of dS0 what does not need it
template <class Smem>
__device__ __forceinline__ void output_to_pseudo_values(Product& rdE, Smem& sm, typename Smem::Stage& stage,
                                                        State<Smem>& rS, bool compensated) {
  using Element = typename Smem::Element;
  const int row = kRows * warp_idx(), state_row = Smem::kStateRows * warp_idx();
  const float last = stage.G[kChunk - 1];
  set_zero(rdE);
  const auto add = [&](const auto& dS) {
    multiply<Element, Smem::K, Smem::kInLine>(
        rdE, [&](auto& a, int m, int k) { load_a(a, stage.k, row + m, k); },
        [&](auto& b, int k, int n) { load_b(b, dS, k, n); });
  };
  if (compensated) add(sm.dS_low);
  add(sm.dS);
  for_each_element(rdE, row, 0, [&](float& x, int i, int) { x *= decay_between(stage.G, kChunk - 1, i); });
  multiply<Element, kChunk>(
      rdE, [&](auto& a, int m, int k) { load_a_transposed(a, sm.P, row + m, k); },
      [&](auto& b, int k, int n) { load_b(b, sm.dO(stage), k, n); });
  store_product(sm.dE, row, 0, rdE);
  if constexpr (Smem::kDelta) store_low(sm.dE_low, row, 0, rdE);

  const float whole = arch::exp2(last);
  for_each_element(rS, 0, 0, [&](float& x, int, int) { x *= whole; });
  multiply<Element, kChunk>(
      rS, [&](auto& a, int m, int k) { load_a_transposed(a, sm.q, state_row + m, k); },
      [&](auto& b, int k, int n) { load_b(b, sm.scaled_dO, k, n); });
}

// Block (k, m) of L, k >= m, as operand A of its transpose.
template <class Tile>
__device__ __forceinline__ void load_inverse(uint32_t (&high)[4], uint32_t (&low)[4], const Tile& L, int m,
                                             int k) {
  load_a_transposed(high, L, m, k);
  load_a(low, L, m, k);
  if (k != m) return;
  keep_triangle<false, 1>(high);
  keep_triangle<false, 1>(low);
}

// (3) dB, at first dE, in place of s gamma dO; dZ
template <class Smem>
__device__ __forceinline__ void solve(Product& rdB, Smem& sm, typename Smem::Stage& stage, bool compensated) {
  using Element = typename Smem::Element;
  const int row = kRows * warp_idx();
  for (int k = row; k < kChunk; k += 16) {
    uint32_t high[4], low[4];
    load_inverse(high, low, sm.L(stage), row, k);
#pragma unroll
    for (int n = 0; n < kColumns / 8; n += 2) {
      uint32_t b[2][2], b_low[2][2];
      load_b(b, sm.dE, k, 8 * n);
      load_b(b_low, sm.dE_low, k, 8 * n);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        arch::mma_16x8x16<Element>(rdB[0][n + i], low, b[i]);
        arch::mma_16x8x16<Element>(rdB[0][n + i], high, b_low[i]);
        arch::mma_16x8x16<Element>(rdB[0][n + i], high, b[i]);
      }
    }
  }
  store_product(sm.scaled_dO, row, 0, rdB);
  if (compensated) store_low(sm.low.dB, row, 0, rdB);
  for_each_element(rdB, row, 0, [&](float& x, int i, int) { x *= -arch::exp2(stage.G[i]) * stage.beta[i]; });
  store_product(sm.dZ(stage), row, 0, rdB);
  if (compensated) store_low(sm.low.dZ, row, 0, rdB);
}

// (4) dS0 += K^T dZ
template <class Smem>
__device__ __forceinline__ void update_state(State<Smem>& rS, Smem& sm, typename Smem::Stage& stage,
                                             bool compensated) {
  const int row = Smem::kStateRows * warp_idx();
  const auto add = [&](const auto& dZ) {
    multiply<typename Smem::Element, kChunk>(
        rS, [&](auto& a, int m, int k) { load_a_transposed(a, stage.k, row + m, k); },
        [&](auto& b, int k, int n) { load_b(b, dZ, k, n); });
  };
  if (compensated) add(sm.low.dZ);
  add(sm.dZ(stage));
}

// From which gradient of the state after it a segment starts: its own, or, where sequences are split, zero, for what
// that gives before the segment.
enum class Start { kGiven, kZero };

template <class Element, int K, Rule kRule, Start kStart, int kStages = 2>
struct Config {
  using Smem = scan::Smem<Element, K, kRule, kStages>;
  static constexpr bool kAlone = kStart == Start::kZero;
};

template <class C>
__device__ __forceinline__ void scan(const GatedDeltaBwdParams& params) {
  using Smem = typename C::Smem;
  using Element = typename Smem::Element;
  constexpr bool kAlone = C::kAlone, kSingle = Smem::kStages == 1;
  Smem& sm = arch::shared_memory<Smem>();
  const Place place(params);
  if (place.segment.n < 0 || (kAlone && place.segment.starts())) return;
  const int thread = arch::thread_idx();
  const int64_t num_chunks = (place.span.length + kChunk - 1) / kChunk;
  State<Smem> rS;
  load_state<Smem, kAlone>(rS, params, place);
  if (num_chunks > 0) {
    copy_q_async(sm, params, place, num_chunks - 1);
    copy_stage_async(sm, params, place, num_chunks - 1);
    if constexpr (kSingle) copy_dO_async(sm, params, place, num_chunks - 1);
    arch::commit_copies();
    if constexpr (kSingle && Smem::kDelta) {
      copy_L_async(sm, params, place, num_chunks - 1);
      arch::commit_copies();
    }
  }
  for (int64_t i = num_chunks - 1; i >= 0; --i) {
    auto& stage = sm.stages[i % 2];
    store_product(sm.dS, Smem::kStateRows * warp_idx(), 0, rS);  // (0)
    arch::wait_copies<kSingle && Smem::kDelta>();                // all but L
    arch::sync_block();
    if (i > 0) copy_stage_async(sm, params, place, i - 1);
    if constexpr (!kAlone) {
      store_tile<kThreads>(
          columns_of<Smem>(static_cast<Element*>(params.dstates), place.chunk(i), params, place), params.V,
          Smem::K, sm.dS, thread);
    }
    const bool compensated = Smem::kDelta && beta_exceeds_one(stage.beta);
    apply_decays(sm, stage, rS, static_cast<float>(params.scale), compensated);  // (1)
    arch::sync_block();
    Product product;
    output_to_pseudo_values(product, sm, stage, rS, compensated);  // (2)
    if constexpr (kSingle) arch::wait_copies<0>();
    arch::sync_block();
    if (i > 0) {
      copy_q_async(sm, params, place, i - 1);
      if constexpr (kSingle) copy_dO_async(sm, params, place, i - 1);
    }
    arch::commit_copies();
    if constexpr (Smem::kDelta) {
      solve(product, sm, stage, compensated);  // (3)
      arch::sync_block();
      if constexpr (kSingle) {
        if (i > 0) copy_L_async(sm, params, place, i - 1);
        arch::commit_copies();
      }
      update_state(rS, sm, stage, compensated);  // (4)
    }
    if constexpr (kAlone) continue;
    const int64_t token = place.span.start + i * kChunk, stride = params.HV * params.V;
    const int64_t to = (place.span.batch * params.T + token) * stride + place.head * params.V + place.column;
    const int num_tokens = tokens_from(place.span, i * kChunk);
    store_tile<kThreads>(static_cast<Element*>(params.dv) + to, stride, num_tokens,
                         Smem::kDelta ? sm.scaled_dO : sm.dE, thread);
    if (compensated) {
      store_tile<kThreads>(static_cast<Element*>(params.dB_low) + to, stride, num_tokens, sm.low.dB, thread);
    }
  }
  if (!kAlone && !place.segment.starts()) return;  // found already
  store_state<Smem>(rS, params, place);
}

// Empty where no GPU that runs this code has the shared memory.
template <class C>
__global__ void __launch_bounds__(kThreads, 2)
    gated_delta_bwd_scan_kernel(const __grid_constant__ GatedDeltaBwdParams params) {
  if constexpr (sizeof(typename C::Smem) <= arch::kMaxSharedBytes) scan<C>(params);
}

}  // namespace hypenet::cuda::gated_delta::bwd::scan
