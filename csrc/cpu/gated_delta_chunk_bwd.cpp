// Backward of the gated delta rule's chunk form, and of simple GLA (kDelta = false: E = V, no A, no beta).
//
// Math, for one chunk of c tokens (the forward's notation; S the state before the chunk, S1 after it):
//   dE  = P^T dO + (gamma_c / gamma K) dS1        (1)
//   dB  = (I + A)^-T dE      dV = dR = beta dB     dZ = -gamma dR        (2)
//   dA  = -stril(dB E^T)     X = tril(dO E^T)                            (3)
//   dbeta = rs(R . dB) + rs(dA . Gamma . K K^T)                          (4)
//   dM  = beta dA . Gamma    dN = s X . Gamma      gradients of K K^T and Q K^T                 (4)
//   dQ  = s gamma (dO S^T) + dN K                                        (5, 7)
//   dK  = dZ S^T + gamma_c / gamma (E dS1^T) + dN^T Q + (dM + dM^T) K    (5, 7)
//   dG  = rs(X . P) - cs(X . P) + rs(dA . A) - cs(dA . A) + rs(Q . dQ_S) + rs(K . dK_S) - rs(K . dK_S1)
//   dG_c += gamma_c <S, dS1> + sum rs(K . dK_S1)        with the parts of dQ, dK that come from S and from S1
//   dg  = reverse running sum of dG inside the chunk, 0 where g was clamped                     (6)
//   dS  = gamma_c dS1 + Q^T (s gamma dO) + K^T dZ                        (6)
//
// Mapping: a task is a sequence and a key head. Inside each chunk it goes through the value heads of the
// group and sums dN, dM, dq, dk over them in a fixed order. dS lives in dinitial_state. States: a task goes
// through its sequence segment by segment, last segment first; within one it recomputes the states (and E, R)
// before every chunk and keeps them, before that only the states at the segments' starts. dQ and dK are
// summed transposed, [K, 2c] with dK left of dQ, as that makes all products with S row-major. Numerics:
// everything but the loads and stores in the accumulation type; dG in double. Cost per token and value head:
// 2 (7 K V + C (5 K + 5 V)) FLOPs, and 2 (2 K V + C V) for the states, twice where there is more than one
// segment.
#include "gated_delta_chunk.h"
#include "kernels.h"

namespace hypenet::cpu {
namespace gated_delta {
namespace {

constexpr int64_t kSegmentStates = 64;  // states kept at once, of all value heads of the group together

// How a task cuts its sequence.
struct Cut {
  int64_t C, held,
      segments;  // tokens a chunk holds, chunks a segment holds, segments of the longest sequence
};

template <class T>
struct Tiles {
  // of the key head; the leading dimension of everything that is 2c wide is 2C
  T* kq;        // [2c, K]: K above Q
  T* kqt;       // [K, 2c]: its transpose
  T* products;  // [2c, C]: K K^T above Q K^T
  T* dkqt;      // [K, 2c]: dK^T left of dQ^T
  T* dkq;       // [2c, K]
  T* dm;        // [c, C], summed over the group
  T* dn;        // [c, C], summed over the group
  T* mixed;     // [c, 2c]: dM + dM^T left of dN^T
  // of one value head
  T* system;      // [2c, C]: -A above P
  T* db_do;       // [2c, V]: dB above dO
  T* dz_do;       // [2c, V]: dZ above s gamma dO
  T* dz_do_t;     // [V, 2c]: its transpose
  T* et;          // [V, C]: E^T
  T* outer;       // [2c, C]: dB E^T above dO E^T
  T* from_state;  // [K, 2c]: S dZ^T left of S (s gamma dO)^T
  T* from_next;   // [K, C]: gamma_c / gamma (dS1 E^T)
  T* decayed_k;   // [c, K]
  T* z;           // [c, V]: Z in the recomputation, dV in the reverse pass
  T* beta;        // [c]
  ChunkDecay<T> decay;
  // of all value heads of the group
  T* running;  // [group, K, V]: the recomputed state
  T* starts;   // [group, segments, K, V]: the state before every segment
  T* states;   // [group, held, K, V]: before every chunk of the segment
  T* e;        // [group, held, C, V]; without delta one chunk's is enough
  T* r;        // [group, held, C, V]

