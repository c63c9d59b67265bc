// The short causal depthwise convolution of recurrent layers: forward, backward, and the decode update.
//
// Math, per channel, with W taps; p is the position of token t in its sequence:
//   z_t = bias + sum_d weight_{W-1-d} x_{t-d},  d = 0 ... W-1;  for d > p, x_{t-d} is initial_state_{W-1+p-d}, or 0
//   y_t = z_t, or silu(z_t) = z_t sigmoid(z_t)
// Backward: (1) dz_t = dy_t, or dy_t sigmoid(z_t) (1 + z_t (1 - sigmoid(z_t)))
//   (2) dx_t = sum_d weight_{W-1-d} dz_{t+d} over the tokens t + d of the same sequence
//   (3) dinitial_state_i = sum_r weight_{i-r} dz_r over the first tokens r <= i of a sequence
//   (4) dweight_{W-1-d} = sum_t dz_t x_{t-d}, dbias = sum_t dz_t: per block of tokens, then over blocks in order
//
// Shapes: CausalConv1d*Params (params.h). Tokens of no sequence get y = 0 and no gradient.
//
// Mapping: forward and backward: a block is kConvBlock tokens of kThreads channel vectors of one batch. (0) Each of its
// first threads finds the sequence of one token, by bisection of cu_seqlens or from the values of seq_idx before it.
// Then a thread walks along the tokens with the last W inputs of kVec channels in registers: 16 bytes of x, in the
// backward 4 elements, or one element where C or an address is no multiple of these. The backward keeps the last W of
// dz and the sums of dweight too (of 8 channels they would take the registers of half the blocks of an SM), and
// runs W - 1 tokens past its block to finish the last dx; so two blocks compute those dz, the same bits. A second
// kernel, a thread per column, adds the blocks' parts of dweight. Update: a thread owns one channel of one sequence.
//
// Shared memory: places [kConvBlock + W - 1], of the block's tokens and those after it. Barriers: one, after (0).
// Numerics: fp32; one rounding at each store. Every sum has a fixed order: results are bitwise repeatable, and do not
// depend on the rest of the batch. sigmoid takes e^-|z|, which does not overflow.
//
// Cost per element: forward 2 W FLOPs and one read and write, backward 6 W and two reads and a write: bound by memory.
//
// Limits: W = 2, 3, 4; fp32, bf16, fp16; 2^31 - 1 blocks.
#pragma once

#include <limits>
#include <type_traits>

#include "arch/sm80.cuh"
#include "view.cuh"

namespace hypenet::cuda::causal_conv1d {

constexpr int kThreads = 128;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

template <class Element, int W_, int Vec>
struct Config {
  using Type = Element;
  static constexpr int W = W_, kVec = Vec;
  static_assert(kVec == 1 || kVec * sizeof(Element) == 8 || kVec * sizeof(Element) == 16);
};

template <class C>
using Values = float[C::kVec];

__device__ __forceinline__ float sigmoid(float z) {
  const float e = expf(-fabsf(z)), s = 1.0f / (1.0f + e);
  return z < 0.0f ? e * s : s;
}

// kVec channels of a row.
template <class C>
__device__ __forceinline__ void load(Values<C>& to, const typename C::Type* from) {
  if constexpr (C::kVec == 1) {
    to[0] = to_float(*from);
  } else {
    alignas(16) typename C::Type x[C::kVec];
    if constexpr (sizeof(x) == 8) {
      *reinterpret_cast<uint2*>(x) = arch::load_8_bytes(from);
    } else {
      *reinterpret_cast<uint4*>(x) = arch::load_16_bytes(from);
    }
#pragma unroll
    for (int i = 0; i < C::kVec; ++i) to[i] = to_float(x[i]);
  }
}

template <class C>
__device__ __forceinline__ void store(typename C::Type* to, const Values<C>& from) {
  alignas(16) typename C::Type x[C::kVec];
#pragma unroll
  for (int i = 0; i < C::kVec; ++i) from_float(x[i], from[i]);
  if constexpr (C::kVec == 1) {
    *to = x[0];
  } else if constexpr (sizeof(x) == 8) {
    arch::store_8_bytes(to, *reinterpret_cast<const uint2*>(x));
  } else {
    arch::store_16_bytes(to, *reinterpret_cast<const uint4*>(x));
  }
}

template <class C>
__device__ __forceinline__ void set_zero(Values<C>& x) {
#pragma unroll
  for (int i = 0; i < C::kVec; ++i) x[i] = 0.0f;
}

template <class C>
__device__ __forceinline__ void copy(Values<C>& to, const Values<C>& from) {
#pragma unroll
  for (int i = 0; i < C::kVec; ++i) to[i] = from[i];
}

// Calls run(address) with the address of a weight in its type.
template <class Run>
__device__ __forceinline__ void with_type(DType dtype, const void* address, Run&& run) {
  switch (dtype) {
    case DType::kFloat64:
      return run(static_cast<const double*>(address));
    case DType::kFloat32:
      return run(static_cast<const float*>(address));
    case DType::kBFloat16:
      return run(static_cast<const arch::bf16*>(address));
    case DType::kFloat16:
      return run(static_cast<const arch::fp16*>(address));
  }
}

template <class Weight>
__device__ __forceinline__ float weight_to_float(Weight x) {
  if constexpr (std::is_same_v<Weight, double>) {
    return static_cast<float>(x);
  } else {
    return to_float(x);
  }
}

// The weights of kVec channels from `channel` on.
template <int W, int kVec>
struct Filters {
  float weight[W][kVec], bias[kVec];

