// gated_delta_step and simple_gla_step: decode of T tokens (usually one) per sequence, the state updated in
// place.
//
// Math, per sequence and value head, S [K, V], gamma = e^{max(g, -50)}:
//   delta:  e = beta (v - gamma S^T k)      simple GLA:  e = v
//   o = scale (gamma S^T q + (q . k) e)     S <- gamma S + k e^T
// Written so, S^T q and S^T k are taken of the same old S: the state is read once and written once. With
// use_qk_l2norm, q and k stand for q / sqrt(q . q + eps) and k / sqrt(k . k + eps), factors of these sums.
//
// Shapes: as in GatedDeltaStepParams (params.h). state_indices [B]: a negative slot leaves every state as it
// is and gives o = 0; a slot that does not exist gives o = NaN. Two sequences must not name one slot.
//
// Mapping: a block owns kColumns columns of V of one (sequence, value head); blocks are numbered along x, the
// column tile fastest, then the head. A thread owns 4 adjacent columns and every kRowGroups-th row: a row of
// the tile is one 128-byte line, and all rows of a thread are in flight together. All warps do the same.
//   warp 0 .. kWarps - 1   its rows; waits at the one barrier of step (3) for the sums of the other warps
//
// Shared memory: sums [2][kWarps][kLanes] of 12 floats, 3 KB; written and read once a token, the two halves
// in turn, so that one barrier a token is enough. Registers hold the state for all T tokens.
//
// Numerics: fp32 throughout, inputs widened exactly, o rounded once. Every exponent taken is <= 0 for g <= 0.
// Sums over K run in a fixed order (rows of a thread, lanes, warps): results are bitwise repeatable and do
// not depend on the batch.
//
// Cost per (sequence, head): 8 K V bytes of state for all T tokens, 8 K V FLOPs a token: bound by memory.
//
// Limits: K <= kStepMaxKeyDim (rows past K are zero), any V (16-byte accesses where V is a multiple of 4 and
// the state is aligned, else 4-byte ones), fp32, bf16 or fp16, at most 2^31 - 1 blocks.
#include <limits>

#include "arch/sm80.cuh"
#include "dtype.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace hypenet::cuda {
namespace {

constexpr int kVector = 4;  // columns of a thread: 16 bytes of state
constexpr float kMinLogDecay = -50.0f;
constexpr float kNormEpsilon = 1e-6f;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

template <int Rows>
struct Tile {
  static constexpr int kRows = Rows;  // rows of the state in a thread's registers
  static constexpr int kThreads = 128;
  static constexpr int kWarps = kThreads / arch::kWarpSize;
  static constexpr int kLanes = 8;  // threads along a row
  static constexpr int kColumns = kLanes * kVector;
  static constexpr int kRowGroups = kThreads / kLanes;
  static constexpr int kKeyDim = kRows * kRowGroups;
  static constexpr int kBlocksPerProcessor = kRows > 8 ? 2 : 3;
  static_assert(arch::kWarpSize % kLanes == 0 && kColumns * sizeof(float) == 128);
};

// What a column group of a state needs of one token: sums over K.
struct alignas(16) Sums {
  float qS[kVector], kS[kVector];
  float qk, qq, kk, unused;
};

template <class Tile>
struct Smem {
  Sums sums[2][Tile::kWarps][Tile::kLanes];
};
static_assert(sizeof(Smem<Tile<8>>) == 3072);

// Where a thread stands. Offsets are in elements.
template <class Tile>
struct Place {
  int64_t b, slot;
  int head, column, row, warp, lane;

  __device__ explicit Place(const GatedDeltaStepParams& params) {
    const auto num_tiles = static_cast<unsigned>((params.V + Tile::kColumns - 1) / Tile::kColumns);
    const auto HV = static_cast<unsigned>(params.HV);
    const unsigned block = arch::block_idx(), tile = block % num_tiles, thread = arch::thread_idx();
    head = static_cast<int>(block / num_tiles % HV);
    b = block / num_tiles / HV;
    slot = params.state_indices == nullptr ? b : params.state_indices[b];
    lane = static_cast<int>(thread % Tile::kLanes);
    row = static_cast<int>(thread / Tile::kLanes);
    warp = static_cast<int>(thread / arch::kWarpSize);
    column = static_cast<int>(tile * Tile::kColumns) + lane * kVector;
  }

