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
// Mapping: a task is a sequence and a key head with its group of value heads. It processes its sequence
// segment by segment, last segment first; in each it first recomputes and stores the states (and E, R) before
// every chunk. Of the other segments only the state at the start is stored. A segment is processed in blocks
// of chunks: first what is independent of the state (prepare), chunk by chunk; then the recurrences (1), (2)
// and (6), by value head and block of columns of V; then everything that sums over V, chunk by chunk, over
// the value heads in a fixed order. If there are enough tasks, each thread takes whole tasks, else all
// threads share the chunks and columns of each task. The split does not change the result. dQ and dK are
// accumulated transposed, as [K, 2c] with dK left of dQ, which makes all products with S row-major.
//
// Numerics: everything but loads and stores is in the accumulation type; dG is in double.
//
// Cost per token and value head: 2 (7 K V + C (5 K + 5 V)) FLOPs, and 2 (2 K V + C V) for the states, twice
// if there is more than one segment.
#include "gated_delta_chunk.h"
#include "kernels.h"

namespace hypenet::cpu {
namespace gated_delta {
namespace {

constexpr int64_t kSegmentStates = 64;  // states stored at once, over all value heads of the group
constexpr int64_t kBlockAlone = 2;      // chunks per block if one thread has the task
constexpr int64_t kBlockShared = 8;     // if threads share it

// The partition of a task's sequence.
struct Cut {
  int64_t C;         // tokens per chunk
  int64_t block;     // chunks per block
  int64_t held;      // chunks per segment
  int64_t segments;  // of the longest sequence
  int64_t threads;   // that share the task
};

// The buffers of a task; tiles that are 2c wide have the leading dimension 2C.
template <class T>
struct Kept {
  // of the key head, for every chunk of a block
  T* kq;        // [block, 2c, K]: K above Q
  T* kqt;       // [block, K, 2c]: its transpose
  T* products;  // [block, 2c, C]: K K^T above Q K^T
  // of every value head of the group, for every chunk of a block
  ChunkDecay<T>* decay;  // [group, block]
  T* beta;               // [group, block, c]
  T* system;             // [group, block, 2c, C]: -A above P
  T* db_do;              // [group, block, 2c, V]: dB above dO
  T* dstates;            // [group, block + 1, K, V]: dS before every chunk, and after the last
  // of every value head of the group
  T* starts;  // [group, segments, K, V]: the state before every segment
  T* states;  // [group, held, K, V]: before every chunk of the segment but the first
  T* e;       // [group, held, c, V]
  T* r;       // [group, held, c, V]; nothing without delta

  Kept(Arena<T>& a, const Cut& cut, bool delta, int64_t K, int64_t V, int64_t group) {
    const int64_t C = cut.C, chunks = cut.block, heads = group * cut.block;
    for (T** tile : {&kq, &kqt}) *tile = a.take(chunks * 2 * C * K);
    products = a.take(chunks * 2 * C * C);
    decay = reinterpret_cast<ChunkDecay<T>*>(a.take(heads * (sizeof(ChunkDecay<T>) / sizeof(T))));
    beta = a.take(heads * C);
    system = a.take(heads * 2 * C * C);
    db_do = a.take(heads * 2 * C * V);
    dstates = a.take((heads + group) * K * V);
    starts = a.take(group * cut.segments * K * V);
    states = a.take(group * cut.held * K * V);
    e = a.take(group * cut.held * C * V);
    r = a.take(delta ? group * cut.held * C * V : 0);
  }
};

// The buffers of a thread for one chunk of one value head.
template <class T>
struct Scratch {
  T* z;           // [c, V]: Z, then decayed E; dV in the reverse pass
  T* dz_do;       // [2c, V]: dZ above s gamma dO
  T* dz_do_t;     // [V, 2c]: its transpose
  T* et;          // [V, C]: E^T
  T* outer;       // [2c, C]: dB E^T above dO E^T
  T* from_state;  // [K, 2c]: S dZ^T left of S (s gamma dO)^T
  T* from_next;   // [K, C]: dS1 E^T
  // summed over the group
  T* dkqt;   // [K, 2c]: dK^T left of dQ^T
  T* dkq;    // [2c, K]
  T* dm;     // [c, C]
  T* dn;     // [c, C]
  T* mixed;  // [c, 2c]: dM + dM^T left of dN^T