  __device__ void load(const CausalConv1dOperands& p, int64_t channel) {
    with_type(p.weight_dtype, p.weight.data, [&](const auto* x) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
#pragma unroll
        for (int k = 0; k < W; ++k)
          weight[k][i] = weight_to_float(x[(channel + i) * p.weight.token + k * p.weight.head]);
      }
    });
#pragma unroll
    for (int i = 0; i < kVec; ++i) bias[i] = 0.0f;
    if (p.bias.data == nullptr) return;
    with_type(p.bias_dtype, p.bias.data, [&](const auto* x) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) bias[i] = weight_to_float(x[(channel + i) * p.bias.token]);
    });
  }
};

// The sequence of a token.
struct Place {
  int sequence, position;  // -1: none; the number of earlier tokens of the sequence, at most W - 1
};

// The tokens of a block, and the W - 1 after it.
template <int W>
struct Smem {
  Place places[kConvBlock + W - 1];
};
static_assert(sizeof(Smem<4>::places) / sizeof(Place) <= kThreads);

// (0)
template <int W>
__device__ __forceinline__ Place find_place(const CausalConv1dSequences& p, int64_t b, int64_t t) {
  if (t >= p.T) return {-1, 0};
  int position = 0;
  if (p.cu_seqlens.data != nullptr) {
    int64_t low = 0, high = p.N + 1;  // bounds before `low` are at most t, those from `high` on are greater
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (index_at(p.cu_seqlens, middle) <= t) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    if (low == 0 || low > p.N) return {-1, 0};
    const int64_t bound = index_at(p.cu_seqlens, low - 1), first = bound < 0 ? 0 : bound;
    return {static_cast<int>(low - 1), t - first < W - 1 ? static_cast<int>(t - first) : W - 1};
  }
  if (p.seq_idx.data == nullptr) return {static_cast<int>(b), t < W - 1 ? static_cast<int>(t) : W - 1};
  const int64_t token = b * p.T + t, value = index_at(p.seq_idx, token);
  while (position < W - 1 && position < t && index_at(p.seq_idx, token - position - 1) == value) ++position;
  return {value < 0 ? -1 : static_cast<int>(b), position};
}

// A thread's channels and its block's tokens; the last W inputs as it walks along them.
template <class C, class Params>
struct Walk {
  using Element = typename C::Type;
  const Params& params;
  int64_t b, block, start, stop;
  unsigned channel;
  Filters<C::W, C::kVec> filters;
  Values<C> window[C::W];

  __device__ explicit Walk(const Params& p) : params(p) {
    const unsigned panels = (static_cast<unsigned>(p.C) + kThreads * C::kVec - 1) / (kThreads * C::kVec);
    const int64_t blocks = (p.T + kConvBlock - 1) / kConvBlock;
    block = arch::block_idx() / panels;
    channel = (arch::block_idx() % panels * kThreads + arch::thread_idx()) * C::kVec;
    b = block / blocks;
    start = block % blocks * kConvBlock;
    stop = start + kConvBlock < p.T ? start + kConvBlock : p.T;
    auto& smem = arch::shared_memory<Smem<C::W>>();
    const int i = arch::thread_idx();
    if (i < kConvBlock + C::W - 1) {
      const Place found = find_place<C::W>(p, b, start + i);
      smem.places[i] = found;
    }
    arch::sync_block();
    if (is_inside()) filters.load(p, channel);
  }

