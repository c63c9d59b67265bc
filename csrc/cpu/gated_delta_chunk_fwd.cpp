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
// Mapping: a task is a sequence, a value head, and a block of the value columns; there is more than one block
// only where there are fewer heads than threads. Columns of V never mix, so the split leaves no trace in the
// result. The state lives in final_state. Scratch does not depend on T. Numerics: everything but the loads
// and stores in the accumulation type; see ChunkDecay for the exponents. Cost per token and value head: 2 (3
// K V + C (2 K + 2 V)) FLOPs less what the triangles save.
#include "gated_delta_chunk.h"
#include "kernels.h"

namespace hypenet::cpu {
namespace gated_delta {
namespace {

template <class T>
struct Tiles {
  T* kq;         // [2c, K]: K above Q
  T* kt;         // [K, C]: K^T
  T* products;   // [2c, C]: K K^T above Q K^T, then -A above P
  T* state_kq;   // [2c, V]: Z above Q S, then O in the lower half
  T* r;          // [c, V]
  T* e;          // [c, V]
  T* decayed_k;  // [c, K]
  T* beta;       // [c]
  ChunkDecay<T> decay;

  Tiles(Arena<T>& arena, int64_t C, int64_t K, int64_t V)
      : kq(arena.take(2 * C * K)),
        kt(arena.take(K * C)),
        products(arena.take(2 * C * C)),
        state_kq(arena.take(2 * C * V)),
        r(arena.take(C * V)),
        e(arena.take(C * V)),
        decayed_k(arena.take(C * K)),
        beta(arena.take(C)) {}
};

// One task: a sequence, a value head, columns [v_start, v_start + width) of V.
struct Slice {
  Sequence seq;
  int64_t head, v_start, width;
};

template <class Element, bool kDelta, class T = acc_t<Element>>
void load_chunk(const GatedDeltaFwdParams& p, const Slice& s, int64_t t, int64_t c, int64_t C, Tiles<T>& x) {
  const int64_t b = s.seq.batch, key_head = s.head / (p.HV / p.H);
  load_rows(c, p.K, row<Element>(p.k, b, t, key_head), p.k.token, x.kq, p.K);
  load_rows(c, p.K, row<Element>(p.q, b, t, key_head), p.q.token, x.kq + c * p.K, p.K);
  load_rows(c, s.width, row<Element>(p.v, b, t, s.head) + s.v_start, p.v.token, kDelta ? x.r : x.e, p.V);
  if constexpr (kDelta) load_rows(c, 1, row<T>(p.beta, b, t, s.head), p.beta.token, x.beta, 1);
  x.decay.compute(c, C, row<T>(p.g, b, t, s.head), p.g.token);
}

template <bool kDelta, class T>
void form_products(int64_t c, int64_t C, int64_t K, T scale, Tiles<T>& x) {
  const int64_t first = kDelta ? 0 : c;
  transpose(c, K, x.kq, K, x.kt, C);
  gemm<Op::kNN>(2 * c - first, c, K, x.kq + first * K, K, x.kt, C, x.products + first * C, C);
  if constexpr (kDelta) form_system(c, C, x.beta, x.products, x.decay, x.products);
  T* P = x.products + c * C;
  for (int64_t i = 0; i < c; ++i) {
    for (int64_t j = 0; j < c; ++j) P[i * C + j] *= scale * x.decay.between[i * C + j];
  }
}

template <class Element, bool kDelta, class T = acc_t<Element>>
void forward_slice(const GatedDeltaFwdParams& p, const Slice& s, T* S, int64_t C, Tiles<T>& x) {
  const int64_t K = p.K, V = p.V, w = s.width;
  const T scale = T(p.scale);
  Element* o = static_cast<Element*>(p.o) + (s.seq.batch * p.T * p.HV + s.head) * V + s.v_start;
  for (int64_t t = s.seq.start, stop = t + s.seq.length; t < stop; t += C) {
    const int64_t c = std::min(C, stop - t), first = kDelta ? 0 : c;
    load_chunk<Element, kDelta>(p, s, t, c, C, x);
    // (1)
    form_products<kDelta>(c, C, K, scale, x);
    // (2)
    gemm<Op::kNN>(2 * c - first, w, K, x.kq + first * K, K, S, V, x.state_kq + first * V, V);
    if constexpr (kDelta) {
      form_residual(c, w, x.beta, x.decay, x.state_kq, V, x.r, x.e, V);
      // (3)
      solve_unit_lower(c, w, x.products, C, x.e, V);
    }
    // (4)
    T factor[kMaxChunk];
    for (int64_t i = 0; i < c; ++i) factor[i] = scale * x.decay.from_start[i];
    T* O = x.state_kq + c * V;
    scale_rows(c, w, factor, O, V, O, V);
    add_lower_product(c, w, x.products + c * C, C, x.e, V, O, V);
    store_rows(c, w, O, V, o + t * p.HV * V, p.HV * V);
    // (5)
    update_state(c, K, w, x.decay, x.kq, x.e, V, x.decayed_k, S, V);
  }
}

template <class Element, bool kDelta>
Status forward(const GatedDeltaFwdParams& p) {
  using T = acc_t<Element>;
  const int64_t C = chunk_length(p.K, p.V);
  const ColumnSplit split = split_columns<T>(p.N * p.HV, p.V, p.num_threads);
  const int64_t threads = useful_threads(p.num_threads, split.tasks, 3.0 * p.B * p.T * p.HV * p.K * p.V);
  Arena<T> count;
  Tiles<T>(count, C, p.K, p.V);
  const ThreadBlocks<T> workspace(threads, count.used());
  for_each_task(split.tasks, threads, [&](int64_t task, int64_t thread) {
    Arena<T> arena(workspace.thread(thread));
    Tiles<T> tiles(arena, C, p.K, p.V);
    const int64_t head = task / split.blocks, start = task % split.blocks * split.columns;
    const int64_t width = std::min(split.columns, p.V - start);
    T* S = initial_slice<T>(p, head, start, width);
    forward_slice<Element, kDelta>(p, Slice{sequence(p, head / p.HV), head % p.HV, start, width}, S, C,
                                   tiles);
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