  Scratch(Arena<T>& a, int64_t C, int64_t K, int64_t V) {
    for (T** tile : {&z, &et}) *tile = a.take(C * V);
    for (T** tile : {&dz_do, &dz_do_t}) *tile = a.take(2 * C * V);
    for (T** tile : {&outer, &mixed}) *tile = a.take(2 * C * C);
    for (T** tile : {&dm, &dn}) *tile = a.take(C * C);
    for (T** tile : {&from_state, &dkqt, &dkq}) *tile = a.take(2 * C * K);
    from_next = a.take(C * K);
  }
};

// One task: a sequence and a key head with its group of value heads.
template <class Element, bool kDelta>
class Task {
  using T = acc_t<Element>;

 public:
  // `scratch`: buffers of scratch_size elements, one for each thread that shares the task.
  Task(const GatedDeltaBwdParams& p, int64_t n, int64_t key_head, const Cut& cut, T* kept, T* scratch,
       int64_t scratch_size)
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
        arena_(kept),
        x_(arena_, cut, kDelta, p.K, p.V, group_),
        scratch_(scratch),
        scratch_size_(scratch_size) {}

  void run() {
    const int64_t chunks = (seq_.length + C_ - 1) / C_, segments = (chunks + cut_.held - 1) / cut_.held;
    for (int64_t j = 0; j < group_; ++j) {
      copy_state(static_cast<const T*>(p_.initial_state), j, start(j, 0));
      copy_state(static_cast<const T*>(p_.dfinal_state), j, dstate(j, 0));
    }
    for (segment_ = 0; segment_ + 1 < segments; ++segment_) {
      for (int64_t j = 0; j < group_; ++j) std::copy_n(start(j, segment_), K_ * V_, start(j, segment_ + 1));
      recompute((segment_ + 1) * cut_.held, false);
    }
    for (segment_ = segments - 1; segment_ >= 0; --segment_) {
      const int64_t first = segment_ * cut_.held, stop = std::min(first + cut_.held, chunks);
      recompute(stop, true);
      const int64_t last_block = first + (stop - first - 1) / cut_.block * cut_.block;
      for (int64_t block = last_block; block >= first; block -= cut_.block)
        reverse(block, std::min(block + cut_.block, stop));
    }
    for (int64_t j = 0; j < group_; ++j)
      std::copy_n(dstate(j, 0), K_ * V_, static_cast<T*>(p_.dinitial_state) + state_offset(j));
  }

 private:
  int64_t value_head(int64_t j) const { return key_head_ * group_ + j; }
  int64_t token(int64_t chunk) const { return seq_.start + chunk * C_; }
  int64_t tokens(int64_t chunk) const { return std::min(C_, seq_.length - chunk * C_); }
  int64_t state_offset(int64_t j) const { return (n_ * p_.HV + value_head(j)) * K_ * V_; }
  // i: chunk within the block; slot: chunk within the segment
  T* kq(int64_t i) const { return x_.kq + i * 2 * C_ * K_; }
  T* kqt(int64_t i) const { return x_.kqt + i * 2 * C_ * K_; }
  T* products(int64_t i) const { return x_.products + i * 2 * C_ * C_; }
  ChunkDecay<T>& decay(int64_t j, int64_t i) const { return x_.decay[j * cut_.block + i]; }
  T* beta(int64_t j, int64_t i) const { return x_.beta + (j * cut_.block + i) * C_; }
  T* system(int64_t j, int64_t i) const { return x_.system + (j * cut_.block + i) * 2 * C_ * C_; }
  T* db_do(int64_t j, int64_t i) const { return x_.db_do + (j * cut_.block + i) * 2 * C_ * V_; }
  T* dstate(int64_t j, int64_t i) const { return x_.dstates + (j * (cut_.block + 1) + i) * K_ * V_; }
  T* start(int64_t j, int64_t segment) const { return x_.starts + (j * cut_.segments + segment) * K_ * V_; }
  T* state(int64_t j, int64_t slot) const {
    return slot == 0 ? start(j, segment_) : x_.states + (j * cut_.held + slot) * K_ * V_;
  }
  T* e(int64_t j, int64_t slot) const { return x_.e + (j * cut_.held + slot) * C_ * V_; }
  T* r(int64_t j, int64_t slot) const { return x_.r + (j * cut_.held + slot) * C_ * V_; }

