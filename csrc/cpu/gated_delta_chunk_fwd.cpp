// Chunk-parallel forward of the gated delta rule, and of simple GLA (kDelta = false: E = V, no solve).
//
// Math, for one chunk of c tokens of one value head; G_i is the sum of g up to token i of the chunk,
// gamma_i = e^G_i, Gamma_ij = e^(G_i - G_j) for i >= j and 0 above, s the scale, S the state before the
// chunk:
//   (1) A = stril(diag(beta) (K K^T) . Gamma)        P = s (Q K^T) . Gamma
//   (2) Z = K S                                      R = V - gamma Z
//   (3) (I + A) E = beta R                           forward substitution, no inverse
//   (4) O = s gamma (Q S) + P E
//   (5) S := gamma_c S + (gamma_c / gamma K)^T E
//
// Mapping: a task is a sequence, a value head, and a block of columns of V; there are several blocks only if
// there are fewer heads than threads. Columns of V are independent, so the split does not change the result.
// Within a chunk, (2) to (5) run panel by panel of columns, each with its part of the state, which stays in
// L1. The rows of the next chunk are far apart in memory and are prefetched during (2). The workspace does
// not depend on T.
//
// Numerics: everything but loads and stores is in the accumulation type; see ChunkDecay for the exponents.
// With products of bfloat16 pairs (pairs.h), those of (1) use them exactly, and so do Q S and P E, which only
// O depends on, with S, P and E rounded to bfloat16. The state is as accurate as with float.
//
// Cost per token and value head: 2 (3 K V + C (2 K + 2 V)) FLOPs, less what the triangular products skip.
#include "gated_delta_chunk.h"
#include "kernels.h"

namespace hypenet::cpu {
namespace gated_delta {
namespace {

// Rows of (2) per prefetch batch: few enough that the prefetched lines arrive before they are read.
constexpr int64_t kRowsAtOnce = 6;

template <class Factor, class T>
struct Tiles {
  Factor* kq;   // [2c, packed(K)]: K above Q
  Factor* kt;   // [packed(K), C]: K^T
  T* k_exact;   // [c, K]: K in the accumulation type, for what makes up the state
  T* kt_exact;  // [K, C]
  T* products;  // [2c, C]: K K^T above Q K^T, then -A above the factors of P
  T* beta;      // [c]
  ChunkDecay<T> decay;
  // of one panel of columns
  Factor* state_factors;  // [packed(K), panel]
  Factor* e_factors;      // [packed(C), panel]
  T* state_kq;            // [2c, panel]: Z above Q S, then O in the lower half
  T* r;                   // [c, panel]
  T* e;                   // [c, panel]
  T* state;               // [panels, K, panel]

  Tiles(Arena<T>& arena, int64_t C, int64_t K, int64_t panels)
      : kq(arena.template take<Factor>(2 * C * packed<Factor>(K))),
        kt(arena.template take<Factor>(packed<Factor>(K) * C)),
        k_exact(kPacked<Factor> == 1 ? reinterpret_cast<T*>(kq) : arena.take(C * K)),
        kt_exact(kPacked<Factor> == 1 ? reinterpret_cast<T*>(kt) : arena.take(K * C)),
        products(arena.take(2 * C * C)),
        beta(arena.take(C)),
        state_factors(kPacked<Factor> == 1 ? nullptr
                                           : arena.template take<Factor>(packed<Factor>(K) * kPanel<T>)),
        e_factors(kPacked<Factor> == 1 ? nullptr
                                       : arena.template take<Factor>(packed<Factor>(C) * kPanel<T>)),
        state_kq(arena.take(2 * C * kPanel<T>)),
        r(arena.take(C * kPanel<T>)),
        e(arena.take(C * kPanel<T>)),
        state(arena.take(panels * K * kPanel<T>)) {}
};

// One task: a sequence, a value head, columns [v_start, v_start + width) of V.
struct Slice {
  Sequence seq;
  int64_t head, v_start, width;
};

template <class Element, bool kDelta>
class Task {
  using T = acc_t<Element>;
  using Factor = factor_t<Element>;

 public:
  Task(const GatedDeltaFwdParams& p, const Slice& slice, int64_t C, Tiles<Factor, T>& x)
      : p_(p),
        s_(slice),
        key_head_(slice.head / (p.HV / p.H)),
        C_(C),
        K_(p.K),
        panels_((slice.width + kPanel<T> - 1) / kPanel<T>),
        scale_(T(p.scale)),
        x_(x) {}

