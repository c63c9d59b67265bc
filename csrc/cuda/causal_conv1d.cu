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
// Shapes: CausalConv1d*Params (params.h). Tokens whose sequence is -1 get y = 0 and no gradient.
//
// Mapping: forward and backward: a block is kConvBlock tokens of kThreads channel vectors of one batch; a thread walks
// along its tokens with the last W inputs of kVec channels in registers (16 bytes of x, or one element where C or an
// address is no multiple of 16 bytes). The backward keeps the last W of dz too, and runs W - 1 tokens past its block to
// finish the last dx; so two blocks compute those dz, the same bits. A second kernel, a thread per column, adds the
// blocks' parts of dweight. Update: a thread owns one channel of one sequence.
//
// Shared memory: none. Barriers: none. Numerics: fp32; one rounding at each store. Every sum has a fixed order: results
// are bitwise repeatable, and do not depend on the rest of the batch. sigmoid takes e^-|z|, which does not overflow.
//
// Cost per element: forward 2 W FLOPs and one read and write, backward 6 W and two reads and a write: bound by memory.
//
// Limits: W = 2, 3, 4; fp32, bf16, fp16; 2^31 - 1 blocks.
#include <limits>

#include "arch/sm80.cuh"
#include "dtype.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "view.cuh"

namespace hypenet::cuda {
namespace {

constexpr int kThreads = 128;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

template <class Element, int W_, int Vec>
struct Config {
  using Type = Element;
  static constexpr int W = W_, kVec = Vec;
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
    typename C::Type x[C::kVec];
    *reinterpret_cast<uint4*>(x) = arch::load_16_bytes(from);
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

// A thread's channels and its block's tokens; the last W inputs as it walks along them.
template <class C, class Params>
struct Walk {
  using Element = typename C::Type;
  const Params& params;
  int64_t b, block, start, stop;
  int channel;
  Values<C> weight[C::W], bias, window[C::W];

  __device__ explicit Walk(const Params& p) : params(p) {
    const unsigned panels = (static_cast<unsigned>(p.C) + kThreads * C::kVec - 1) / (kThreads * C::kVec);
    const int64_t blocks = (p.T + kConvBlock - 1) / kConvBlock;
    block = arch::block_idx() / panels;
    channel = static_cast<int>((arch::block_idx() % panels * kThreads + arch::thread_idx()) * C::kVec);
    b = block / blocks;
    start = block % blocks * kConvBlock;
    stop = start + kConvBlock < p.T ? start + kConvBlock : p.T;
    if (!is_inside()) return;
    const auto* w = static_cast<const float*>(p.weight);
#pragma unroll
    for (int i = 0; i < C::kVec; ++i) {
#pragma unroll
      for (int k = 0; k < C::W; ++k) weight[k][i] = w[k * p.C + channel + i];
      bias[i] = p.bias == nullptr ? 0.0f : static_cast<const float*>(p.bias)[channel + i];
    }
  }

  __device__ bool is_inside() const { return channel < params.C; }
  __device__ int64_t position(int64_t t) const {
    return params.positions == nullptr ? t : params.positions[b * params.T + t];
  }
  __device__ int64_t sequence(int64_t t) const {
    return params.sequences == nullptr ? b : params.sequences[b * params.T + t];
  }
  __device__ const Element* row(const View& x, int64_t t) const {
    return static_cast<const Element*>(x.data) + b * x.batch + t * x.token + channel;
  }
  __device__ int64_t offset(int64_t t) const { return (b * params.T + t) * params.C + channel; }
  __device__ int64_t initial_offset(int64_t n, int64_t i) const {
    return (n * (C::W - 1) + i) * params.C + channel;
  }

  // The W - 1 inputs before token t, into all of the window but its last.
  __device__ void look_back(int64_t t) {
    const int64_t p = position(t);
#pragma unroll
    for (int d = 1; d < C::W; ++d) {
      Values<C>& x = window[C::W - 1 - d];
      set_zero<C>(x);
      if (d <= p) {
        load<C>(x, row(params.x, t - d));
      } else if (params.initial_states != nullptr) {
        const auto* states = static_cast<const Element*>(params.initial_states);
        load<C>(x, states + initial_offset(sequence(t), C::W - 1 + p - d));
      }
    }
  }