  Scratch<T> scratch(int64_t thread) const {
    Arena<T> arena(scratch_ + thread * scratch_size_);
    return Scratch<T>(arena, C_, K_, V_);
  }

  void copy_state(const T* from, int64_t j, T* to) const {
    if (from == nullptr) {
      std::fill_n(to, K_ * V_, T(0));
    } else {
      std::copy_n(from + state_offset(j), K_ * V_, to);
    }
  }

  template <class Run>
  void for_each_chunk(int64_t first, int64_t stop, const Run& run) const {
    for_each_task(stop - first, cut_.threads, [&](int64_t i, int64_t thread) { run(first + i, i, thread); });
  }

  // Calls run(value head, first column, number of columns, thread) for all blocks of columns.
  template <class Run>
  void for_each_columns(const Run& run) const {
    const ColumnSplit split = split_columns<T>(group_, V_, cut_.threads);
    for_each_task(split.tasks, cut_.threads, [&](int64_t task, int64_t thread) {
      const int64_t start = task % split.blocks * split.columns;
      run(task / split.blocks, start, std::min(split.columns, V_ - start), thread);
    });
  }

  // Computes what is independent of the state for chunk i of a block.
  void prepare(int64_t chunk, int64_t i, bool with_q) const {
    const int64_t t = token(chunk), c = tokens(chunk), b = seq_.batch, rows = with_q ? 2 * c : c;
    load_rows(c, K_, row<Element>(p_.k, b, t, key_head_), p_.k.token, kq(i), K_);
    if (with_q) load_rows(c, K_, row<Element>(p_.q, b, t, key_head_), p_.q.token, kq(i) + c * K_, K_);
    transpose(rows, K_, kq(i), K_, kqt(i), 2 * C_);
    const int64_t first = kDelta ? 0 : c;
    gemm<Op::kNN>(rows - first, c, K_, kq(i) + first * K_, K_, kqt(i), 2 * C_, products(i) + first * C_, C_);
    for (int64_t j = 0; j < group_; ++j) {
      const int64_t head = value_head(j);
      decay(j, i).compute(c, C_, row<T>(p_.g, b, t, head), p_.g.token);
      if constexpr (kDelta) {
        load_rows(c, 1, row<T>(p_.beta, b, t, head), p_.beta.token, beta(j, i), 1);
        form_system(c, C_, beta(j, i), products(i), decay(j, i), system(j, i));
      }
      if (!with_q) continue;
      const T *QK = products(i) + c * C_, *gamma = decay(j, i).between;
      T* P = system(j, i) + c * C_;
      for (int64_t k = 0; k < c * C_; ++k) P[k] = scale_ * gamma[k] * QK[k];
    }
  }