  void run(const T* initial_state, T* final_state) {
    std::fill_n(kDelta ? x_.r : x_.e, C_ * kPanel<T>, T(0));  // above all the padding columns
    for (int64_t i = 0; i < panels_; ++i) load_panel(initial_state, i);
    for (int64_t t = s_.seq.start, stop = t + s_.seq.length; t < stop; t += C_) {
      const int64_t c = std::min(C_, stop - t);
      load_chunk(t, c);
      form_products(c);
      for (int64_t i = 0; i < panels_; ++i) advance_panel(t, c, i);
      store_state(checkpoint<T>(p_, s_.seq, s_.head, s_.v_start, t + c - s_.seq.start));
    }
    store_state(final_state);
  }

 private:
  void store_state(T* to) const {
    if (to == nullptr) return;
    for (int64_t i = 0; i < panels_; ++i)
      store_rows(K_, panel_width(i), state(i), kPanel<T>, to + i * kPanel<T>, p_.V);
  }
  T* state(int64_t i) const { return x_.state + i * K_ * kPanel<T>; }
  int64_t panel_width(int64_t i) const { return std::min(kPanel<T>, s_.width - i * kPanel<T>); }
  const Element* v_row(int64_t t, int64_t i) const {
    return row<Element>(p_.v, s_.seq.batch, t, s_.head) + s_.v_start + i * kPanel<T>;
  }
  Element* o_row(int64_t t, int64_t i) const {
    Element* o = static_cast<Element*>(p_.o) + ((s_.seq.batch * p_.T + t) * p_.HV + s_.head) * p_.V;
    return o + s_.v_start + i * kPanel<T>;
  }

  void load_panel(const T* initial_state, int64_t i) {
    std::fill_n(state(i), K_ * kPanel<T>, T(0));
    if (initial_state == nullptr) return;
    load_rows(K_, panel_width(i), initial_state + i * kPanel<T>, p_.V, state(i), kPanel<T>);
  }

  void load_chunk(int64_t t, int64_t c) {
    const int64_t b = s_.seq.batch;
    const Element *k = row<Element>(p_.k, b, t, key_head_), *q = row<Element>(p_.q, b, t, key_head_);
    for (int64_t i = 0; i < c; ++i) {
      pack_row(k + i * p_.k.token, K_, x_.kq + i * packed<Factor>(K_));
      pack_row(q + i * p_.q.token, K_, x_.kq + (c + i) * packed<Factor>(K_));
    }
    if constexpr (kPacked<Factor> > 1) {
      load_rows(c, K_, k, p_.k.token, x_.k_exact, K_);
      transpose(c, K_, x_.k_exact, K_, x_.kt_exact, C_);
    }
    if constexpr (kDelta) load_rows(c, 1, row<T>(p_.beta, b, t, s_.head), p_.beta.token, x_.beta, 1);
    x_.decay.compute(c, C_, row<T>(p_.g, b, t, s_.head), p_.g.token);
  }

  // (1)
  void form_products(int64_t c) {
    const int64_t first = kDelta ? 0 : c, width = packed<Factor>(K_);
    transpose(c, width, x_.kq, width, x_.kt, C_);
    gemm<Op::kNN>(2 * c - first, c, width, x_.kq + first * width, width, x_.kt, C_, x_.products + first * C_,
                  C_);
    if constexpr (kDelta) form_system(c, C_, x_.beta, x_.products, x_.decay, x_.products);
    for (int64_t i = 0; i < c; ++i) {
      for (int64_t j = 0; j < c; j += kLanes<T>) {
        const vec<T> qk = Lanes<T>(c - j).read(x_.products + (c + i) * C_ + j);
        store_packed<Factor, T>(P(c) + i * C_ + j / kPacked<Factor>,
                                qk * scale_ * load(x_.decay.between + i * C_ + j));
      }
    }
  }

  // [c, packed(c)], leading dimension C; replaces Q K^T
  Factor* P(int64_t c) const { return reinterpret_cast<Factor*>(x_.products + c * C_); }