  Tiles(Arena<T>& a, const Cut& cut, bool delta, int64_t K, int64_t V, int64_t group) {
    const int64_t C = cut.C;
    for (T** tile : {&kq, &kqt, &dkqt, &dkq, &from_state}) *tile = a.take(2 * C * K);
    for (T** tile : {&products, &system, &mixed, &outer}) *tile = a.take(2 * C * C);
    for (T** tile : {&db_do, &dz_do, &dz_do_t}) *tile = a.take(2 * C * V);
    for (T** tile : {&dm, &dn}) *tile = a.take(C * C);
    for (T** tile : {&from_next, &decayed_k}) *tile = a.take(C * K);
    for (T** tile : {&et, &z}) *tile = a.take(C * V);
    beta = a.take(C);
    running = a.take(group * K * V);
    starts = a.take(group * cut.segments * K * V);
    states = a.take(group * cut.held * K * V);
    for (T** tile : {&e, &r}) *tile = a.take(group * (delta ? cut.held : 1) * C * V);
  }
};

// One task: a sequence and a key head with its group of value heads.
template <class Element, bool kDelta>
class Task {
  using T = acc_t<Element>;

 public:
  Task(const GatedDeltaBwdParams& p, int64_t n, int64_t key_head, const Cut& cut, Tiles<T>& x)
      : p_(p),
        seq_(sequence(p, n)),
        n_(n),
        key_head_(key_head),
        group_(p.HV / p.H),
        C_(cut.C),
        K_(p.K),
        V_(p.V),
        cut_(cut),
        scale_(T(p.scale)),
        x_(x) {}

  void run() {
    const int64_t chunks = (seq_.length + C_ - 1) / C_, segments = (chunks + cut_.held - 1) / cut_.held;
    for (int64_t j = 0; j < group_; ++j) {
      copy_state(static_cast<const T*>(p_.initial_state), state_offset(j), running(j));
      copy_state(static_cast<const T*>(p_.dfinal_state), state_offset(j), dstate(j));
    }
    for (int64_t segment = 0; segment < segments; ++segment) {
      for (int64_t j = 0; j < group_; ++j) std::copy_n(running(j), K_ * V_, start(j, segment));
      const int64_t stop = (segment + 1) * cut_.held;
      if (stop < chunks) recompute(stop - cut_.held, stop, false);
    }
    for (int64_t segment = segments - 1; segment >= 0; --segment) {
      const int64_t first = segment * cut_.held, stop = std::min(first + cut_.held, chunks);
      for (int64_t j = 0; j < group_; ++j) std::copy_n(start(j, segment), K_ * V_, running(j));
      recompute(first, stop, true);
      for (int64_t chunk = stop - 1; chunk >= first; --chunk) reverse_chunk(chunk, chunk - first);
    }
  }

 private:
  int64_t value_head(int64_t j) const { return key_head_ * group_ + j; }
  int64_t token(int64_t chunk) const { return seq_.start + chunk * C_; }
  int64_t tokens(int64_t chunk) const { return std::min(C_, seq_.length - chunk * C_); }
  int64_t state_offset(int64_t j) const { return (n_ * p_.HV + value_head(j)) * K_ * V_; }
  T* dstate(int64_t j) const { return static_cast<T*>(p_.dinitial_state) + state_offset(j); }
  T* running(int64_t j) const { return x_.running + j * K_ * V_; }
  T* start(int64_t j, int64_t segment) const { return x_.starts + (j * cut_.segments + segment) * K_ * V_; }
  T* state(int64_t j, int64_t slot) const { return x_.states + (j * cut_.held + slot) * K_ * V_; }
  T* e(int64_t j, int64_t slot) const { return x_.e + (kDelta ? j * cut_.held + slot : 0) * C_ * V_; }
  T* r(int64_t j, int64_t slot) const { return x_.r + (kDelta ? j * cut_.held + slot : 0) * C_ * V_; }

  void copy_state(const T* from, int64_t offset, T* to) const {
    if (from == nullptr) {
      std::fill_n(to, K_ * V_, T(0));
    } else {
      std::copy_n(from + offset, K_ * V_, to);
    }
  }

  void load_key_head(int64_t t, int64_t c, bool with_q) {
    load_rows(c, K_, row<Element>(p_.k, seq_.batch, t, key_head_), p_.k.token, x_.kq, K_);
    const int64_t rows = with_q ? 2 * c : c;
    if (with_q)
      load_rows(c, K_, row<Element>(p_.q, seq_.batch, t, key_head_), p_.q.token, x_.kq + c * K_, K_);
    const int64_t first = kDelta ? 0 : c;
    if (first == rows) return;
    transpose(rows, K_, x_.kq, K_, x_.kqt, 2 * C_);
    gemm<Op::kNN>(rows - first, c, K_, x_.kq + first * K_, K_, x_.kqt, 2 * C_, x_.products + first * C_, C_);
  }