  // Runs the forward without its output from the start of the segment. With `keep`, stores the states, E and
  // R of every chunk; otherwise only the last state, at the start of the next segment.
  void recompute(int64_t stop, bool keep) const {
    const int64_t begin = segment_ * cut_.held;
    for (int64_t first = begin; first < stop; first += cut_.block) {
      const int64_t last = std::min(first + cut_.block, stop);
      for_each_chunk(first, last, [&](int64_t chunk, int64_t i, int64_t) { prepare(chunk, i, false); });
      for_each_columns([&](int64_t j, int64_t from, int64_t w, int64_t thread) {
        const Scratch<T> y = scratch(thread);
        for (int64_t chunk = first; chunk < last; ++chunk) {
          const int64_t i = chunk - first, slot = keep ? chunk - begin : i;
          const T* S = keep ? state(j, slot) : start(j, segment_ + 1);
          T* S1 = !keep ? start(j, segment_ + 1) : chunk + 1 < stop ? state(j, slot + 1) : nullptr;
          advance_state(chunk, i, slot, j, from, w, S, S1, y);
        }
      });
    }
  }

  // Computes columns [from, from + w) of E and R of one chunk, and of the state after it unless S1 is null.
  void advance_state(int64_t chunk, int64_t i, int64_t slot, int64_t j, int64_t from, int64_t w, const T* S,
                     T* S1, const Scratch<T>& y) const {
    const int64_t c = tokens(chunk);
    const ChunkDecay<T>& d = decay(j, i);
    T *E = e(j, slot) + from, *R = r(j, slot) + from;
    const Element* v = row<Element>(p_.v, seq_.batch, token(chunk), value_head(j)) + from;
    load_rows(c, w, v, p_.v.token, kDelta ? R : E, V_);
    if constexpr (kDelta) {
      gemm<Op::kNN>(c, w, K_, kq(i), K_, S + from, V_, y.z, V_);
      form_residual(c, w, beta(j, i), d, y.z, V_, R, E, V_);
      solve_unit_lower(c, w, system(j, i), C_, E, V_);
    }
    if (S1 == nullptr) return;
    scale_rows(c, w, d.to_end, E, V_, y.z, V_);
    gemm_from<Op::kNN>(FromScaled<T>{S + from, V_, d.whole}, K_, w, c, kqt(i), 2 * C_, y.z, V_, S1 + from,
                       V_);
  }

  // Computes all gradients of chunks [first, stop). dS after them is in dstate(j, 0), where the previous call
  // left it.
  void reverse(int64_t first, int64_t stop) const {
    for_each_chunk(first, stop, [&](int64_t chunk, int64_t i, int64_t) { prepare(chunk, i, true); });
    for_each_columns([&](int64_t j, int64_t from, int64_t w, int64_t thread) {
      const Scratch<T> y = scratch(thread);
      T *last = dstate(j, stop - first) + from, *previous = dstate(j, 0) + from;
      for (int64_t k = 0; k < K_; ++k) std::copy_n(previous + k * V_, w, last + k * V_);
      for (int64_t chunk = stop - 1; chunk >= first; --chunk)
        reverse_state(chunk, chunk - first, j, from, w, y);
    });
    for_each_chunk(first, stop, [&](int64_t chunk, int64_t i, int64_t thread) {
      gradients(chunk, i, chunk - segment_ * cut_.held, scratch(thread));
    });
  }