  void advance_panel(int64_t t, int64_t c, int64_t i) {
    constexpr int64_t ld = kPanel<T>;
    const int64_t width = panel_width(i), w = whole_vectors<T>(width), first = kDelta ? 0 : c;
    T *S = state(i), *O = x_.state_kq + c * ld;
    load_rows(c, width, v_row(t, i), p_.v.token, kDelta ? x_.r : x_.e, ld);
    // (2)
    const auto multiply_rows = [&](const auto* rows_of_k_or_q, int64_t key_width, const auto* state,
                                   int64_t from, int64_t to) {
      for (int64_t m = from; m < to; m += kRowsAtOnce) {
        const int64_t rows = std::min(kRowsAtOnce, to - m);
        prefetch(t, i, (m - first) * c / (2 * c - first), (m + rows - first) * c / (2 * c - first), c);
        gemm<Op::kNN>(rows, w, key_width, rows_of_k_or_q + (m - from) * key_width, key_width, state, ld,
                      x_.state_kq + m * ld, ld);
      }
    };
    if constexpr (kPacked<Factor> == 1) {
      multiply_rows(x_.kq + first * K_, K_, S, first, 2 * c);
    } else {
      const int64_t key_width = packed<Factor>(K_);
      multiply_rows(x_.k_exact, K_, S, first, c);
      multiply_rows(x_.kq + c * key_width, key_width, as_factors(K_, w, S, ld, x_.state_factors), c, 2 * c);
    }
    if constexpr (kDelta) {
      form_residual(c, w, x_.beta, x_.decay, x_.state_kq, ld, x_.r, x_.e, ld);
      // (3)
      solve_unit_lower(c, w, x_.products, C_, x_.e, ld);
    }
    // (4)
    T factor[kMaxChunk];
    for (int64_t j = 0; j < c; ++j) factor[j] = scale_ * x_.decay.from_start[j];
    const Factor* E = as_factors(c, w, x_.e, ld, x_.e_factors);
    add_lower_product(FromScaledRows<T>{O, ld, factor}, c, w, P(c), C_, E, ld, O, ld);
    store_rows(c, width, O, ld, o_row(t, i), p_.HV * p_.V);
    // (5)
    scale_rows(c, w, x_.decay.to_end, x_.e, ld, x_.e, ld);
    gemm<Op::kNN, true>(K_, w, c, x_.kt_exact, C_, x_.e, ld, S, ld, x_.decay.whole);
  }

  // Prefetches rows [first, last) of the outputs of this chunk's panel i and of the next chunk's inputs.
  HYPENET_INLINE void prefetch(int64_t t, int64_t i, int64_t first, int64_t last, int64_t c) const {
    const int64_t b = s_.seq.batch, next = t + c, left = s_.seq.start + s_.seq.length - next;
    for (int64_t j = first; j < last; ++j) {
      prefetch_row<true>(o_row(t + j, i), panel_width(i));
      if (j >= left) continue;
      prefetch_row<false>(v_row(next + j, i), panel_width(i));
      if (i == 0) prefetch_row<false>(row<Element>(p_.k, b, next + j, key_head_), K_);
      if (i == panels_ - 1) prefetch_row<false>(row<Element>(p_.q, b, next + j, key_head_), K_);
    }
  }

  const GatedDeltaFwdParams& p_;
  const Slice s_;
  const int64_t key_head_, C_, K_, panels_;
  const T scale_;
  Tiles<Factor, T>& x_;
};

template <class Element, bool kDelta>
Status forward(const GatedDeltaFwdParams& p) {
  using T = acc_t<Element>;
  using Factor = factor_t<Element>;
  const int64_t C = chunk_length(p.K, p.V);
  const ColumnSplit split = split_columns<T>(p.N * p.HV, p.V, p.num_threads);
  const int64_t threads = useful_threads(p.num_threads, split.tasks, 3.0 * p.B * p.T * p.HV * p.K * p.V);
  const int64_t panels = (split.columns + kPanel<T> - 1) / kPanel<T>;
  Arena<T> count;
  Tiles<Factor, T>(count, C, p.K, panels);
  const ThreadBlocks<T> workspace(threads, count.used());
  zero_tail<Element>(p, p.o, p.HV * p.V);
  for_each_task(split.tasks, threads, [&](int64_t task, int64_t thread) {
    Arena<T> arena(workspace.thread(thread));
    Tiles<Factor, T> tiles(arena, C, p.K, panels);
    const int64_t n = task / split.blocks / p.HV, head = task / split.blocks % p.HV;
    const int64_t start = task % split.blocks * split.columns, width = std::min(split.columns, p.V - start);
    const Sequence seq = sequence(p, n);
    const int64_t of_sequence = state_offset(p, n), offset = of_sequence + head * p.K * p.V + start;
    if (of_sequence < 0) return zero_output<Element>(p, seq, head, start, width);
    const T* initial_state = static_cast<const T*>(p.initial_state);
    Task<Element, kDelta>(p, Slice{seq, head, start, width}, C, tiles)
        .run(initial_state == nullptr ? nullptr : initial_state + offset,
             static_cast<T*>(p.final_state) + offset);
  });
  return nullptr;
}

}  // namespace
}  // namespace gated_delta

Status gated_delta_chunk_fwd(const GatedDeltaFwdParams& params) {
  return dispatch_dtype(params.dtype, [&]<class Element>() {
    return params.delta ? gated_delta::forward<Element, true>(params)
                        : gated_delta::forward<Element, false>(params);
  });
}

}  // namespace hypenet::cpu