  void load_value_head(int64_t t, int64_t c, int64_t j) {
    const int64_t head = value_head(j);
    if constexpr (kDelta) load_rows(c, 1, row<T>(p_.beta, seq_.batch, t, head), p_.beta.token, x_.beta, 1);
    x_.decay.compute(c, C_, row<T>(p_.g, seq_.batch, t, head), p_.g.token);
  }

  void load_v(int64_t t, int64_t c, int64_t j, T* to) {
    load_rows(c, V_, row<Element>(p_.v, seq_.batch, t, value_head(j)), p_.v.token, to, V_);
  }

  // The forward without output, from the running states on; `keep` the states, E and R of every chunk.
  void recompute(int64_t first, int64_t stop, bool keep) {
    for (int64_t chunk = first; chunk < stop; ++chunk) {
      const int64_t t = token(chunk), c = tokens(chunk), slot = keep ? chunk - first : 0;
      load_key_head(t, c, false);
      for (int64_t j = 0; j < group_; ++j) {
        T *S = running(j), *E = e(j, slot), *R = r(j, slot);
        load_value_head(t, c, j);
        load_v(t, c, j, kDelta ? R : E);
        if (keep) std::copy_n(S, K_ * V_, state(j, slot));
        if constexpr (kDelta) {
          gemm<Op::kNN>(c, V_, K_, x_.kq, K_, S, V_, x_.z, V_);
          form_residual(c, V_, x_.beta, x_.decay, x_.z, V_, R, E, V_);
          form_system(c, C_, x_.beta, x_.products, x_.decay, x_.system);
          solve_unit_lower(c, V_, x_.system, C_, E, V_);
        }
        if (!keep || chunk + 1 < stop) update_state(c, K_, V_, x_.decay, x_.kq, E, V_, x_.decayed_k, S, V_);
      }
    }
  }

  void reverse_chunk(int64_t chunk, int64_t slot) {
    const int64_t t = token(chunk), c = tokens(chunk);
    load_key_head(t, c, true);
    std::fill_n(x_.dkqt, 2 * C_ * K_, T(0));
    std::fill_n(x_.dm, C_ * C_, T(0));
    std::fill_n(x_.dn, C_ * C_, T(0));
    for (int64_t j = 0; j < group_; ++j) {
      double dG[kMaxChunk] = {};
      T dbeta[kMaxChunk] = {};
      load_value_head(t, c, j);
      if constexpr (!kDelta) load_v(t, c, j, e(j, slot));
      output_to_pseudo_values(t, c, j);
      pseudo_values_to_v(t, c, j, r(j, slot), dbeta);
      chunk_products(c, e(j, slot), dG, dbeta);
      through_states(c, state(j, slot), dstate(j), dG);
      store_gate_gradients(t, c, j, dG, dbeta);
    }
    finish_key_head(t, c);
  }

  // (1) dE, into the upper half of db_do
  void output_to_pseudo_values(int64_t t, int64_t c, int64_t j) {
    T *P = x_.system + c * C_, *dO = x_.db_do + c * V_;
    const T* QK = x_.products + c * C_;
    for (int64_t i = 0; i < c; ++i) {
      for (int64_t k = 0; k < c; ++k) P[i * C_ + k] = scale_ * x_.decay.between[i * C_ + k] * QK[i * C_ + k];
    }
    load_rows(c, V_, row<Element>(p_.do_, seq_.batch, t, value_head(j)), p_.do_.token, dO, V_);
    scale_rows(c, K_, x_.decay.to_end, x_.kq, K_, x_.decayed_k, K_);
    gemm<Op::kNN>(c, V_, K_, x_.decayed_k, K_, dstate(j), V_, x_.db_do, V_);
    add_lower_transposed_product(c, V_, P, C_, dO, V_, x_.db_do, V_);
  }

