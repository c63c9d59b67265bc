// The short causal depthwise convolution of recurrent layers: forward, backward, and the decode update.
//
// Math, per channel, with W taps and p the number of earlier tokens of the same sequence:
//   z_t = bias + sum_d weight_{W-1-d} x_{t-d},  d = 0 ... W-1;  for d > p, x_{t-d} is initial_state_{W-1+p-d}, or 0
//   y_t = z_t, or silu(z_t) = z_t sigmoid(z_t)
// Backward: dz_t = dy_t, or dy_t sigmoid(z_t) (1 + z_t (1 - sigmoid(z_t)));  dx_t = sum_d weight_{W-1-d} dz_{t+d} over
// the tokens t + d of the same sequence;  dweight_{W-1-d} = sum_t dz_t x_{t-d};  dbias = sum_t dz_t.
//
// Mapping: a task is a block of kConvBlock tokens and a panel of channels; it widens its rows and the W - 1 before (in
// the backward also those after) into scratch that stays in L1. The split is fixed, and the backward adds dweight up
// block by block in order, so results do not depend on the number of threads. Numerics: everything but loads and stores
// in the accumulation type. Cost: 2 W FLOPs and one read and write per element: bound by memory.
#include <algorithm>
#include <cmath>

#include "dtype.h"
#include "gated_delta_chunk.h"
#include "kernels.h"
#include "simd.h"
#include "workspace.h"

namespace hypenet::cpu {
namespace {

using gated_delta::load_rows;
using gated_delta::store_rows;

constexpr int64_t kPanel = 64;  // channels
constexpr int64_t kMaxTaps = 4;

template <class Element, class T>
struct Rows {
  T x[(kConvBlock + 2 * kMaxTaps) * kPanel];   // from W - 1 before the block on
  T dz[(kConvBlock + 2 * kMaxTaps) * kPanel];  // from the block's first token on
  T initial[kMaxTaps * kPanel], zero[kPanel];
};

// z of one token from its taps, oldest first.
template <int W, class T>
void convolve(int64_t n, const T* weight, int64_t C, const T* bias, const T* const (&taps)[W], T* z) {
  for (int64_t j = 0; j < n; ++j) {
    T sum = bias == nullptr ? T(0) : bias[j];
    for (int w = 0; w < W; ++w) sum += weight[w * C + j] * taps[w][j];
    z[j] = sum;
  }
}

template <class T>
void sigmoid(int64_t n, const T* z, T* out) {
  for (int64_t j = 0; j < n; ++j) out[j] = -z[j];
  exp_in_place(out, n);
  for (int64_t j = 0; j < n; ++j) out[j] = 1 / (1 + out[j]);
}

// A block of tokens [start, stop) of batch b, and channels [channel, channel + width).
template <class Element, int W, class Params>
class Block {
 public:
  using T = acc_t<Element>;
  Block(const Params& p, int64_t task, Rows<Element, T>& rows) : p_(p), rows_(rows) {
    const int64_t panels = (p.C + kPanel - 1) / kPanel, blocks = (p.T + kConvBlock - 1) / kConvBlock;
    index = task / panels;
    channel = task % panels * kPanel;
    width = std::min(kPanel, p.C - channel);
    b = index / blocks;
    start = index % blocks * kConvBlock;
    stop = std::min(start + kConvBlock, p.T);
    weight = static_cast<const T*>(p.weight) + channel;
    bias = p.bias == nullptr ? nullptr : static_cast<const T*>(p.bias) + channel;
    std::fill_n(rows_.zero, kPanel, T(0));
  }

  // Widens the rows [start - (W - 1), last) of x.
  void load(int64_t last) {
    first_ = std::max<int64_t>(0, start - (W - 1));
    load_rows(last - first_, width, row(p_.x, first_), p_.x.token, rows_.x, kPanel);
  }
  int64_t position(int64_t t) const { return p_.positions == nullptr ? t : p_.positions[b * p_.T + t]; }
  int64_t sequence(int64_t t) const { return p_.sequences == nullptr ? b : p_.sequences[b * p_.T + t]; }

  // The inputs of token t, oldest first.
  void find_taps(int64_t t, const T* (&taps)[W]) {
    const int64_t p = position(t);
    for (int d = 0; d < W; ++d) {
      taps[W - 1 - d] = d <= p ? rows_.x + (t - d - first_) * kPanel : initial(sequence(t), W - 1 + p - d);
    }
  }
  template <class Any = Element>
  Any* row(const View& x, int64_t t) const {
    return gated_delta::row<Any>(x, b, t, 0) + channel;
  }

  int64_t index, b, start, stop, channel, width;
  const T *weight, *bias;

