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
// block by block in order, so results do not depend on the number of threads. A task of the update is a sequence and a
// panel. Numerics: everything but loads and stores in the accumulation type; forward and update compute y by the same
// two functions, and so to the same bits. Cost: 2 W FLOPs and one read and write per element: bound by memory.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "dtype.h"
#include "elementwise.h"
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
constexpr int64_t kMaxTokens =
    kConvBlock + kMaxTaps;  // of a block, and after it those that its dx depends on

// The sequence of a token, as a task walks along the tokens of batch b.
template <int W>
class Cursor {
 public:
  int64_t sequence;   // -1: none
  int64_t first = 0;  // token of the sequence; earlier ones may belong to it if they are more than W - 1 back

  Cursor(const CausalConv1dSequences& p, int64_t b, int64_t t) : sequence(b), p_(p), b_(b), stop_(t) {
    if (p.seq_idx.data == nullptr) return;
    begin(t);
    while (first > 0 && t - first < W - 1 && seq_idx(first - 1) == value_) --first;
  }

  // To token t, at most one further.
  void move_to(int64_t t) {
    if (p_.cu_seqlens.data != nullptr) {
      if (t >= stop_) find(t);
    } else if (p_.seq_idx.data != nullptr && seq_idx(t) != value_) {
      begin(t);
    }
  }

 private:
  int64_t seq_idx(int64_t t) const { return index_at(p_.seq_idx, b_ * p_.T + t); }
  void begin(int64_t t) {
    first = t;
    value_ = seq_idx(t);
    sequence = value_ < 0 ? -1 : b_;
  }

  // Finds token t by bisection: bounds before `low` are at most t, those from `high` on are greater.
  void find(int64_t t) {
    int64_t low = 0, high = p_.N + 1;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (index_at(p_.cu_seqlens, middle) <= t) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    sequence = low <= p_.N ? low - 1 : -1;
    first = low > 0 ? index_at(p_.cu_seqlens, low - 1) : 0;
    stop_ = low <= p_.N ? index_at(p_.cu_seqlens, low) : p_.T;
  }

  const CausalConv1dSequences& p_;
  int64_t b_, stop_, value_ = 0;
};

// Weights of a panel of channels: [W, kPanel] and [kPanel].
template <class T, int W>
struct Filters {
  T weight[W * kPanel], bias[kPanel];

  Filters(const CausalConv1dOperands& p, int64_t channel, int64_t width) {
    for (int64_t w = 0; w < W; ++w) read(p.weight, p.weight_dtype, channel, width, w, weight + w * kPanel);
    std::fill_n(bias, kPanel, T(0));
    if (p.bias.data != nullptr) read(p.bias, p.bias_dtype, channel, width, 0, bias);
  }

 private:
  static void read(const View& x, DType dtype, int64_t channel, int64_t width, int64_t column, T* to) {
    dispatch_dtype(dtype, [&]<class Element>() -> Status {
      const auto* from = static_cast<const Element*>(x.data) + channel * x.token + column * x.head;
      for (int64_t j = 0; j < width; ++j) {
        using Wide = std::conditional_t<std::is_same_v<Element, double>, double, float>;
        to[j] = static_cast<T>(static_cast<Wide>(from[j * x.token]));
      }
      return nullptr;
    });
  }
};

// z of n channels of a token from its taps, oldest first. Not inline: of two copies of the loop, one might round sums
// otherwise.
template <int W, class T>
[[gnu::noinline]] void convolve(int64_t n, const Filters<T, W>& filters, const T* const (&taps)[W],
                                T* __restrict z) {
  for (int64_t j = 0; j < n; ++j) {
    T sum = filters.bias[j];
    for (int w = 0; w < W; ++w) sum += filters.weight[w * kPanel + j] * taps[w][j];
    z[j] = sum;
  }
}

// The same as `convolve`, then silu if wanted, and rounded into y.
template <int W, class T, class Element>
[[gnu::noinline]] void convolve_and_store(int64_t n, const Filters<T, W>& filters, const T* const (&taps)[W],
                                          bool silu, Element* y) {
  T z[kPanel], s[kPanel];
  convolve<W>(n, filters, taps, z);
  if (silu) {
    sigmoid_row(z, n, s);
    for (int64_t j = 0; j < n; ++j) z[j] *= s[j];
  }
  store_rows(1, n, z, 0, y, 0);
}