  // (2) dB in place of dE, dV, dZ, and s gamma dO beside it
  void pseudo_values_to_v(int64_t t, int64_t c, int64_t j, const T* R, T* dbeta) {
    T *dB = x_.db_do, *dZ = x_.dz_do, *dV = kDelta ? x_.z : dB;
    if constexpr (kDelta) {
      form_system(c, C_, x_.beta, x_.products, x_.decay, x_.system);
      solve_unit_lower_transposed(c, V_, x_.system, C_, dB, V_);
      for (int64_t i = 0; i < c; ++i) {
        dbeta[i] = dot(V_, R + i * V_, dB + i * V_);
        const T factor = -x_.decay.from_start[i];
        for (int64_t k = 0; k < V_; ++k) {
          const T dv = x_.beta[i] * dB[i * V_ + k];
          dV[i * V_ + k] = dv;
          dZ[i * V_ + k] = factor * dv;
        }
      }
    }
    T factor[kMaxChunk];
    for (int64_t i = 0; i < c; ++i) factor[i] = scale_ * x_.decay.from_start[i];
    scale_rows(c, V_, factor, x_.db_do + c * V_, V_, x_.dz_do + c * V_, V_);
    store_rows(c, V_, dV, V_, output<Element>(p_.dv, t, p_.HV, value_head(j), V_), p_.HV * V_);
  }

  // (3) and (4): what flows through A and P into K K^T, Q K^T, beta and the decays inside the chunk
  void chunk_products(int64_t c, const T* E, double* dG, T* dbeta) {
    const int64_t first = kDelta ? 0 : c;
    transpose(c, V_, E, V_, x_.et, C_);
    gemm<Op::kNN>(2 * c - first, c, V_, x_.db_do + first * V_, V_, x_.et, C_, x_.outer + first * C_, C_);
    T columns[kMaxChunk] = {};
    for (int64_t i = 0; i < c; ++i) {
      const T *gamma = x_.decay.between + i * C_, *X = x_.outer + (c + i) * C_, *P = x_.system + (c + i) * C_;
      T row_sum = 0;
      x_.dn[i * C_ + i] += scale_ * X[i];
      for (int64_t j = 0; j < i; ++j) {
        x_.dn[i * C_ + j] += scale_ * X[j] * gamma[j];
        row_sum += X[j] * P[j];
        columns[j] += X[j] * P[j];
      }
      if constexpr (kDelta) {
        const T *dA = x_.outer + i * C_, *KK = x_.products + i * C_;
        T through_A = 0;
        for (int64_t j = 0; j < i; ++j) {
          const T decayed = -dA[j] * gamma[j], product = decayed * KK[j];
          x_.dm[i * C_ + j] += x_.beta[i] * decayed;
          through_A += product;
          columns[j] += x_.beta[i] * product;
        }
        dbeta[i] += through_A;
        row_sum += x_.beta[i] * through_A;
      }
      dG[i] += row_sum;
    }
    for (int64_t j = 0; j < c; ++j) dG[j] -= columns[j];
  }

  // (5) and (6): the parts of dK, dQ and dG that come from S and dS1, and dS in place of dS1
  void through_states(int64_t c, const T* S, T* dS, double* dG) {
    const int64_t first = kDelta ? 0 : c, wide = 2 * C_;
    transpose(2 * c - first, V_, x_.dz_do + first * V_, V_, x_.dz_do_t + first, wide);
    gemm<Op::kNN>(K_, 2 * c - first, V_, S, V_, x_.dz_do_t + first, wide, x_.from_state + first, wide);
    gemm<Op::kNN>(K_, c, V_, dS, V_, x_.et, C_, x_.from_next, C_);
    T by_state[2 * kMaxChunk] = {}, by_next[kMaxChunk] = {};
    for (int64_t i = 0; i < K_; ++i) {
      const T *kq = x_.kqt + i * wide, *part = x_.from_state + i * wide, *next = x_.from_next + i * C_;
      T* dkq = x_.dkqt + i * wide;
      for (int64_t j = first; j < 2 * c; ++j) {
        dkq[j] += part[j];
        by_state[j] += kq[j] * part[j];
      }
      for (int64_t j = 0; j < c; ++j) {
        const T decayed = x_.decay.to_end[j] * next[j];
        dkq[j] += decayed;
        by_next[j] += kq[j] * decayed;
      }
    }
    double whole = double(x_.decay.whole) * dot(K_ * V_, S, dS);
    for (int64_t j = 0; j < c; ++j) {
      dG[j] += double(by_state[j]) + by_state[c + j];
      if (j + 1 == c) break;  // the last token does not decay on its way to the end
      dG[j] -= by_next[j];
      whole += by_next[j];
    }
    dG[c - 1] += whole;
    gemm<Op::kTN, true>(K_, V_, 2 * c - first, x_.kq + first * K_, K_, x_.dz_do + first * V_, V_, dS, V_,
                        x_.decay.whole);
  }