  __device__ bool writes_output() const { return row == 0; }
};

template <class Element>
__device__ __forceinline__ Element* token_row(const View& x, int64_t b, int64_t t, int64_t head) {
  return static_cast<Element*>(x.data) + b * x.batch + t * x.token + head * x.head;
}

__device__ __forceinline__ float token_scalar(const View& x, int64_t b, int64_t t, int64_t head) {
  return *token_row<const float>(x, b, t, head);
}

// Columns [0, left) of four; the rest zero.
__device__ __forceinline__ void load_columns(const float* from, int64_t left, bool aligned,
                                             float (&x)[kVector]) {
  if (aligned && left >= kVector) {
    const float4 four = arch::load_16_bytes_once(from);
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
  } else {
#pragma unroll
    for (int j = 0; j < kVector; ++j) x[j] = j < left ? from[j] : 0.0f;
  }
}

__device__ __forceinline__ void store_columns(float* to, int64_t left, bool aligned,
                                              const float (&x)[kVector]) {
  if (aligned && left >= kVector) {
    arch::store_16_bytes(to, float4{x[0], x[1], x[2], x[3]});
  } else {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      if (j < left) to[j] = x[j];
    }
  }
}

// Rows place.row, place.row + kRowGroups, ... of a [K] vector; zero past K.
template <class Tile, class Element>
__device__ __forceinline__ void load_rows(const Element* from, int row, int64_t K, float (&x)[Tile::kRows]) {
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    const int k = row + i * Tile::kRowGroups;
    x[i] = k < K ? to_float(from[k]) : 0.0f;
  }
}

