// gated_delta_step and simple_gla_step: decode of T tokens (usually one) per sequence, the state updated in
// place.
//
// Math, per sequence and value head, S [K, V], gamma = e^{max(g, -50)}:
//   delta:  e = beta (v - gamma S^T k)      simple GLA:  e = v
//   o = scale (gamma S^T q + (q . k) e)     S <- gamma S + k e^T
// Written so, S^T q and S^T k are taken of the same old S: the state is read once and written once. With
// use_qk_l2norm, q and k stand for q / sqrt(q . q + eps) and k / sqrt(k . k + eps), factors of these sums.
// With A_log, g stands for -e^A_log softplus(g + dt_bias); with a beta_limit, beta for beta_limit
// sigmoid(beta).
//
// Shapes: as in GatedDeltaStepParams (params.h). state_indices [B]: a negative slot leaves every state as it
// is and gives o = 0; a slot that does not exist gives o = NaN. Two sequences must not name one slot. With
// `states`, the state after each token is stored there, and the slot keeps its own; a slot that is skipped or
// does not exist gives zeros or NaN there too.
//
// Mapping: a block owns kColumns columns of V of one (sequence, value head); blocks are numbered along x, the
// column tile fastest, then the head. A thread owns 4 adjacent columns of kRows adjacent rows: a row of the
// tile is one 128-byte line. There are as many threads as rows (64, 128 or 256), and thread i brings in
// element i of q and k, the first warp v, the last thread the gates. All warps do the same.
//   warp 0 .. kWarps - 1   its rows; waits for the token at the barrier of step (2), for the sums of the
//                          other warps at that of step (3)
//
// Shared memory, K = 128: tokens [2] of q, k [K], v [kColumns], gamma, beta, 2.3 KB, in turn; sums
// [kWarps][kLanes] of 12 floats, 1.5 KB. Registers hold the state for all T tokens.
//
// Pipeline: all loads of a block's state are under way at once: 128 bytes a thread, 16 KB a block at K = 128.
// With K = V = 128 (or 64) 5 (10) blocks live on an SM, 96 registers a thread: 80 KB of loads, and
// while some blocks wait for loads, others reduce or store. Little's law asks for 4.3 TB/s x 1 us / 132 = 33
// KB an SM under way, loads and stores together, and for 54 KB at 8 TB/s and 148 SMs. Other
// dimensions cost registers for addresses and tails: 64 KB.
//
// Numerics: fp32 throughout, inputs widened exactly, o rounded once. Every exponent taken is <= 0 for g <= 0,
// but for that of A_log. Sums over K run in a fixed order (rows of a thread, lanes, warps): results are
// bitwise repeatable and do not depend on the batch.
//
// Cost per (sequence, head): 8 K V bytes of state for all T tokens, 8 K V FLOPs a token: bound by memory.
//
// Limits: K <= kStepMaxKeyDim (rows past K are zero), any V (16-byte accesses where V is a multiple of 4 and
// the state is aligned, else 4-byte ones), fp32, bf16 or fp16, at most 2^31 - 1 blocks.
#pragma once

#include <limits>

#include "arch/sm80.cuh"
#include "numbers.h"
#include "view.cuh"