  __device__ bool is_inside() const { return channel < params.C; }
  __device__ Place place(int64_t t) const { return arch::shared_memory<Smem<C::W>>().places[t - start]; }
  __device__ const Element* row(const View& x, int64_t t) const {
    return static_cast<const Element*>(x.data) + b * x.batch + t * x.token + channel;
  }
  __device__ int64_t offset(int64_t t) const { return (b * params.T + t) * params.C + channel; }
  __device__ int64_t initial_offset(int64_t n, int64_t i) const {
    return (n * (C::W - 1) + i) * params.C + channel;
  }

  // The W - 1 inputs before token t, into all of the window but its last.
  __device__ void look_back(int64_t t, const Place& place) {
#pragma unroll
    for (int d = 1; d < C::W; ++d) {
      Values<C>& x = window[C::W - 1 - d];
      set_zero<C>(x);
      if (d <= place.position) {
        load<C>(x, row(params.x, t - d));
      } else if (params.initial_states != nullptr) {
        const auto* states = static_cast<const Element*>(params.initial_states);
        load<C>(x, states + initial_offset(place.sequence, C::W - 1 + place.position - d));
      }
    }
  }

  // Reads token t and computes its z.
  __device__ void advance(int64_t t, Values<C>& z) {
    load<C>(window[C::W - 1], row(params.x, t));
#pragma unroll
    for (int i = 0; i < C::kVec; ++i) {
      z[i] = filters.bias[i];
#pragma unroll
      for (int k = 0; k < C::W; ++k) z[i] += filters.weight[k][i] * window[k][i];
    }
  }

  __device__ void shift() {
#pragma unroll
    for (int k = 0; k + 1 < C::W; ++k) copy<C>(window[k], window[k + 1]);
  }
};

template <class C>
__global__ void __launch_bounds__(kThreads)
    causal_conv1d_fwd_kernel(const __grid_constant__ CausalConv1dFwdParams params) {
  Walk<C, CausalConv1dFwdParams> walk(params);
  if (!walk.is_inside()) return;
  auto* y = static_cast<typename C::Type*>(params.y);
  for (int64_t t = walk.start; t < walk.stop; ++t) {
    Values<C> z;
    const Place place = walk.place(t);
    if (place.sequence < 0) {
      set_zero<C>(z);
      store<C>(y + walk.offset(t), z);
      continue;
    }
    if (t == walk.start || place.position == 0) walk.look_back(t, place);
    walk.advance(t, z);
    if (params.silu) {
#pragma unroll
      for (int i = 0; i < C::kVec; ++i) z[i] *= sigmoid(z[i]);
    }
    store<C>(y + walk.offset(t), z);
    walk.shift();
  }
}

template <class C>
__global__ void __launch_bounds__(kThreads)
    causal_conv1d_bwd_kernel(const __grid_constant__ CausalConv1dBwdParams params) {
  constexpr int W = C::W;
  Walk<C, CausalConv1dBwdParams> walk(params);
  if (!walk.is_inside()) return;
  using Element = typename C::Type;
  Values<C> dweight[W], dbias, dz[W];  // dz of the last W tokens, the newest last
  set_zero<C>(dbias);
#pragma unroll
  for (int k = 0; k < W; ++k) {
    set_zero<C>(dweight[k]);
    set_zero<C>(dz[k]);
  }
  unsigned breaks = 0;  // bit d: the token W - 1 - d before is the first of a sequence, or of none
  for (int64_t t = walk.start; t < walk.stop + W - 1; ++t) {
    breaks >>= 1;
#pragma unroll
    for (int k = 0; k + 1 < W; ++k) copy<C>(dz[k], dz[k + 1]);
    Values<C>& now = dz[W - 1];
    set_zero<C>(now);
    const Place place = walk.place(t);
    if (place.sequence < 0 || place.position == 0) breaks |= 1u << (W - 1);
    if (place.sequence >= 0) {  // (1)
      if (t == walk.start || place.position == 0) walk.look_back(t, place);
      Values<C> z;
      walk.advance(t, z);
      load<C>(now, walk.row(params.dy, t));
#pragma unroll
      for (int i = 0; i < C::kVec; ++i) {
        if (params.silu) {
          const float s = sigmoid(z[i]);
          now[i] *= s * (1.0f + z[i] * (1.0f - s));
        }
      }
#pragma unroll
      for (int i = 0; i < C::kVec && t < walk.stop; ++i) {  // (4)
        dbias[i] += now[i];
#pragma unroll
        for (int k = 0; k < W; ++k) dweight[k][i] += now[i] * walk.window[k][i];
      }
      walk.shift();
    }
    const int64_t done = t - (W - 1);  // every dz that its dx takes is there
    if (done < walk.start) continue;
    Values<C> dx;
    set_zero<C>(dx);
#pragma unroll
    for (int d = 0; d < W; ++d) {  // (2), up to the end of the sequence
#pragma unroll
      for (int i = 0; i < C::kVec; ++i) {
        if ((breaks & ((2u << d) - 2)) == 0) dx[i] += walk.filters.weight[W - 1 - d][i] * dz[d][i];
      }
    }
    store<C>(static_cast<Element*>(params.dx) + walk.offset(done), dx);
    if (params.dinitial_states == nullptr || breaks % 2 == 0) continue;
    const int n = walk.place(done).sequence;
    if (n < 0) continue;
    auto* dinitial = static_cast<Element*>(params.dinitial_states);
#pragma unroll
    for (int j = 0; j < W - 1; ++j) {  // (3)
      set_zero<C>(dx);
#pragma unroll
      for (int r = 0; r <= j; ++r) {
#pragma unroll
        for (int i = 0; i < C::kVec; ++i) {
          if ((breaks & ((2u << r) - 2)) == 0) dx[i] += walk.filters.weight[j - r][i] * dz[r][i];
        }
      }
      store<C>(dinitial + walk.initial_offset(n, j), dx);
    }
  }
  float* partial = static_cast<float*>(params.partials) + walk.block * (W + 1) * params.C + walk.channel;
#pragma unroll
  for (int i = 0; i < C::kVec; ++i) {
#pragma unroll
    for (int k = 0; k < W; ++k) partial[k * params.C + i] = dweight[k][i];
    partial[W * params.C + i] = dbias[i];
  }
}