  // Columns [from, from + w) of (1), (2) and (6).
  void reverse_state(int64_t chunk, int64_t i, int64_t j, int64_t from, int64_t w,
                     const Scratch<T>& y) const {
    const int64_t t = token(chunk), c = tokens(chunk), first = kDelta ? 0 : c;
    const ChunkDecay<T>& d = decay(j, i);
    T *dB = db_do(j, i) + from, *dO = dB + c * V_, *dV = kDelta ? y.z : dB;
    load_rows(c, w, row<Element>(p_.do_, seq_.batch, t, value_head(j)) + from, p_.do_.token, dO, V_);
    gemm<Op::kNN>(c, w, K_, kq(i), K_, dstate(j, i + 1) + from, V_, dB, V_);
    add_lower_transposed_product(FromScaledRows<T>{dB, V_, d.to_end}, c, w, system(j, i) + c * C_, C_, dO, V_,
                                 dB, V_);
    if constexpr (kDelta) {
      solve_unit_lower_transposed(c, w, system(j, i), C_, dB, V_);
      scale_rows(c, w, beta(j, i), dB, V_, dV, V_);
    }
    store_rows(c, w, dV, V_, output<Element>(p_.dv, t, p_.HV, value_head(j), V_) + from, p_.HV * V_);
    scale_gradients(c, w, j, i, dB, y.dz_do);
    gemm_from<Op::kNN>(FromScaled<T>{dstate(j, i + 1) + from, V_, d.whole}, K_, w, 2 * c - first,
                       kqt(i) + first, 2 * C_, y.dz_do + first * V_, V_, dstate(j, i) + from, V_);
  }

  // dz_do = dZ above s gamma dO, from dB above dO.
  void scale_gradients(int64_t c, int64_t w, int64_t j, int64_t i, const T* dB, T* dz_do) const {
    T factor[2 * kMaxChunk];
    for (int64_t k = 0; k < c; ++k) {
      const T gamma = decay(j, i).from_start[k];
      factor[k] = kDelta ? -gamma * beta(j, i)[k] : T(0);
      factor[c + k] = scale_ * gamma;
    }
    const int64_t first = kDelta ? 0 : c;
    scale_rows(2 * c - first, w, factor + first, dB + first * V_, V_, dz_do + first * V_, V_);
  }

  // Computes what sums over the columns of V: dQ, dK, dg and dbeta of one chunk.
  void gradients(int64_t chunk, int64_t i, int64_t slot, const Scratch<T>& y) const {
    const int64_t t = token(chunk), c = tokens(chunk);
    std::fill_n(y.dkqt, 2 * C_ * K_, T(0));
    std::fill_n(y.dm, C_ * C_, T(0));
    std::fill_n(y.dn, C_ * C_, T(0));
    for (int64_t j = 0; j < group_; ++j) {
      double dG[kMaxChunk] = {};
      T dbeta[kMaxChunk] = {};
      transpose(c, V_, e(j, slot), V_, y.et, C_);
      chunk_products(c, i, j, y, dG, dbeta);
      if constexpr (kDelta) {
        for (int64_t k = 0; k < c; ++k) dbeta[k] += dot(V_, r(j, slot) + k * V_, db_do(j, i) + k * V_);
      }
      through_states(c, i, j, state(j, slot), y, dG);
      store_gate_gradients(t, c, i, j, dG, dbeta);
    }
    finish_key_head(t, c, i, y);
  }

  // (3) and (4): the gradients through A and P of K K^T, Q K^T, beta and the decays within the chunk.
  void chunk_products(int64_t c, int64_t i, int64_t j, const Scratch<T>& y, double* dG, T* dbeta) const {
    const int64_t first = kDelta ? 0 : c;
    gemm<Op::kNN>(2 * c - first, c, V_, db_do(j, i) + first * V_, V_, y.et, C_, y.outer + first * C_, C_);
    T columns[kMaxChunk] = {};
    for (int64_t a = 0; a < c; ++a) {
      const int64_t row = a * C_;
      const T beta_a = kDelta ? beta(j, i)[a] : T(0);
      const T *gamma = decay(j, i).between + row, *P = system(j, i) + c * C_ + row;
      T *dA = y.outer + row, *X = dA + c * C_;
      y.dn[row + a] += scale_ * X[a];
      dA[a] = X[a] = 0;  // dA has no diagonal, and the diagonal of X does not decay
      vec<T> through_A{}, through_P{};
      for (int64_t b = 0; b <= a; b += kLanes<T>) {  // Gamma and P are zero above the diagonal
        const Lanes<T> lanes(c - b);
        const vec<T> X_b = lanes.read(X + b), gamma_b = lanes.read(gamma + b);
        const vec<T> product = X_b * lanes.read(P + b);
        vec<T> column = lanes.read(columns + b) + product;
        through_P += product;
        lanes.write(y.dn + row + b, lanes.read(y.dn + row + b) + scale_ * X_b * gamma_b);
        if constexpr (kDelta) {
          const vec<T> decayed = -lanes.read(dA + b) * gamma_b;
          const vec<T> part = decayed * lanes.read(products(i) + row + b);
          lanes.write(y.dm + row + b, lanes.read(y.dm + row + b) + beta_a * decayed);
          through_A += part;
          column += beta_a * part;
        }
        lanes.write(columns + b, column);
      }
      const T from_A = kDelta ? sum<T>(through_A) : T(0);
      dbeta[a] += from_A;
      dG[a] += sum<T>(through_P) + beta_a * from_A;
    }
    for (int64_t b = 0; b < c; ++b) dG[b] -= columns[b];
  }