// A block of tokens [start, stop) of batch b, and channels [channel, channel + width); its inputs, and those of the
// W - 1 tokens before and after it.
template <class Element, int W>
class Block {
 public:
  using T = acc_t<Element>;
  Block(const CausalConv1dSequences& p, int64_t task)
      : index(task / num_panels(p)),
        b(index / num_blocks(p)),
        start(index % num_blocks(p) * kConvBlock),
        stop(std::min(start + kConvBlock, p.T)),
        channel(task % num_panels(p) * kPanel),
        width(std::min(kPanel, p.C - channel)),
        filters(p, channel, width),
        p_(p),
        first_(std::max<int64_t>(0, start - (W - 1))) {
    std::fill_n(zero_, kPanel, T(0));
  }
  static int64_t num_panels(const CausalConv1dOperands& p) { return (p.C + kPanel - 1) / kPanel; }
  static int64_t num_blocks(const CausalConv1dOperands& p) { return (p.T + kConvBlock - 1) / kConvBlock; }
  static int64_t num_tasks(const CausalConv1dOperands& p) { return p.B * num_blocks(p) * num_panels(p); }

  // Widens the rows up to `last`, the first token that is not read.
  void load(int64_t last) { load_rows(last - first_, width, row(p_.x, first_), p_.x.token, x_, kPanel); }

  // The inputs of token t, oldest first.
  void find_taps(int64_t t, const Cursor<W>& cursor, const T* (&taps)[W]) {
    const int64_t p = t - cursor.first;
    for (int d = 0; d < W; ++d) {
      taps[W - 1 - d] = d <= p ? x_ + (t - d - first_) * kPanel : initial(cursor.sequence, W - 1 + p - d);
    }
  }
  Element* row(const View& x, int64_t t) const { return gated_delta::row<Element>(x, b, t, 0) + channel; }
  Element* row(void* x, int64_t t) const {
    return static_cast<Element*>(x) + (b * p_.T + t) * p_.C + channel;
  }
  // Row i of W - 1 before sequence n.
  template <class Pointer>
  auto initial_row(Pointer* states, int64_t n, int64_t i) const {
    using Row = std::conditional_t<std::is_const_v<Pointer>, const Element, Element>;
    return static_cast<Row*>(states) + (n * (W - 1) + i) * p_.C + channel;
  }

  const int64_t index, b, start, stop, channel, width;
  const Filters<T, W> filters;

 private:
  const T* initial(int64_t n, int64_t i) {
    if (p_.initial_states == nullptr) return zero_;
    load_rows(1, width, initial_row(p_.initial_states, n, i), 0, initial_ + i * kPanel, 0);
    return initial_ + i * kPanel;
  }

  const CausalConv1dSequences& p_;
  const int64_t first_;
  T x_[(kMaxTokens + kMaxTaps) * kPanel], initial_[kMaxTaps * kPanel], zero_[kPanel];
};

template <class Element, int W>
Status forward(const CausalConv1dFwdParams& p) {
  using InBlock = Block<Element, W>;
  const int64_t tasks = InBlock::num_tasks(p);
  const int64_t threads = useful_threads(p.num_threads, tasks, double(W) * p.B * p.T * p.C);
  for_each_task(tasks, threads, [&](int64_t task, int64_t) {
    InBlock block(p, task);
    block.load(block.stop);
    Cursor<W> cursor(p, block.b, block.start);
    for (int64_t t = block.start; t < block.stop; ++t) {
      cursor.move_to(t);
      if (cursor.sequence < 0) {
        std::fill_n(block.row(p.y, t), block.width, Element(0.0f));
        continue;
      }
      const typename InBlock::T* taps[W];
      block.find_taps(t, cursor, taps);
      convolve_and_store<W>(block.width, block.filters, taps, p.silu, block.row(p.y, t));
    }
  });
  return nullptr;
}