namespace hypenet::cuda::gated_delta::step {

constexpr int kVector = 4;  // columns of a thread: 16 bytes of state
constexpr float kNormEpsilon = 1e-6f;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// kSquare: K = V = kThreads, and the state's rows are whole 16-byte pieces. The distance of two rows is then
// a constant, and one address serves all of them.
enum class State { kAny, kSquare };

// Threads of an SM: 96 registers each for a square state, 128 for others. With 64 threads a block CUDA 12 keeps 4
// bytes of a square state in local memory if it has no more than 96.
template <int kThreads, State kState>
constexpr int kMostThreads = kState == State::kSquare ? 640 : 512;
#if __CUDACC_VER_MAJOR__ == 12
template <>
constexpr int kMostThreads<64, State::kSquare> = 512;
#endif

template <int Threads, State kState>
struct Config {
  static constexpr int kThreads = Threads;
  static constexpr bool kSquare = kState == State::kSquare;
  static constexpr int kWarps = kThreads / arch::kWarpSize;
  static constexpr int kRows = 8;   // rows of the state in a thread's registers
  static constexpr int kLanes = 8;  // threads along a row
  static constexpr int kColumns = kLanes * kVector;
  static constexpr int kKeyDim = kThreads / kLanes * kRows;
  static constexpr int kBlocksPerProcessor = kMostThreads<Threads, kState> / kThreads;
  static_assert(kKeyDim == kThreads && kColumns * sizeof(float) == 128);
  static_assert(arch::kWarpSize % kLanes == 0 && kRows % kVector == 0);
};

__host__ __device__ __forceinline__ bool whole_vectors(const GatedDeltaStepParams& params) {
  const auto addresses =
      reinterpret_cast<uintptr_t>(params.state) | reinterpret_cast<uintptr_t>(params.states);
  return params.V % kVector == 0 && params.slot_stride % kVector == 0 && addresses % 16 == 0;
}

// The sums over K that a column group of a state needs for one token.
struct alignas(16) Sums {
  float qS[kVector], kS[kVector];
  float qk, qq, kk, unused;
};

// A token as fp32: q and k whole, zero past K; the block's columns of v; gamma; beta.
template <class C>
struct alignas(16) Token {
  float q[C::kKeyDim], k[C::kKeyDim], v[C::kColumns];
  float gamma, beta;
};

template <class C>
struct Smem {
  Token<C> tokens[2];
  Sums sums[C::kWarps][C::kLanes];
};
static_assert(sizeof(Smem<Config<128, State::kSquare>>) == 3872);

// Where a thread stands. Offsets are in elements.
template <class C>
struct Place {
  int64_t b, slot;
  int head, key_head, column, row, warp, lane;

  __device__ explicit Place(const GatedDeltaStepParams& params) {
    const auto num_tiles = static_cast<unsigned>((params.V + C::kColumns - 1) / C::kColumns);
    const auto HV = static_cast<unsigned>(params.HV);
    const unsigned block = arch::block_idx(), tile = block % num_tiles, thread = arch::thread_idx();
    head = static_cast<int>(block / num_tiles % HV);
    key_head = head / static_cast<int>(HV / static_cast<unsigned>(params.H));
    b = block / num_tiles / HV;
    slot = slot_of(params, b);
    lane = static_cast<int>(thread % C::kLanes);
    row = static_cast<int>(thread / C::kLanes) * C::kRows;
    warp = static_cast<int>(thread / arch::kWarpSize);
    column = static_cast<int>(tile * C::kColumns) + lane * kVector;
  }

  __device__ bool writes_output() const { return row == 0; }
};

template <class Element>
__device__ __forceinline__ float load_gate(const View& x, bool in_dtype, int64_t b, int64_t t, int64_t head) {
  return in_dtype ? to_float(*row_of<Element>(x, b, t, head)) : *row_of<float>(x, b, t, head);
}

// gamma = e^{max(g, -50)}
template <class Element>
__device__ __forceinline__ float decay(const GatedDeltaStepParams& params, int64_t b, int64_t t, int head) {
  float g = load_gate<Element>(params.g, params.gates_in_dtype, b, t, head);
  if (params.A_log != nullptr) {
    if (params.dt_bias != nullptr) g += static_cast<const float*>(params.dt_bias)[head];
    const float softplus = fmaxf(g, 0.0f) + log1pf(expf(-fabsf(g)));
    g = -expf(static_cast<const float*>(params.A_log)[head]) * softplus;
  }
  return expf(g < kMinLogDecay ? kMinLogDecay : g);
}

template <class Element>
__device__ __forceinline__ float write_strength(const GatedDeltaStepParams& params, int64_t b, int64_t t,
                                                int head) {
  const float beta = load_gate<Element>(params.beta, params.gates_in_dtype, b, t, head);
  return params.beta_limit == 0 ? beta : static_cast<float>(params.beta_limit) / (1.0f + expf(-beta));
}

// The thread's share of a token, to shared memory: its element of q and k; the first warp v; one thread the
// gates.
template <class C, class Element>
__device__ __forceinline__ void bring_token(const GatedDeltaStepParams& params, const Place<C>& place,
                                            int64_t t, Token<C>& token) {
  static_assert(C::kColumns == arch::kWarpSize);
  const int i = arch::thread_idx();
  const bool exists = i < params.K;
  token.q[i] = exists ? to_float(row_of<Element>(params.q, place.b, t, place.key_head)[i]) : 0.0f;
  token.k[i] = exists ? to_float(row_of<Element>(params.k, place.b, t, place.key_head)[i]) : 0.0f;
  if (place.warp == 0) {
    const int column = place.column - place.lane * kVector + i;
    const Element* gv = row_of<Element>(params.v, place.b, t, place.head);
    token.v[i] = column < params.V ? to_float(gv[column]) : 0.0f;
  }
  if (i == C::kThreads - 1) {
    token.gamma = decay<Element>(params, place.b, t, place.head);
    token.beta = params.delta ? write_strength<Element>(params, place.b, t, place.head) : 0.0f;
  }
}

// A thread's part of the state: rows from `row` on, of K; four columns from `column` on, of V.
template <class C>
struct StateTile {
  float* first;
  int64_t stride;
  int rows, columns;  // that exist
  bool vectors;       // whole 16-byte pieces