 private:
  // Row i of W - 1 before sequence n.
  const T* initial(int64_t n, int64_t i) {
    if (p_.initial_states == nullptr) return rows_.zero;
    const auto* states = static_cast<const Element*>(p_.initial_states) + (n * (W - 1) + i) * p_.C + channel;
    load_rows(1, width, states, 0, rows_.initial + i * kPanel, 0);
    return rows_.initial + i * kPanel;
  }

  const Params& p_;
  Rows<Element, T>& rows_;
  int64_t first_ = 0;
};

template <class Params>
int64_t num_tasks(const Params& p) {
  return p.B * ((p.T + kConvBlock - 1) / kConvBlock) * ((p.C + kPanel - 1) / kPanel);
}

template <class Element, int W>
Status forward(const CausalConv1dFwdParams& p) {
  using T = acc_t<Element>;
  const int64_t tasks = num_tasks(p);
  for_each_task(tasks, useful_threads(p.num_threads, tasks, double(W) * p.B * p.T * p.C),
                [&](int64_t task, int64_t) {
                  Rows<Element, T> rows;
                  Block<Element, W, CausalConv1dFwdParams> block(p, task, rows);
                  block.load(block.stop);
                  for (int64_t t = block.start; t < block.stop; ++t) {
                    T *z = rows.dz, *s = rows.dz + kPanel;
                    if (block.sequence(t) < 0) {
                      std::fill_n(z, block.width, T(0));
                    } else {
                      const T* taps[W];
                      block.find_taps(t, taps);
                      convolve<W>(block.width, block.weight, p.C, block.bias, taps, z);
                      if (p.silu) {
                        sigmoid(block.width, z, s);
                        for (int64_t j = 0; j < block.width; ++j) z[j] *= s[j];
                      }
                    }
                    Element* y = static_cast<Element*>(p.y) + (block.b * p.T + t) * p.C + block.channel;
                    store_rows(1, block.width, z, 0, y, 0);
                  }
                });
  return nullptr;
}

template <class Element, int W>
void backward_block(const CausalConv1dBwdParams& p, int64_t task) {
  using T = acc_t<Element>;
  Rows<Element, T> rows;
  Block<Element, W, CausalConv1dBwdParams> block(p, task, rows);
  const int64_t width = block.width, last = std::min(block.stop + W - 1, p.T);
  block.load(last);
  T sums[(kMaxTaps + 1) * kPanel] = {};  // dweight and dbias of this block
  T s[kPanel], x[kPanel];
  for (int64_t t = block.start; t < last; ++t) {
    T* dz = rows.dz + (t - block.start) * kPanel;
    if (block.sequence(t) < 0) {
      std::fill_n(dz, kPanel, T(0));
      continue;
    }
    const T* taps[W];
    block.find_taps(t, taps);
    load_rows(1, width, block.row(p.dy, t), 0, dz, 0);
    if (p.silu) {
      convolve<W>(width, block.weight, p.C, block.bias, taps, x);
      sigmoid(width, x, s);
      for (int64_t j = 0; j < width; ++j) dz[j] *= s[j] * (1 + x[j] * (1 - s[j]));
    }
    if (t >= block.stop) continue;
    for (int w = 0; w < W; ++w) {
      for (int64_t j = 0; j < width; ++j) sums[w * kPanel + j] += dz[j] * taps[w][j];
    }
    for (int64_t j = 0; j < width; ++j) sums[W * kPanel + j] += dz[j];
  }
  // Adds weight_w dz_t to `to`, if t is in the block's reach and d tokens after the first of a sequence or later.
  const auto add = [&](int w, int64_t t, T* to) {
    const T* dz = rows.dz + (t - block.start) * kPanel;
    for (int64_t j = 0; j < width; ++j) to[j] += block.weight[w * p.C + j] * dz[j];
  };
  for (int64_t t = block.start; t < block.stop; ++t) {
    std::fill_n(x, width, T(0));
    for (int64_t d = 0; d < W && t + d < last; ++d) {
      if (block.position(t + d) < d || block.sequence(t + d) != block.sequence(t)) break;
      add(int(W - 1 - d), t + d, x);
    }
    store_rows(1, width, x, 0, static_cast<Element*>(p.dx) + (block.b * p.T + t) * p.C + block.channel, 0);
    const int64_t n = block.sequence(t);
    if (p.dinitial_states == nullptr || n < 0 || block.position(t) != 0) continue;
    for (int64_t i = 0; i < W - 1; ++i) {
      std::fill_n(x, width, T(0));
      for (int64_t r = 0; r <= i && t + r < last && block.position(t + r) == r && block.sequence(t + r) == n;
           ++r)
        add(int(i - r), t + r, x);
      auto* to = static_cast<Element*>(p.dinitial_states) + (n * (W - 1) + i) * p.C + block.channel;
      store_rows(1, width, x, 0, to, 0);
    }
  }
  T* partial = static_cast<T*>(p.partials) + block.index * (W + 1) * p.C + block.channel;
  for (int w = 0; w <= W; ++w) std::copy_n(sums + w * kPanel, width, partial + w * p.C);
}

template <class Element, int W>
Status backward(const CausalConv1dBwdParams& p) {
  using T = acc_t<Element>;
  const int64_t tasks = num_tasks(p), blocks = p.B * ((p.T + kConvBlock - 1) / kConvBlock);
  if (p.num_blocks != blocks) return "partials must have a row for every block of tokens";
  const int64_t threads = useful_threads(p.num_threads, tasks, 4.0 * W * p.B * p.T * p.C);
  for_each_task(tasks, threads, [&](int64_t task, int64_t) { backward_block<Element, W>(p, task); });
  const int64_t columns = (W + 1) * p.C, panels = (columns + kPanel - 1) / kPanel;
  for_each_task(panels, threads, [&](int64_t panel, int64_t) {
    const int64_t first = panel * kPanel, width = std::min(kPanel, columns - first);
    T* sums = static_cast<T*>(p.dweight) + first;
    std::fill_n(sums, width, T(0));
    for (int64_t i = 0; i < blocks; ++i) {
      const T* partial = static_cast<const T*>(p.partials) + i * columns + first;
      for (int64_t j = 0; j < width; ++j) sums[j] += partial[j];
    }
  });
  return nullptr;
}

// conv_state is a window of L inputs that ends with the newest, or with cache_seqlens a ring.
template <class Element, int W>
Status update(const CausalConv1dUpdateParams& p) {
  using T = acc_t<Element>;
  const int64_t panels = (p.C + kPanel - 1) / kPanel, tasks = p.B * panels;
  for_each_task(
      tasks, useful_threads(p.num_threads, tasks, 4.0 * W * p.B * p.T * p.C), [&](int64_t task, int64_t) {
        const int64_t b = task / panels, first = task % panels * kPanel, last = std::min(first + kPanel, p.C);
        const int64_t slot = p.state_indices.data == nullptr ? b : index_at(p.state_indices, b);
        const bool ring = p.cache_seqlens.data != nullptr;
        const int64_t length = ring ? index_at(p.cache_seqlens, b) : 0;
        for (int64_t c = first; c < last; ++c) {
          Element* y = static_cast<Element*>(p.y) + b * p.T * p.C + c;
          if (slot < 0) {
            for (int64_t t = 0; t < p.T; ++t) y[t * p.C] = Element(0.0f);
            continue;
          }
          Element* state =
              static_cast<Element*>(p.conv_state.data) + slot * p.conv_state.batch + c * p.conv_state.token;
          const auto at = [&](int64_t i) -> Element& { return state[i * p.conv_state.head]; };
          T window[W];  // the last W - 1 inputs, then the newest
          for (int64_t d = 1; d < W; ++d) {
            window[W - 1 - d] = T(at(ring ? ((length - d) % p.L + p.L) % p.L : p.L - d));
          }
          for (int64_t t = 0; t < p.T; ++t) {
            const Element input = *(gated_delta::row<Element>(p.x, b, t, 0) + c);
            window[W - 1] = T(input);
            T z = p.bias == nullptr ? T(0) : static_cast<const T*>(p.bias)[c];
            for (int w = 0; w < W; ++w) z += static_cast<const T*>(p.weight)[w * p.C + c] * window[w];
            if (p.silu) z /= 1 + exp_scalar(-z);
            y[t * p.C] = Element(z);
            std::copy(window + 1, window + W, window);
            if (ring) at((length + t) % p.L) = input;
          }
          if (ring) continue;
          for (int64_t i = 0; i < p.L; ++i) {
            const int64_t from = i + p.T - p.L;  // token, or before the first the old window
            at(i) = from < 0 ? at(i + p.T) : *(gated_delta::row<Element>(p.x, b, from, 0) + c);
          }
        }
      });
  return nullptr;
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

}  // namespace

Status causal_conv1d_fwd(const CausalConv1dFwdParams& params) {
  return dispatch(params.dtype, params.W,
                  [&]<class Element, int W>() { return forward<Element, W>(params); });
}

Status causal_conv1d_bwd(const CausalConv1dBwdParams& params) {
  return dispatch(params.dtype, params.W,
                  [&]<class Element, int W>() { return backward<Element, W>(params); });
}

Status causal_conv1d_update(const CausalConv1dUpdateParams& params) {
  return dispatch(params.dtype, params.W, [&]<class Element, int W>() { return update<Element, W>(params); });
}

}  // namespace hypenet::cpu