template <class Element, int W>
void backward_block(const CausalConv1dBwdParams& p, int64_t task) {
  using T = acc_t<Element>;
  Block<Element, W> block(p, task);
  const int64_t width = block.width, last = std::min(block.stop + W - 1, p.T);
  block.load(last);
  T sums[(W + 1) * kPanel] = {};  // dweight and dbias of this block
  T dz_rows[kMaxTokens * kPanel], s[kPanel], x[kPanel];
  int64_t sequence[kMaxTokens];
  bool breaks[kMaxTokens];  // the token is the first one of a sequence, or of none
  Cursor<W> cursor(p, block.b, block.start);
  for (int64_t t = block.start; t < last; ++t) {
    T* dz = dz_rows + (t - block.start) * kPanel;
    cursor.move_to(t);
    sequence[t - block.start] = cursor.sequence;
    breaks[t - block.start] = cursor.sequence < 0 || t == cursor.first;
    if (cursor.sequence < 0) {
      std::fill_n(dz, kPanel, T(0));
      continue;
    }
    const T* taps[W];
    block.find_taps(t, cursor, taps);
    load_rows(1, width, block.row(p.dy, t), 0, dz, 0);
    if (p.silu) {
      convolve<W>(width, block.filters, taps, x);
      sigmoid_row(x, width, s);
      for (int64_t j = 0; j < width; ++j) dz[j] *= s[j] * (1 + x[j] * (1 - s[j]));
    }
    if (t >= block.stop) continue;
    for (int w = 0; w < W; ++w) {
      for (int64_t j = 0; j < width; ++j) sums[w * kPanel + j] += dz[j] * taps[w][j];
    }
    for (int64_t j = 0; j < width; ++j) sums[W * kPanel + j] += dz[j];
  }
  // x = sum over d = 0 ... most of weight_{w-d} dz_{t+d}, up to the end of the sequence
  const auto sum_over_taps = [&](int64_t t, int64_t w, int64_t most) {
    std::fill_n(x, width, T(0));
    for (int64_t d = 0; d <= most && t + d < last && (d == 0 || !breaks[t + d - block.start]); ++d) {
      const T *weight = block.filters.weight + (w - d) * kPanel,
              *dz = dz_rows + (t + d - block.start) * kPanel;
      for (int64_t j = 0; j < width; ++j) x[j] += weight[j] * dz[j];
    }
  };
  for (int64_t t = block.start; t < block.stop; ++t) {
    sum_over_taps(t, W - 1, W - 1);
    store_rows(1, width, x, 0, block.row(p.dx, t), 0);
    const int64_t n = sequence[t - block.start];
    if (p.dinitial_states == nullptr || n < 0 || !breaks[t - block.start]) continue;
    for (int64_t i = 0; i < W - 1; ++i) {
      sum_over_taps(t, i, i);
      store_rows(1, width, x, 0, block.initial_row(p.dinitial_states, n, i), 0);
    }
  }
  T* partial = static_cast<T*>(p.partials) + block.index * (W + 1) * p.C + block.channel;
  for (int w = 0; w <= W; ++w) std::copy_n(sums + w * kPanel, width, partial + w * p.C);
}

template <class Element, int W>
Status backward(const CausalConv1dBwdParams& p) {
  using T = acc_t<Element>;
  const int64_t tasks = Block<Element, W>::num_tasks(p), blocks = p.B * Block<Element, W>::num_blocks(p);
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
void update_panel(const CausalConv1dUpdateParams& p, int64_t b, int64_t channel) {
  using T = acc_t<Element>;
  const int64_t width = std::min(kPanel, p.C - channel), L = p.L;
  const int64_t slot = p.state_indices.data == nullptr ? b : index_at(p.state_indices, b);
  Element* y = static_cast<Element*>(p.y) + b * p.T * p.C + channel;
  if (slot < 0) {
    for (int64_t t = 0; t < p.T; ++t) std::fill_n(y + t * p.C, width, Element(0.0f));
    return;
  }
  const auto state = [&](int64_t j, int64_t i) -> Element& {
    const View& states = p.conv_state;
    return static_cast<Element*>(
        states.data)[slot * states.batch + (channel + j) * states.token + i * states.head];
  };
  const auto input = [&](int64_t j, int64_t t) {
    return static_cast<const Element*>(p.x.data)[b * p.x.batch + t * p.x.token + (channel + j) * p.x.head];
  };
  const bool ring = p.cache_seqlens.data != nullptr;
  const int64_t length = ring ? index_at(p.cache_seqlens, b) : 0;
  const auto in_ring = [&](int64_t i) { return (i % L + L) % L; };

  const Filters<T, W> filters(p, channel, width);
  T window[W * kPanel];  // input i of the last W at row i % W, counted from W - 1 before the first token
  for (int64_t d = 1; d < W; ++d) {
    const int64_t i = ring ? in_ring(length - d) : L - d;
    for (int64_t j = 0; j < width; ++j) window[(W - 1 - d) * kPanel + j] = T(state(j, i));
  }
  for (int64_t t = 0; t < p.T; ++t) {
    T* newest = window + (t + W - 1) % W * kPanel;
    for (int64_t j = 0; j < width; ++j) newest[j] = T(input(j, t));
    const T* taps[W];
    for (int w = 0; w < W; ++w) taps[w] = window + (t + w) % W * kPanel;
    convolve_and_store<W>(width, filters, taps, p.silu, y + t * p.C);
    if (!ring) continue;
    for (int64_t j = 0; j < width; ++j) state(j, in_ring(length + t)) = input(j, t);
  }
  if (ring) return;
  for (int64_t j = 0; j < width; ++j) {
    for (int64_t i = 0; i < L; ++i) {
      const int64_t from = i + p.T - L;  // token, or before the first the old window
      state(j, i) = from < 0 ? state(j, i + p.T) : input(j, from);
    }
  }
}

template <class Element, int W>
Status update(const CausalConv1dUpdateParams& p) {
  const int64_t panels = (p.C + kPanel - 1) / kPanel, tasks = p.B * panels;
  const int64_t threads = useful_threads(p.num_threads, tasks, 4.0 * W * p.B * p.T * p.C);
  for_each_task(tasks, threads, [&](int64_t task, int64_t) {
    update_panel<Element, W>(p, task / panels, task % panels * kPanel);
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