  // Reads token t and computes its z.
  __device__ void advance(int64_t t, Values<C>& z) {
    load<C>(window[C::W - 1], row(params.x, t));
#pragma unroll
    for (int i = 0; i < C::kVec; ++i) {
      z[i] = bias[i];
#pragma unroll
      for (int k = 0; k < C::W; ++k) z[i] += weight[k][i] * window[k][i];
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
  bool follows = false;  // the token before is in the window
  for (int64_t t = walk.start; t < walk.stop; ++t) {
    Values<C> z;
    if (walk.sequence(t) < 0) {
      set_zero<C>(z);
      store<C>(y + walk.offset(t), z);
      follows = false;
      continue;
    }
    if (!follows || walk.position(t) == 0) walk.look_back(t);
    follows = true;
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
  bool follows = false;
  for (int64_t t = walk.start; t < walk.stop + W - 1; ++t) {
#pragma unroll
    for (int k = 0; k + 1 < W; ++k) copy<C>(dz[k], dz[k + 1]);
    Values<C>& now = dz[W - 1];
    set_zero<C>(now);
    if (t >= params.T || walk.sequence(t) < 0) {
      follows = false;
    } else {  // (1)
      if (!follows || walk.position(t) == 0) walk.look_back(t);
      follows = true;
      Values<C> z;
      walk.advance(t, z);
      load<C>(now, walk.row(params.dy, t));
#pragma unroll
      for (int i = 0; i < C::kVec; ++i) {
        if (params.silu) {
          const float s = sigmoid(z[i]);
          now[i] *= s * (1.0f + z[i] * (1.0f - s));
        }
        if (t >= walk.stop) continue;
        dbias[i] += now[i];  // (4)
#pragma unroll
        for (int k = 0; k < W; ++k) dweight[k][i] += now[i] * walk.window[k][i];
      }
      walk.shift();
    }
    const int64_t done = t - (W - 1);  // every dz that its dx takes is there
    if (done < walk.start) continue;
    const int64_t n = walk.sequence(done), p = walk.position(done);
    int reach = 0;  // tokens after it in its sequence, of the next W - 1
#pragma unroll
    for (int d = 1; d < W; ++d) {
      if (reach == d - 1 && done + d < params.T && walk.sequence(done + d) == n &&
          walk.position(done + d) == p + d)
        reach = d;
    }
    Values<C> dx;
    set_zero<C>(dx);
#pragma unroll
    for (int d = 0; d < W; ++d) {  // (2)
#pragma unroll
      for (int i = 0; i < C::kVec; ++i) {
        if (d <= reach) dx[i] += walk.weight[W - 1 - d][i] * dz[d][i];
      }
    }
    store<C>(static_cast<Element*>(params.dx) + walk.offset(done), dx);
    if (params.dinitial_states == nullptr || n < 0 || p != 0) continue;
    auto* dinitial = static_cast<Element*>(params.dinitial_states);
#pragma unroll
    for (int j = 0; j < W - 1; ++j) {  // (3)
      set_zero<C>(dx);
#pragma unroll
      for (int r = 0; r <= j; ++r) {
#pragma unroll
        for (int i = 0; i < C::kVec; ++i) {
          if (r <= reach) dx[i] += walk.weight[j - r][i] * dz[r][i];
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
__global__ void __launch_bounds__(kThreads)
    causal_conv1d_sum_kernel(const __grid_constant__ CausalConv1dBwdParams params) {
  const int64_t column = int64_t{arch::block_idx()} * kThreads + arch::thread_idx(),
                columns = (params.W + 1) * params.C;
  if (column >= columns) return;
  const float* partial = static_cast<const float*>(params.partials) + column;
  float sum = 0.0f;
  for (int64_t i = 0; i < params.num_blocks; ++i) sum += partial[i * columns];
  static_cast<float*>(params.dweight)[column] = sum;
}

template <class Element, int W>
__global__ void __launch_bounds__(kThreads)
    causal_conv1d_update_kernel(const __grid_constant__ CausalConv1dUpdateParams params) {
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
  const auto* x = static_cast<const Element*>(params.x.data) + b * params.x.batch + c;
  const int64_t step = params.conv_state.head;
  const bool ring = params.cache_seqlens.data != nullptr;
  const int64_t length = ring ? index_at(params.cache_seqlens, b) : 0;
  float window[W], weight[W];
#pragma unroll
  for (int k = 0; k < W; ++k) weight[k] = static_cast<const float*>(params.weight)[k * params.C + c];
#pragma unroll
  for (int d = 1; d < W; ++d) {
    const int64_t i = ring ? ((length - d) % L + L) % L : L - d;
    window[W - 1 - d] = to_float(state[i * step]);
  }
  const float bias = params.bias == nullptr ? 0.0f : static_cast<const float*>(params.bias)[c];
  for (int64_t t = 0; t < params.T; ++t) {
    const Element input = x[t * params.x.token];
    window[W - 1] = to_float(input);
    float z = bias;
#pragma unroll
    for (int k = 0; k < W; ++k) z += weight[k] * window[k];
    if (params.silu) z *= sigmoid(z);
    from_float(y[t * params.C], z);
#pragma unroll
    for (int k = 0; k + 1 < W; ++k) window[k] = window[k + 1];
    if (ring) state[(length + t) % L * step] = input;
  }
  if (ring) return;
  for (int64_t i = 0; i < L; ++i) {
    const int64_t from = i + params.T - L;  // token, or before the first the old window
    state[i * step] = from < 0 ? state[(i + params.T) * step] : x[from * params.x.token];
  }
}

// run.template operator()<Element, W>()
template <class Run>
Status dispatch(DType dtype, int64_t W, Run&& run) {
  return dispatch_dtype(dtype, [&]<class Element>() -> Status {
    switch (W) {
      case 2:
        return run.template operator()<Element, 2>();
      case 3:
        return run.template operator()<Element, 3>();
      case 4:
        return run.template operator()<Element, 4>();
      default:
        return "W must be 2, 3 or 4";
    }
  });
}

// Whether rows of these strides and addresses can be read 16 bytes at a time.
template <class Element, class... Addresses>
bool whole_vectors(const CausalConv1dOperands& params, const View& rows, const Addresses*... addresses) {
  constexpr int64_t kVec = 16 / sizeof(Element);
  const auto bits = (reinterpret_cast<uintptr_t>(rows.data) | ... | reinterpret_cast<uintptr_t>(addresses));
  return bits % 16 == 0 && params.C % kVec == 0 && rows.batch % kVec == 0 && rows.token % kVec == 0;
}

template <class C, class Params>
int64_t num_blocks(const Params& params) {
  const int64_t width = kThreads * C::kVec;
  return params.B * ((params.T + kConvBlock - 1) / kConvBlock) * ((params.C + width - 1) / width);
}

template <class C>
Status launch_forward(const CausalConv1dFwdParams& params, Stream stream) {
  return launch("causal_conv1d_fwd", causal_conv1d_fwd_kernel<C>, num_blocks<C>(params), kThreads, 0, stream,
                params);
}

template <class C>
Status launch_backward(const CausalConv1dBwdParams& params, Stream stream) {
  return launch("causal_conv1d_bwd", causal_conv1d_bwd_kernel<C>, num_blocks<C>(params), kThreads, 0, stream,
                params);
}

}  // namespace

Status causal_conv1d_fwd(const CausalConv1dFwdParams& params, Stream stream) {
  return dispatch(params.dtype, params.W, [&]<class Element, int W>() {
    constexpr int kVec = 16 / sizeof(Element);
    return whole_vectors<Element>(params, params.x, params.y, params.initial_states)
               ? launch_forward<Config<Element, W, kVec>>(params, stream)
               : launch_forward<Config<Element, W, 1>>(params, stream);
  });
}

Status causal_conv1d_bwd(const CausalConv1dBwdParams& params, Stream stream) {
  if (params.num_blocks != params.B * ((params.T + kConvBlock - 1) / kConvBlock)) {
    return "partials must have a row for every block of tokens";
  }
  const Status status = dispatch(params.dtype, params.W, [&]<class Element, int W>() {
    constexpr int kVec = 16 / sizeof(Element);
    const bool whole =
        whole_vectors<Element>(params, params.x, params.dx, params.initial_states, params.dinitial_states) &&
        whole_vectors<Element>(params, params.dy);
    return whole ? launch_backward<Config<Element, W, kVec>>(params, stream)
                 : launch_backward<Config<Element, W, 1>>(params, stream);
  });
  if (status != nullptr) return status;
  const int64_t columns = (params.W + 1) * params.C;
  return launch("causal_conv1d_sum", causal_conv1d_sum_kernel, (columns + kThreads - 1) / kThreads, kThreads,
                0, stream, params);
}

Status causal_conv1d_update(const CausalConv1dUpdateParams& params, Stream stream) {
  const int64_t blocks = (params.B * params.C + kThreads - 1) / kThreads;
  return dispatch(params.dtype, params.W, [&]<class Element, int W>() {
    return launch("causal_conv1d_update", causal_conv1d_update_kernel<Element, W>, blocks, kThreads, 0,
                  stream, params);
  });
}

}  // namespace hypenet::cuda
