// The sequential form of the gated delta rule and of simple GLA (kDelta = false): the recurrent forward, and
// the decode step, which does the same on a state that is updated in place.
//
// Math, for one token of one value head, with S the state before it and gamma = e^g:
//   (1) z = k^T S, y = q^T S                one pass over S
//   (2) e = beta (v - gamma z)              simple GLA: e = v
//   (3) o = scale (gamma y + (q . k) e)     equal to scale q^T of the new state
//   (4) S := gamma S + k e^T                a second pass, over S in cache
//
// Mapping: a task is a sequence, a value head, and a block of columns of V (several blocks only if there are
// fewer heads than threads; columns are independent). It processes its tokens one after the other.
//
// Numerics: everything but loads and stores is in the accumulation type, including the fused l2norm of q and
// k.
#include <cmath>
#include <utility>

#include "gated_delta_chunk.h"
#include "kernels.h"

namespace hypenet::cpu {
namespace gated_delta {
namespace {

// Vectors of columns whose sums z and y in (1) stay in registers.
#if defined(__AVX512F__)
constexpr int kMaxVecs = 8;
#else
constexpr int kMaxVecs = 4;
#endif

template <class T>
struct Token {
  T *k, *q;  // [K]
  T *v, *o;  // [V]
  T decay, beta, scale, qk;
};

// kTail: one vector, of which only `tail` columns exist.
template <bool kDelta, int kVecs, bool kTail, class T>
void advance_columns(const Token<T>& x, int64_t K, T* S, int64_t ld, int64_t column, int tail) {
  constexpr int L = kLanes<T>;
  const auto read = [tail](const T* p) {
    if constexpr (kTail) return load_partial(p, tail);
    return load(p);
  };
  const auto write = [tail](T* p, vec<T> value) {
    if constexpr (kTail) return store_partial(p, value, tail);
    return store(p, value);
  };
  vec<T> z[kVecs] = {}, y[kVecs] = {}, e[kVecs];
  T* const first = S + column;
  // (1)
  for (int64_t i = 0; i < K; ++i) {
    const vec<T> k = broadcast(x.k[i]), q = broadcast(x.q[i]);
#pragma GCC unroll 8
    for (int c = 0; c < kVecs; ++c) {
      const vec<T> s = read(first + i * ld + c * L);
      if constexpr (kDelta) z[c] += k * s;
      y[c] += q * s;
    }
  }
  // (2), (3)
#pragma GCC unroll 8
  for (int c = 0; c < kVecs; ++c) {
    e[c] = read(x.v + column + c * L);
    if constexpr (kDelta) e[c] = x.beta * (e[c] - x.decay * z[c]);
    write(x.o + column + c * L, x.scale * (x.decay * y[c] + x.qk * e[c]));
  }
  // (4)
  for (int64_t i = 0; i < K; ++i) {
    const vec<T> k = broadcast(x.k[i]);
#pragma GCC unroll 8
    for (int c = 0; c < kVecs; ++c) {
      T* p = first + i * ld + c * L;
      write(p, x.decay * read(p) + k * e[c]);
    }
  }
}

// advance_columns for `width` columns: panels of kVecs vectors, then of half as many, and so on.
template <bool kDelta, int kVecs, class T>
void advance(const Token<T>& x, int64_t K, T* S, int64_t ld, int64_t width, int64_t column = 0) {
  constexpr int64_t kPanel = kVecs * kLanes<T>;
  for (; column + kPanel <= width; column += kPanel)
    advance_columns<kDelta, kVecs, false>(x, K, S, ld, column, 0);
  if constexpr (kVecs > 1) {
    advance<kDelta, kVecs / 2>(x, K, S, ld, width, column);
  } else if (column < width) {
    advance_columns<kDelta, 1, true>(x, K, S, ld, column, int(width - column));
  }
}

template <class T>
void l2norm(int64_t dim, T* x) {
  const T factor = 1 / std::sqrt(dot(dim, x, x) + T(1e-6));
  for (int64_t i = 0; i < dim; ++i) x[i] *= factor;
}

// The gates of one token: (log decay, beta); beta = 0 without delta.
template <class Element, bool kDelta, class T>
std::pair<T, T> gates(const GatedDeltaFwdParams& p, int64_t b, int64_t t, int64_t head) {
  return {*row<T>(p.g, b, t, head), kDelta ? *row<T>(p.beta, b, t, head) : T(0)};
}

template <class Element, class T>
T gate_input(const View& x, bool in_dtype, int64_t b, int64_t t, int64_t head) {
  return in_dtype ? static_cast<T>(*row<Element>(x, b, t, head)) : *row<T>(x, b, t, head);
}

template <class Element, bool kDelta, class T>
std::pair<T, T> gates(const GatedDeltaStepParams& p, int64_t b, int64_t t, int64_t head) {
  T g = gate_input<Element, T>(p.g, p.gates_in_dtype, b, t, head), beta = 0;
  if (p.A_log != nullptr) {
    if (p.dt_bias != nullptr) g += static_cast<const T*>(p.dt_bias)[head];
    const T softplus = std::max(g, T(0)) + std::log1p(std::exp(-std::abs(g)));
    g = -std::exp(static_cast<const T*>(p.A_log)[head]) * softplus;
  }
  if constexpr (kDelta) beta = gate_input<Element, T>(p.beta, p.gates_in_dtype, b, t, head);
  if (p.beta_limit != 0) beta = T(p.beta_limit) / (1 + std::exp(-beta));
  return {g, beta};
}

// A value head of a sequence, and columns [start, start + width) of V.
struct Slice {
  Sequence seq;
  int64_t head, start, width;
};

// Columns of a state, or zeros for null, to another place.
template <class T, class Params>
void copy_state(const Params& p, int64_t width, const T* from, T* to) {
  if (from == to) return;
  for (int64_t i = 0; i < p.K; ++i) {
    if (from == nullptr) {
      std::fill_n(to + i * p.V, width, T(0));
    } else {
      std::copy_n(from + i * p.V, width, to + i * p.V);
    }
  }
}

// Params: GatedDeltaFwdParams or GatedDeltaStepParams. S = next(S, n) after n tokens is the state that goes
// on.
template <class Element, bool kDelta, class Params, class T, class Next>
void advance_tokens(const Params& p, const Slice& s, bool use_qk_l2norm, T* S, Token<T>& x,
                    const Next& next) {
  const int64_t b = s.seq.batch, key_head = s.head / (p.HV / p.H);
  x.scale = T(p.scale);
  for (int64_t t = s.seq.start; t < s.seq.start + s.seq.length; ++t) {
    load_rows(1, p.K, row<Element>(p.k, b, t, key_head), 0, x.k, 0);
    load_rows(1, p.K, row<Element>(p.q, b, t, key_head), 0, x.q, 0);
    load_rows(1, s.width, row<Element>(p.v, b, t, s.head) + s.start, 0, x.v, 0);
    if (use_qk_l2norm) {
      l2norm(p.K, x.k);
      l2norm(p.K, x.q);
    }
    const auto [g, beta] = gates<Element, kDelta, T>(p, b, t, s.head);
    x.decay = exp_scalar(g < T(kLowestDecay) ? T(kLowestDecay) : g);
    x.beta = beta;
    x.qk = dot(p.K, x.q, x.k);
    advance<kDelta, kMaxVecs>(x, p.K, S, p.V, s.width);
    store_rows(1, s.width, x.o, 0,
               static_cast<Element*>(p.o) + ((b * p.T + t) * p.HV + s.head) * p.V + s.start, 0);
    S = next(S, t + 1 - s.seq.start);
  }
}

// Calls run(sequence, value head, first column, number of columns, token buffers) for every task of N
// sequences.
template <class T, class Params, class Run>
void for_each_slice(const Params& p, int64_t N, const Run& run) {
  const ColumnSplit split = split_columns<T>(N * p.HV, p.V, p.num_threads);
  const int64_t threads = useful_threads(p.num_threads, split.tasks, 4.0 * p.B * p.T * p.HV * p.K * p.V);
  Arena<T> count;
  for (int64_t dim : {p.K, p.K, p.V, p.V}) count.take(dim);
  const ThreadBlocks<T> workspace(threads, count.used());
  for_each_equal_task(split.tasks, threads, [&](int64_t task, int64_t thread) {
    Arena<T> arena(workspace.thread(thread));
    Token<T> token{};
    token.k = arena.take(p.K), token.q = arena.take(p.K), token.v = arena.take(p.V),
    token.o = arena.take(p.V);
    const int64_t head = task / split.blocks, start = task % split.blocks * split.columns;
    const int64_t width = std::min(split.columns, p.V - start);
    run(head / p.HV, head % p.HV, start, width, token);
  });
}

template <class Element, bool kDelta>
Status recurrent_forward(const GatedDeltaFwdParams& p) {
  using T = acc_t<Element>;
  zero_tail<Element>(p, p.o, p.HV * p.V);
  for_each_slice<T>(p, p.N, [&](int64_t n, int64_t head, int64_t start, int64_t width, Token<T>& token) {
    const Sequence seq = sequence(p, n);
    const int64_t of_sequence = state_offset(p, n), offset = of_sequence + head * p.K * p.V + start;
    if (of_sequence < 0) return zero_output<Element>(p, seq, head, start, width);
    T* S = static_cast<T*>(p.final_state) + offset;
    copy_state(p, width,
               p.initial_state == nullptr ? nullptr : static_cast<const T*>(p.initial_state) + offset, S);
    advance_tokens<Element, kDelta>(p, Slice{seq, head, start, width}, false, S, token,
                                    [&](T* state, int64_t n) {
                                      if (T* to = checkpoint<T>(p, seq, head, start, n); to != nullptr)
                                        copy_state(p, width, state, to);
                                      return state;
                                    });
  });
  return nullptr;
}

template <class Element, bool kDelta>
Status step(const GatedDeltaStepParams& p) {
  using T = acc_t<Element>;
  for_each_slice<T>(p, p.B, [&](int64_t b, int64_t head, int64_t start, int64_t width, Token<T>& token) {
    const Sequence seq{b, 0, p.T};
    const int64_t of_sequence = state_offset(p, b), in_sequence = head * p.K * p.V + start;
    const auto state_after = [&](int64_t n) {
      return static_cast<T*>(p.states) + (b * p.T + n - 1) * p.HV * p.K * p.V + in_sequence;
    };
    if (of_sequence < 0) {
      for (int64_t n = 1; p.states != nullptr && n <= p.T; ++n)
        copy_state<T>(p, width, nullptr, state_after(n));
      return zero_output<Element>(p, seq, head, start, width);
    }
    // With `states`, each token's state is updated in the place of the next one's.
    const auto next = [&](const T* state, int64_t n) {
      T* to = state_after(n + 1);
      copy_state(p, width, state, to);
      return to;
    };
    T* S = static_cast<T*>(p.state) + of_sequence + in_sequence;
    if (p.states != nullptr && p.T > 0) S = next(S, 0);
    advance_tokens<Element, kDelta>(
        p, Slice{seq, head, start, width}, p.use_qk_l2norm, S, token,
        [&](T* state, int64_t n) { return p.states == nullptr || n == p.T ? state : next(state, n); });
  });
  return nullptr;
}

}  // namespace
}  // namespace gated_delta

Status gated_delta_recurrent_fwd(const GatedDeltaFwdParams& params) {
  return dispatch_dtype(params.dtype, [&]<class Element>() {
    return params.delta ? gated_delta::recurrent_forward<Element, true>(params)
                        : gated_delta::recurrent_forward<Element, false>(params);
  });
}

Status gated_delta_step(const GatedDeltaStepParams& params) {
  return dispatch_dtype(params.dtype, [&]<class Element>() {
    return params.delta ? gated_delta::step<Element, true>(params)
                        : gated_delta::step<Element, false>(params);
  });
}

}  // namespace hypenet::cpu