  void store_gate_gradients(int64_t t, int64_t c, int64_t j, const double* dG, const T* dbeta) {
    T* dg = output<T>(p_.dg, t, p_.HV, value_head(j), 1);
    double running = 0;
    for (int64_t i = c - 1; i >= 0; --i) {
      running += dG[i];
      dg[i * p_.HV] = x_.decay.clamped[i] ? T(0) : T(running);
    }
    if constexpr (kDelta) store_rows(c, 1, dbeta, 1, output<T>(p_.dbeta, t, p_.HV, value_head(j), 1), p_.HV);
  }

  // (7) the parts of dK and dQ that come through K K^T and Q K^T
  void finish_key_head(int64_t t, int64_t c) {
    const int64_t wide = 2 * C_;
    for (int64_t i = 0; i < c; ++i) {
      for (int64_t j = 0; j < c; ++j) {
        x_.mixed[i * wide + j] = x_.dm[i * C_ + j] + x_.dm[j * C_ + i];
        x_.mixed[i * wide + c + j] = x_.dn[j * C_ + i];
      }
    }
    const int64_t first = kDelta ? 0 : c;
    gemm<Op::kNN, true>(K_, 2 * c - first, c, x_.kqt, wide, x_.mixed + first, wide, x_.dkqt + first, wide);
    gemm<Op::kNN, true>(K_, c, c, x_.kqt + c, wide, x_.dn, C_, x_.dkqt, wide);
    transpose(K_, 2 * c, x_.dkqt, wide, x_.dkq, K_);
    store_rows(c, K_, x_.dkq, K_, output<Element>(p_.dk, t, p_.H, key_head_, K_), p_.H * K_);
    store_rows(c, K_, x_.dkq + c * K_, K_, output<Element>(p_.dq, t, p_.H, key_head_, K_), p_.H * K_);
  }

  // Address of token t in a contiguous [B, T, heads, dim] output.
  template <class Out>
  Out* output(void* data, int64_t t, int64_t heads, int64_t head, int64_t dim) const {
    return static_cast<Out*>(data) + ((seq_.batch * p_.T + t) * heads + head) * dim;
  }

  const GatedDeltaBwdParams& p_;
  const Sequence seq_;
  const int64_t n_, key_head_, group_, C_, K_, V_;
  const Cut& cut_;
  const T scale_;
  Tiles<T>& x_;
};

template <class Element, bool kDelta>
Status backward(const GatedDeltaBwdParams& p) {
  using T = acc_t<Element>;
  const int64_t tasks = p.N * p.H;
  if (tasks == 0 || p.HV == 0) return nullptr;
  const int64_t group = p.HV / p.H;
  int64_t longest = 0;
  for (int64_t n = 0; n < p.N; ++n) longest = std::max(longest, sequence(p, n).length);
  Cut cut;
  cut.C = chunk_length(p.K, p.V);
  const int64_t chunks = std::max<int64_t>(1, (longest + cut.C - 1) / cut.C);
  cut.held = std::min(chunks, std::max<int64_t>(1, kSegmentStates / group));
  cut.segments = (chunks + cut.held - 1) / cut.held;
  const double work = 10.0 * p.B * p.T * p.HV * p.K * p.V;
  const int64_t threads = useful_threads(p.num_threads, tasks, work);
  Arena<T> count;
  Tiles<T>(count, cut, kDelta, p.K, p.V, group);
  const ThreadBlocks<T> workspace(threads, count.used());
  for_each_task(tasks, threads, [&](int64_t task, int64_t thread) {
    Arena<T> arena(workspace.thread(thread));
    Tiles<T> tiles(arena, cut, kDelta, p.K, p.V, group);
    Task<Element, kDelta>(p, task / p.H, task % p.H, cut, tiles).run();
  });
  return nullptr;
}

}  // namespace
}  // namespace gated_delta

Status gated_delta_chunk_bwd(const GatedDeltaBwdParams& params) {
  return dispatch_dtype(params.dtype, [&]<class Element>() {
    return params.delta ? gated_delta::backward<Element, true>(params)
                        : gated_delta::backward<Element, false>(params);
  });
}

}  // namespace hypenet::cpu