template <class Tile>
__device__ __forceinline__ Sums sum_own_rows(const float (&rq)[Tile::kRows], const float (&rk)[Tile::kRows],
                                             const float (&rS)[Tile::kRows][kVector]) {
  Sums sums{};
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
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
template <class Tile>
__device__ __forceinline__ Sums sum_over_block(Sums own, Sums (&shared)[Tile::kWarps][Tile::kLanes],
                                               const Place<Tile>& place) {
#pragma unroll
  for (int mask = Tile::kLanes; mask < arch::kWarpSize; mask *= 2) {
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
  const bool first_row_of_warp = place.row % (arch::kWarpSize / Tile::kLanes) == 0;
  if (first_row_of_warp) shared[place.warp][place.lane] = own;
  arch::sync_block();
  Sums all = shared[0][place.lane];
#pragma unroll
  for (int warp = 1; warp < Tile::kWarps; ++warp) add(all, shared[warp][place.lane]);
  return all;
}

__device__ __forceinline__ void normalize(Sums& sums, float q_norm, float k_norm) {
#pragma unroll
  for (int j = 0; j < kVector; ++j) sums.qS[j] *= q_norm, sums.kS[j] *= k_norm;
  sums.qk *= q_norm * k_norm;
}

template <class Tile, class Element>
__device__ __forceinline__ void store_output(const GatedDeltaStepParams& params, const Place<Tile>& place,
                                             int64_t t, const float (&x)[kVector]) {
  auto* o = static_cast<Element*>(params.o) + ((place.b * params.T + t) * params.HV + place.head) * params.V;
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    if (place.column + j < params.V) from_float(o[place.column + j], x[j]);
  }
}

template <class Tile, class Element>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerProcessor)
    gated_delta_step_kernel(const __grid_constant__ GatedDeltaStepParams params) {
  const Place<Tile> place(params);
  auto& smem = arch::shared_memory<Smem<Tile>>();

  // (1) the state's tile; nothing to do without a state
  if (place.slot < 0 || place.slot >= params.num_slots) {
    const float value = place.slot < 0 ? 0.0f : kNaN;
    for (int64_t t = 0; t < params.T && place.writes_output(); ++t) {
      store_output<Tile, Element>(params, place, t, {value, value, value, value});
    }
    return;
  }
  const int64_t K = params.K, V = params.V, left = V - place.column;
  const bool aligned = V % kVector == 0 && reinterpret_cast<uintptr_t>(params.state) % 16 == 0;
  float* gS =
      static_cast<float*>(params.state) + (place.slot * params.HV + place.head) * K * V + place.column;
  float rS[Tile::kRows][kVector] = {};
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    const int k = place.row + i * Tile::kRowGroups;
    if (k < K) load_columns(gS + k * V, left, aligned, rS[i]);
  }

  const int64_t key_head = place.head / (params.HV / params.H);
  for (int64_t t = 0; t < params.T; ++t) {
    // (2) the token
    float rq[Tile::kRows], rk[Tile::kRows], e[kVector];
    load_rows<Tile>(token_row<const Element>(params.q, place.b, t, key_head), place.row, K, rq);
    load_rows<Tile>(token_row<const Element>(params.k, place.b, t, key_head), place.row, K, rk);
    const Element* gv = token_row<const Element>(params.v, place.b, t, place.head) + place.column;
#pragma unroll
    for (int j = 0; j < kVector; ++j) e[j] = j < left ? to_float(gv[j]) : 0.0f;
    const float g = token_scalar(params.g, place.b, t, place.head);
    const float gamma = expf(g < kMinLogDecay ? kMinLogDecay : g);

    // (3) sums over K of the old state
    Sums sums = sum_own_rows<Tile>(rq, rk, rS);
    sums = sum_over_block(sums, smem.sums[t % 2], place);
    const float q_norm = params.use_qk_l2norm ? rsqrtf(sums.qq + kNormEpsilon) : 1.0f;
    const float k_norm = params.use_qk_l2norm ? rsqrtf(sums.kk + kNormEpsilon) : 1.0f;
    normalize(sums, q_norm, k_norm);

    // (4) e = beta (v - gamma S^T k)
    if (params.delta) {
      const float beta = token_scalar(params.beta, place.b, t, place.head);
#pragma unroll
      for (int j = 0; j < kVector; ++j) e[j] = beta * (e[j] - gamma * sums.kS[j]);
    }

    // (5) o = scale (gamma S^T q + (q . k) e)
    if (place.writes_output()) {
      const float scale = static_cast<float>(params.scale);
      float o[kVector];
#pragma unroll
      for (int j = 0; j < kVector; ++j) o[j] = scale * (gamma * sums.qS[j] + sums.qk * e[j]);
      store_output<Tile, Element>(params, place, t, o);
    }

    // (6) S <- gamma S + k e^T
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) rS[i][j] = gamma * rS[i][j] + (k_norm * rk[i]) * e[j];
    }
  }

  // (7) the state goes back
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    const int k = place.row + i * Tile::kRowGroups;
    if (k < K) store_columns(gS + k * V, left, aligned, rS[i]);
  }
}

template <class Tile, class Element>
Status launch_step(const GatedDeltaStepParams& params, Stream stream) {
  const int64_t num_tiles = (params.V + Tile::kColumns - 1) / Tile::kColumns;
  return launch("gated_delta_step", gated_delta_step_kernel<Tile, Element>, params.B * params.HV * num_tiles,
                Tile::kThreads, sizeof(Smem<Tile>), stream, params);
}

}  // namespace

Status gated_delta_step(const GatedDeltaStepParams& params, Stream stream) {
  if (params.T == 0) return nullptr;
  return dispatch_dtype(params.dtype, [&]<class Element>() -> Status {
    if (params.K <= Tile<4>::kKeyDim) return launch_step<Tile<4>, Element>(params, stream);
    if (params.K <= Tile<8>::kKeyDim) return launch_step<Tile<8>, Element>(params, stream);
    static_assert(Tile<16>::kKeyDim == kStepMaxKeyDim);
    if (params.K <= kStepMaxKeyDim) return launch_step<Tile<16>, Element>(params, stream);
    return "K is larger than what is built for CUDA";
  });
}

}  // namespace hypenet::cuda