  // state: [HV, K, V]
  __device__ StateTile(const GatedDeltaStepParams& params, const Place<C>& place, float* state)
      : first(state + (place.head * params.K + place.row) * params.V + place.column),
        stride(C::kSquare ? C::kThreads : params.V),
        rows(C::kSquare ? C::kRows : static_cast<int>(params.K) - place.row),
        columns(C::kSquare ? kVector : static_cast<int>(params.V - place.column)),
        vectors(C::kSquare || whole_vectors(params)) {}

  // Zero where there is nothing.
  __device__ __forceinline__ void load(float (&rS)[C::kRows][kVector]) const {
#pragma unroll
    for (int i = 0; i < C::kRows; ++i) {
      const float* from = first + i * stride;
      float4 x{};
      if (vectors) {
        if (i < rows && columns > 0) x = arch::load_16_bytes_once(from);
      } else if (i < rows) {
        x = {columns > 0 ? from[0] : 0, columns > 1 ? from[1] : 0, columns > 2 ? from[2] : 0,
             columns > 3 ? from[3] : 0};
      }
      rS[i][0] = x.x, rS[i][1] = x.y, rS[i][2] = x.z, rS[i][3] = x.w;
    }
  }

  __device__ __forceinline__ void store(const float (&rS)[C::kRows][kVector]) const {
#pragma unroll
    for (int i = 0; i < C::kRows; ++i) {
      float* to = first + i * stride;
      if (vectors) {
        if (i < rows && columns > 0) arch::store_16_bytes(to, float4{rS[i][0], rS[i][1], rS[i][2], rS[i][3]});
      } else if (i < rows) {
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          if (j < columns) to[j] = rS[i][j];
        }
      }
    }
  }
};

// The thread's part of states[b, t].
template <class C>
__device__ __forceinline__ StateTile<C> state_after(const GatedDeltaStepParams& params, const Place<C>& place,
                                                    int64_t t) {
  const int64_t size = params.HV * params.K * params.V;
  return {params, place, static_cast<float*>(params.states) + (place.b * params.T + t) * size};
}

// The thread's rows of a [kKeyDim] vector in shared memory.
template <class C>
__device__ __forceinline__ void load_rows(const float* vector, int row, float (&x)[C::kRows]) {
#pragma unroll
  for (int i = 0; i < C::kRows; i += kVector) {
    const float4 four = *reinterpret_cast<const float4*>(vector + row + i);
    x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
  }
}

template <class C>
__device__ __forceinline__ Sums sum_own_rows(const Token<C>& token, int row,
                                             const float (&rS)[C::kRows][kVector]) {
  float rq[C::kRows], rk[C::kRows];
  load_rows<C>(token.q, row, rq);
  load_rows<C>(token.k, row, rk);
  Sums sums{};
#pragma unroll
  for (int i = 0; i < C::kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      sums.qS[j] += rq[i] * rS[i][j];
      sums.kS[j] += rk[i] * rS[i][j];
    }
    sums.qk += rq[i] * rk[i];
    sums.qq += rq[i] * rq[i];
    sums.kk += rk[i] * rk[i];
  }
  return sums;
}

__device__ __forceinline__ void add(Sums& to, const Sums& from) {
#pragma unroll
  for (int j = 0; j < kVector; ++j) to.qS[j] += from.qS[j], to.kS[j] += from.kS[j];
  to.qk += from.qk, to.qq += from.qq, to.kk += from.kk;
}