// (4) over the blocks
static __global__ void __launch_bounds__(kThreads)
    causal_conv1d_sum_kernel(const __grid_constant__ CausalConv1dBwdParams params) {
  const int64_t column = int64_t{arch::block_idx()} * kThreads + arch::thread_idx(),
                columns = (params.W + 1) * params.C;
  if (column >= columns) return;
  const float* partial = static_cast<const float*>(params.partials) + column;
  float sum = 0.0f;
  for (int64_t i = 0; i < params.num_blocks; ++i) sum += partial[i * columns];
  static_cast<float*>(params.dweight)[column] = sum;
}

template <class C>
__global__ void __launch_bounds__(kThreads)
    causal_conv1d_update_kernel(const __grid_constant__ CausalConv1dUpdateParams params) {
  using Element = typename C::Type;
  constexpr int W = C::W;
  const int64_t thread = int64_t{arch::block_idx()} * kThreads + arch::thread_idx();
  const int64_t b = thread / params.C, c = thread % params.C, L = params.L;
  if (b >= params.B) return;
  const int64_t slot = params.state_indices.data == nullptr ? b : index_at(params.state_indices, b);
  auto* y = static_cast<Element*>(params.y) + b * params.T * params.C + c;
  if (slot < 0 || slot >= params.num_slots) {
    const float fill = slot < 0 ? 0.0f : kNaN;
    for (int64_t t = 0; t < params.T; ++t) from_float(y[t * params.C], fill);
    return;
  }
  auto* state = static_cast<Element*>(params.conv_state.data) + slot * params.conv_state.batch +
                c * params.conv_state.token;
  const auto* x = static_cast<const Element*>(params.x.data) + b * params.x.batch + c * params.x.head;
  const int64_t step = params.conv_state.head;
  const bool ring = params.cache_seqlens.data != nullptr;
  const int64_t length = ring ? index_at(params.cache_seqlens, b) : 0;
  const auto in_ring = [&](int64_t i) { return (i % L + L) % L; };
  float window[W];
  Filters<W, 1> filters;
  filters.load(params, c);
#pragma unroll
  for (int d = 1; d < W; ++d) {
    const int64_t i = ring ? in_ring(length - d) : L - d;
    window[W - 1 - d] = to_float(state[i * step]);
  }
  for (int64_t t = 0; t < params.T; ++t) {
    const Element input = x[t * params.x.token];
    window[W - 1] = to_float(input);
    float z = filters.bias[0];
#pragma unroll
    for (int k = 0; k < W; ++k) z += filters.weight[k][0] * window[k];
    if (params.silu) z *= sigmoid(z);
    from_float(y[t * params.C], z);
#pragma unroll
    for (int k = 0; k + 1 < W; ++k) window[k] = window[k + 1];
    if (ring) state[in_ring(length + t) * step] = input;
  }
  if (ring) return;
  for (int64_t i = 0; i < L; ++i) {
    const int64_t from = i + params.T - L;  // token, or before the first the old window
    state[i * step] = from < 0 ? state[(i + params.T) * step] : x[from * params.x.token];
  }
}

}  // namespace hypenet::cuda::causal_conv1d