  // (5): the parts of dK, dQ and dG that come from S and dS1.
  void through_states(int64_t c, int64_t i, int64_t j, const T* S, const Scratch<T>& y, double* dG) const {
    const int64_t first = kDelta ? 0 : c, wide = 2 * C_;
    const ChunkDecay<T>& d = decay(j, i);
    const T* dS1 = dstate(j, i + 1);
    scale_gradients(c, V_, j, i, db_do(j, i), y.dz_do);
    transpose(2 * c - first, V_, y.dz_do + first * V_, V_, y.dz_do_t + first, wide);
    gemm<Op::kNN>(K_, 2 * c - first, V_, S, V_, y.dz_do_t + first, wide, y.from_state + first, wide);
    gemm<Op::kNN>(K_, c, V_, dS1, V_, y.et, C_, y.from_next, C_);
    T by_state[2 * kMaxChunk] = {}, by_next[kMaxChunk] = {};
    for (int64_t a = 0; a < K_; ++a) {
      const T *kq_t = kqt(i) + a * wide, *part = y.from_state + a * wide, *next = y.from_next + a * C_;
      T* dkq = y.dkqt + a * wide;
      for (int64_t b = first; b < 2 * c; ++b) {
        dkq[b] += part[b];
        by_state[b] += kq_t[b] * part[b];
      }
      for (int64_t b = 0; b < c; ++b) {
        const T decayed = d.to_end[b] * next[b];
        dkq[b] += decayed;
        by_next[b] += kq_t[b] * decayed;
      }
    }
    double whole = double(d.whole) * dot(K_ * V_, S, dS1);
    for (int64_t b = 0; b < c; ++b) {
      dG[b] += double(by_state[b]) + by_state[c + b];
      if (b + 1 == c) break;  // the last token does not decay on its way to the end
      dG[b] -= by_next[b];
      whole += by_next[b];
    }
    dG[c - 1] += whole;
  }

  void store_gate_gradients(int64_t t, int64_t c, int64_t i, int64_t j, const double* dG,
                            const T* dbeta) const {
    T* dg = output<T>(p_.dg, t, p_.HV, value_head(j), 1);
    double running = 0;
    for (int64_t k = c - 1; k >= 0; --k) {
      running += dG[k];
      dg[k * p_.HV] = decay(j, i).clamped[k] ? T(0) : T(running);
    }
    if constexpr (kDelta) store_rows(c, 1, dbeta, 1, output<T>(p_.dbeta, t, p_.HV, value_head(j), 1), p_.HV);
  }