// The rows of all threads of the block that share these columns: across the warp by shuffles, across warps
// through shared memory.
template <class C>
__device__ __forceinline__ Sums sum_over_block(Sums own, Sums (&shared)[C::kWarps][C::kLanes],
                                               const Place<C>& place) {
#pragma unroll
  for (int mask = C::kLanes; mask < arch::kWarpSize; mask *= 2) {
    Sums other;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      other.qS[j] = arch::shuffle_xor(own.qS[j], mask);
      other.kS[j] = arch::shuffle_xor(own.kS[j], mask);
    }
    other.qk = arch::shuffle_xor(own.qk, mask);
    other.qq = arch::shuffle_xor(own.qq, mask);
    other.kk = arch::shuffle_xor(own.kk, mask);
    add(own, other);
  }
  const bool first_row_of_warp = place.row % (arch::kWarpSize / C::kLanes * C::kRows) == 0;
  if (first_row_of_warp) shared[place.warp][place.lane] = own;
  arch::sync_block();
  Sums all = shared[0][place.lane];
#pragma unroll 1
  for (int warp = 1; warp < C::kWarps; ++warp) add(all, shared[warp][place.lane]);
  return all;
}

__device__ __forceinline__ void normalize(Sums& sums, float q_norm, float k_norm) {
#pragma unroll
  for (int j = 0; j < kVector; ++j) sums.qS[j] *= q_norm, sums.kS[j] *= k_norm;
  sums.qk *= q_norm * k_norm;
}

template <class C, class Element>
__device__ __forceinline__ void store_output(const GatedDeltaStepParams& params, const Place<C>& place,
                                             int64_t t, const float (&x)[kVector]) {
  auto* o = static_cast<Element*>(params.o) + ((place.b * params.T + t) * params.HV + place.head) * params.V;
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    if (place.column + j < params.V) from_float(o[place.column + j], x[j]);
  }
}

template <class C, class Element>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksPerProcessor)
    gated_delta_step_kernel(const __grid_constant__ GatedDeltaStepParams params) {
  const Place<C> place(params);
  auto& smem = arch::shared_memory<Smem<C>>();

  // (1) the state's tile; nothing to do without a state
  if (place.slot < 0 || place.slot >= params.num_slots) {
    const float value = place.slot < 0 ? 0.0f : kNaN;
    float rS[C::kRows][kVector];
#pragma unroll
    for (int i = 0; i < C::kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) rS[i][j] = value;
    }
    for (int64_t t = 0; t < params.T; ++t) {
      if (place.writes_output()) store_output<C, Element>(params, place, t, rS[0]);
      if (params.states != nullptr) state_after(params, place, t).store(rS);
    }
    return;
  }
  const StateTile<C> tile(params, place,
                          static_cast<float*>(params.state) + place.slot * slot_stride(params));
  float rS[C::kRows][kVector];
  tile.load(rS);

  for (int64_t t = 0; t < params.T; ++t) {
    // (2) the token
    Token<C>& token = smem.tokens[t % 2];
    bring_token<C, Element>(params, place, t, token);
    arch::sync_block();

    // (3) sums over K of the old state
    Sums sums = sum_own_rows<C>(token, place.row, rS);
    sums = sum_over_block(sums, smem.sums, place);
    const float q_norm = params.use_qk_l2norm ? rsqrtf(sums.qq + kNormEpsilon) : 1.0f;
    const float k_norm = params.use_qk_l2norm ? rsqrtf(sums.kk + kNormEpsilon) : 1.0f;
    normalize(sums, q_norm, k_norm);

    // (4) e = beta (v - gamma S^T k)
    float e[kVector];
    const float gamma = token.gamma, beta = token.beta;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float v = token.v[place.lane * kVector + j];
      e[j] = params.delta ? beta * (v - gamma * sums.kS[j]) : v;
    }

    // (5) o = scale (gamma S^T q + (q . k) e)
    if (place.writes_output()) {
      const float scale = static_cast<float>(params.scale);
      float o[kVector];
#pragma unroll
      for (int j = 0; j < kVector; ++j) o[j] = scale * (gamma * sums.qS[j] + sums.qk * e[j]);
      store_output<C, Element>(params, place, t, o);
    }

    // (6) S <- gamma S + k e^T
    float rk[C::kRows];
    load_rows<C>(token.k, place.row, rk);
#pragma unroll
    for (int i = 0; i < C::kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) rS[i][j] = gamma * rS[i][j] + (k_norm * rk[i]) * e[j];
    }
    if (params.states != nullptr) state_after(params, place, t).store(rS);
  }

  // (7) the state goes back
  if (params.states == nullptr) tile.store(rS);
}

}  // namespace hypenet::cuda::gated_delta::step