  // (7) the parts of dK and dQ that come through K K^T and Q K^T.
  void finish_key_head(int64_t t, int64_t c, int64_t i, const Scratch<T>& y) const {
    const int64_t wide = 2 * C_, first = kDelta ? 0 : c;
    for (int64_t a = 0; a < c; ++a) {
      for (int64_t b = 0; b < c; ++b) {
        y.mixed[a * wide + b] = y.dm[a * C_ + b] + y.dm[b * C_ + a];
        y.mixed[a * wide + c + b] = y.dn[b * C_ + a];
      }
    }
    gemm<Op::kNN, true>(K_, 2 * c - first, c, kqt(i), wide, y.mixed + first, wide, y.dkqt + first, wide);
    gemm<Op::kNN, true>(K_, c, c, kqt(i) + c, wide, y.dn, C_, y.dkqt, wide);
    transpose(K_, 2 * c, y.dkqt, wide, y.dkq, K_);
    store_rows(c, K_, y.dkq, K_, output<Element>(p_.dk, t, p_.H, key_head_, K_), p_.H * K_);
    store_rows(c, K_, y.dkq + c * K_, K_, output<Element>(p_.dq, t, p_.H, key_head_, K_), p_.H * K_);
  }

  // The address of token t in a contiguous [B, T, heads, dim] output.
  template <class Out>
  Out* output(void* data, int64_t t, int64_t heads, int64_t head, int64_t dim) const {
    return static_cast<Out*>(data) + ((seq_.batch * p_.T + t) * heads + head) * dim;
  }

  const GatedDeltaBwdParams& p_;
  const Sequence seq_;
  const int64_t n_, key_head_, group_, C_, K_, V_;
  const Cut& cut_;
  const T scale_;
  Arena<T> arena_;
  const Kept<T> x_;
  T* const scratch_;
  const int64_t scratch_size_;
  int64_t segment_ = 0;
};

template <class Params>
Cut cut_sequences(const Params& p, int64_t tasks) {
  const int64_t group = p.HV / p.H;
  int64_t longest = 0;
  for (int64_t n = 0; n < p.N; ++n) longest = std::max(longest, sequence(p, n).length);
  Cut cut;
  cut.C = chunk_length(p.K, p.V);
  const int64_t chunks = std::max<int64_t>(1, (longest + cut.C - 1) / cut.C);
  cut.held = std::min(chunks, std::max<int64_t>(1, kSegmentStates / group));
  cut.segments = (chunks + cut.held - 1) / cut.held;
  // Threads share tasks if distributing whole tasks would leave some threads idle for much of the time.
  const bool shared = tasks % p.num_threads != 0 && tasks < 4 * p.num_threads;
  cut.block = std::min(shared ? kBlockShared : kBlockAlone, cut.held);
  const double work_of_block = 3.0 * cut.block * cut.C * group * p.K * p.V;
  cut.threads = shared ? useful_threads(p.num_threads, p.num_threads, work_of_block) : 1;
  return cut;
}

template <class Element, bool kDelta>
Status backward(const GatedDeltaBwdParams& p) {
  using T = acc_t<Element>;
  const int64_t tasks = p.N * p.H;
  for (void* x : {p.dq, p.dk}) zero_tail<Element>(p, x, p.H * p.K);
  zero_tail<Element>(p, p.dv, p.HV * p.V);
  for (void* x : {p.dg, p.dbeta}) zero_tail<T>(p, x, p.HV);
  if (tasks == 0 || p.HV == 0) return nullptr;
  const Cut cut = cut_sequences(p, tasks);
  const double work = 10.0 * p.B * p.T * p.HV * p.K * p.V;
  const int64_t threads = cut.threads > 1 ? 1 : useful_threads(p.num_threads, tasks, work);
  Arena<T> kept_size, scratch_size;
  Kept<T>(kept_size, cut, kDelta, p.K, p.V, p.HV / p.H);
  Scratch<T>(scratch_size, cut.C, p.K, p.V);
  const ThreadBlocks<T> kept(threads, kept_size.used()), scratch(threads * cut.threads, scratch_size.used());
  for_each_task(tasks, threads, [&](int64_t task, int64_t thread) {
    Task<Element, kDelta>(p, task / p.H, task % p.H, cut, kept.thread(thread), scratch.thread(thread),
                          scratch_size.used())
        .run();
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
