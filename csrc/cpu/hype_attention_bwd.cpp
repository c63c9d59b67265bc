// HyPE attention, backward: dq, dk, dv and the gate's gradient, from lse and the output before the gate.
//
// Math, with x_ti, lse and o_ungated as in hype_attention_fwd.cpp, z = sigmoid(gate), do the gradient of o:
//   do'_t = do_t z_t,  dgate_t = do_t o_ungated_t z_t (1 - z_t),  delta_t = do'_t . o_ungated_t
//   P_ti = exp(x_ti - lse_t),  dP_ti = do'_t . v_i,  dX_ti = P_ti (dP_ti - delta_t)
//   dv_i = sum_t P_ti do'_t,  dk_i = sum_t dX_ti (s_t scale q_t),  dq_t = s_t scale sum_i dX_ti k_i
// dk and dv sum over the query heads of the group as well.
//
// Shapes: params.h, HypeAttentionBwdParams.
//
// Mapping: (1) a pass over query blocks prepares s_t scale q, do', delta and writes dgate. Then either (2)
// one task per (sequence, key head) computes all of dq, dk, dv; or, where those are too few for the threads,
// (3) a task per (query head, query block) for dq and (4) one per (key head, key block) for dk, dv, both of
// which recompute P and dX. Every sum is taken over the same blocks in the same order either way: dq over
// rising key blocks; dk, dv over the heads of the group, then rising query blocks. So neither the choice nor
// the number of threads changes a bit.
//
// Numerics: everything between the inputs and the outputs is in the accumulation type; x_ti - lse_t <= 0 but
// for rounding, so no exponential overflows; keys after a query's position get a zero weight.
//
// Cost: 10 D FLOPs per visible (query, key) pair, 14 D in two passes; compute bound. Memory: 2 B T H D
// accumulators, in (2) one head group's dq per thread.
#include <omp.h>

#include <cstdint>
#include <vector>

#include "gemm.h"
#include "hype_attention.h"
#include "kernels.h"
#include "simd.h"

namespace hypenet::cpu {
using namespace attention;
namespace {

// What (1) leaves for the other passes, [B, H, T, D] and [B, H, T].
template <class Acc>
struct Prepared {
  Acc *q, *do_, *delta;
  const Acc* lse;
  int64_t T, H, D;

  // Rows [token, ...) of a head; all its rows are contiguous.
  int64_t row(const Sequence& s, int64_t head, int64_t begin) const {
    return (s.batch * H + head) * T + s.first + begin;
  }
};

// Factor of q at a position.
inline double query_scale(const HypeAttentionBwdParams& p, int64_t position) {
  return p.scale * position_scale(position, p.logit_scale_base);
}

// (1) for one block of queries; o_row and gate_row are room for a row each.
template <class Element, class Acc>
void prepare(const HypeAttentionBwdParams& p, const Sequence& s, int64_t head, int64_t begin, int64_t rows,
             const Prepared<Acc>& out, Acc* o_row, Acc* gate_row) {
  const int64_t D = p.D, token = s.first + begin, row = out.row(s, head, begin);
  const auto q = head_rows<Element>(p.q, s.batch, token, head);
  const auto gate = head_rows<Element>(p.gate, s.batch, token, head);
  const auto grad = head_rows<Element>(p.do_, s.batch, token, head);
  const auto o = head_rows<const Element>(p.o_ungated, p.T, p.H, D, s.batch, token, head);
  const auto dgate = head_rows<Element>(p.dgate, p.T, p.H, D, s.batch, token, head);
  for (int64_t r = 0; r < rows; ++r) {
    Acc* q_row = out.q + (row + r) * D;
    Acc* do_row = out.do_ + (row + r) * D;
    const Acc factor = static_cast<Acc>(query_scale(p, s.offset + begin + r));
    for (int64_t d = 0; d < D; ++d) q_row[d] = static_cast<Acc>(q[r][d]) * factor;
    load_row(grad[r], D, do_row);
    load_row(o[r], D, o_row);
    if (gate.data != nullptr) {
      load_row(gate[r], D, gate_row);
      sigmoid_in_place(gate_row, D);
      for (int64_t d = 0; d < D; ++d) {
        const Acc gated = do_row[d] * gate_row[d];
        dgate[r][d] = static_cast<Element>(gated * o_row[d] * (1 - gate_row[d]));
        do_row[d] = gated;
      }
    }
    Acc delta = 0;
#pragma omp simd reduction(+ : delta)
    for (int64_t d = 0; d < D; ++d) delta += do_row[d] * o_row[d];
    out.delta[row + r] = delta;
  }
}

// A key block and its values, both transposed, and the keys as rows; P and dX of one block pair.
template <class Acc>
struct Blocks {
  Acc *k_transposed, *v_transposed, *k_rows, *weights, *dlogits;

  Blocks(Arena<Acc>& arena, int64_t D)
      : k_transposed(arena.take(D * kKeyBlock)),
        v_transposed(arena.take(D * kKeyBlock)),
        k_rows(arena.take(D * kKeyBlock)),
        weights(arena.take(kQueryBlock * kKeyBlock)),
        dlogits(arena.take(kQueryBlock * kKeyBlock)) {}

  template <class Element>
  void load(const HypeAttentionBwdParams& p, const Sequence& s, int64_t key_head, int64_t start,
            int64_t keys) {
    load_rows(head_rows<Element>(p.v, s.batch, s.first + start, key_head), keys, p.D, k_rows);
    transpose(keys, p.D, k_rows, p.D, v_transposed, kKeyBlock);
    load_rows(head_rows<Element>(p.k, s.batch, s.first + start, key_head), keys, p.D, k_rows);
    transpose(keys, p.D, k_rows, p.D, k_transposed, kKeyBlock);
  }

  // P and dX of `rows` queries from `row` on, the first of which sees `first_visible` of the keys.
  void differentiate(const Prepared<Acc>& in, int64_t row, int64_t rows, int64_t keys,
                     int64_t first_visible) {
    const int64_t D = in.D;
    for_each_strip(rows, keys, first_visible, [&](int64_t r, int64_t count, int64_t seen) {
      const int64_t at = r * kKeyBlock, from = (row + r) * D;
      gemm<Op::kNN, false>(count, seen, D, in.q + from, D, k_transposed, kKeyBlock, weights + at, kKeyBlock);
      gemm<Op::kNN, false>(count, seen, D, in.do_ + from, D, v_transposed, kKeyBlock, dlogits + at,
                           kKeyBlock);
    });
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t visible = std::clamp<int64_t>(first_visible + r, 0, keys);
      Acc *P = weights + r * kKeyBlock, *dX = dlogits + r * kKeyBlock;
      exp_row(P, visible, in.lse[row + r]);
      const Acc delta = in.delta[row + r];
      for (int64_t i = 0; i < visible; ++i) dX[i] = P[i] * (dX[i] - delta);
      for (int64_t i = visible; i < keys; ++i) P[i] = dX[i] = 0;
    }
  }

  void add_dq(int64_t rows, int64_t keys, int64_t first_visible, int64_t D, Acc* dq) const {
    for_each_strip(rows, keys, first_visible, [&](int64_t r, int64_t count, int64_t seen) {
      gemm<Op::kNN, true>(count, D, seen, dlogits + r * kKeyBlock, kKeyBlock, k_rows, D, dq + r * D, D);
    });
  }

  void add_dk_dv(const Prepared<Acc>& in, int64_t row, int64_t rows, int64_t keys, Acc* dk, Acc* dv) const {
    const int64_t D = in.D;
    gemm<Op::kTN, true>(keys, D, rows, dlogits, kKeyBlock, in.q + row * D, D, dk, D);
    gemm<Op::kTN, true>(keys, D, rows, weights, kKeyBlock, in.do_ + row * D, D, dv, D);
  }
};

template <class Element, class Acc>
void store_dq(const HypeAttentionBwdParams& p, const Sequence& s, int64_t head, int64_t begin, int64_t rows,
              const Acc* dq) {
  const auto out = head_rows<Element>(p.dq, p.T, p.H, p.D, s.batch, s.first + begin, head);
  for (int64_t r = 0; r < rows; ++r) {
    const Acc factor = static_cast<Acc>(query_scale(p, s.offset + begin + r));
    for (int64_t d = 0; d < p.D; ++d) out[r][d] = static_cast<Element>(dq[r * p.D + d] * factor);
  }
}

template <class Element, class Acc>
void store_keys(void* out, const HypeAttentionBwdParams& p, const Sequence& s, int64_t key_head,
                int64_t start, int64_t keys, const Acc* x) {
  const auto rows = head_rows<Element>(out, p.S, p.HK, p.D, s.batch, s.first + start, key_head);
  for (int64_t r = 0; r < keys; ++r) store_row(x + r * p.D, p.D, rows[r]);
}

// dk and dv of one key block; adds its share to dq [group, T, D] where that is given.
template <class Element, class Acc>
void run_key_block(const HypeAttentionBwdParams& p, const Sequence& s, int64_t key_head, int64_t start,
                   const Prepared<Acc>& in, Acc* memory, Acc* dq) {
  const int64_t D = p.D, group = p.H / p.HK, keys = std::min(kKeyBlock, s.S - start);
  Arena<Acc> arena(memory);
  Blocks<Acc> b(arena, D);
  Acc* dk = arena.take(kKeyBlock * D);
  Acc* dv = arena.take(kKeyBlock * D);
  std::fill(dk, dk + keys * D, Acc(0));
  std::fill(dv, dv + keys * D, Acc(0));
  b.template load<Element>(p, s, key_head, start, keys);
  const int64_t first_block = std::max<int64_t>(start - s.offset, 0) / kQueryBlock;
  for (int64_t g = 0; g < group; ++g) {
    for (int64_t begin = first_block * kQueryBlock; begin < s.T; begin += kQueryBlock) {
      const int64_t rows = std::min(kQueryBlock, s.T - begin), row = in.row(s, key_head * group + g, begin);
      const int64_t seen = std::min(keys, s.offset + begin + rows - start);
      const int64_t first_visible = s.offset + begin - start + 1;
      b.differentiate(in, row, rows, seen, first_visible);
      b.add_dk_dv(in, row, rows, seen, dk, dv);
      if (dq != nullptr) b.add_dq(rows, seen, first_visible, D, dq + (g * s.T + begin) * D);
    }
  }
  store_keys<Element>(p.dk, p, s, key_head, start, keys, dk);
  store_keys<Element>(p.dv, p, s, key_head, start, keys, dv);
}

// (2) all gradients of one key head's group.
template <class Element, class Acc>
void run_group(const HypeAttentionBwdParams& p, const Sequence& s, int64_t key_head, const Prepared<Acc>& in,
               Acc* memory, Acc* dq) {
  const int64_t group = p.H / p.HK;
  std::fill(dq, dq + group * s.T * p.D, Acc(0));
  for (int64_t start = 0; start < s.S; start += kKeyBlock) {
    run_key_block<Element>(p, s, key_head, start, in, memory, dq);
  }
  for (int64_t g = 0; g < group; ++g) {
    store_dq<Element>(p, s, key_head * group + g, 0, s.T, dq + g * s.T * p.D);
  }
}

// (3) dq of one query block.
template <class Element, class Acc>
void run_query_block(const HypeAttentionBwdParams& p, const Sequence& s, int64_t head, int64_t begin,
                     const Prepared<Acc>& in, Acc* memory) {
  const int64_t D = p.D, rows = std::min(kQueryBlock, s.T - begin), position = s.offset + begin;
  Arena<Acc> arena(memory);
  Blocks<Acc> b(arena, D);
  Acc* dq = arena.take(kQueryBlock * D);
  std::fill(dq, dq + rows * D, Acc(0));
  for (int64_t start = 0; start < position + rows; start += kKeyBlock) {
    const int64_t seen = std::min(kKeyBlock, position + rows - start);
    b.template load<Element>(p, s, head / (p.H / p.HK), start, seen);
    b.differentiate(in, in.row(s, head, begin), rows, seen, position - start + 1);
    b.add_dq(rows, seen, position - start + 1, D, dq);
  }
  store_dq<Element>(p, s, head, begin, rows, dq);
}

// A block that starts at row `begin` of a head of sequence n.
struct Task {
  int64_t n, head, begin;
};

// The blocks of `size` of every head's first `length(sequence)` rows.
template <class Length>
std::vector<Task> list_blocks(const HypeAttentionBwdParams& p, int64_t heads, int64_t size, Length&& length) {
  std::vector<Task> tasks;
  for (int64_t n = 0; n < p.N; ++n) {
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t begin = 0; begin < length(sequence(p, n)); begin += size)
        tasks.push_back({n, head, begin});
    }
  }
  return tasks;
}

// Whether (2), 5 products a block pair, ends before (3) and (4), 7 products but many more tasks.
bool one_pass(const HypeAttentionBwdParams& p, int64_t threads) {
  const int64_t tasks = p.N * p.HK;
  return 5 * ceil_div(tasks, threads) * threads <= 7 * tasks;
}

template <class Element>
void backward(const HypeAttentionBwdParams& p) {
  using Acc = acc_t<Element>;
  const int64_t D = p.D, rows = p.B * p.H * p.T;
  const auto queries = [](const Sequence& s) { return s.T; };
  const auto keys = [](const Sequence& s) { return s.S; };
  const std::vector<Task> query_blocks = list_blocks(p, p.H, kQueryBlock, queries);
  const int64_t threads = useful_threads(p.num_threads, query_blocks.size(), 3 * multiply_adds(p));
  const bool single = one_pass(p, threads);

  Arena<Acc> count;
  Blocks<Acc>(count, D);
  count.take(2 * kKeyBlock * D);
  const int64_t block_size = count.used();
  if (single) count.take(p.H / p.HK * p.T * D);
  const ThreadBlocks<Acc> memory(threads, count.used()), shared(1, 2 * rows * D + rows);
  Acc* q = shared.thread(0);
  const Prepared<Acc> in{q, q + rows * D, q + 2 * rows * D, static_cast<const Acc*>(p.lse), p.T, p.H, D};

  const auto for_each_block = [&](const std::vector<Task>& tasks, auto&& run) {
    for_each_task(tasks.size(), threads, [&](int64_t i, int64_t thread) {
      run(sequence(p, tasks[i].n), tasks[i].head, tasks[i].begin, memory.thread(thread));
    });
  };
  for_each_block(query_blocks, [&](const Sequence& s, int64_t head, int64_t begin, Acc* room) {
    prepare<Element>(p, s, head, begin, std::min(kQueryBlock, s.T - begin), in, room, room + D);
  });
  if (single) {
    for_each_block(list_blocks(p, p.HK, p.S, keys),
                   [&](const Sequence& s, int64_t key_head, int64_t, Acc* room) {
                     run_group<Element>(p, s, key_head, in, room, room + block_size);
                   });
    return;
  }
  for_each_block(query_blocks, [&](const Sequence& s, int64_t head, int64_t begin, Acc* room) {
    run_query_block<Element>(p, s, head, begin, in, room);
  });
  for_each_block(list_blocks(p, p.HK, kKeyBlock, keys),
                 [&](const Sequence& s, int64_t key_head, int64_t start, Acc* room) {
                   run_key_block<Element>(p, s, key_head, start, in, room, static_cast<Acc*>(nullptr));
                 });
}

}  // namespace

Status hype_attention_bwd(const HypeAttentionBwdParams& params) {
  return dispatch_dtype(params.dtype, [&]<class Element>() -> Status {
    backward<Element>(params);
    return nullptr;
  });
}

}  // namespace hypenet::cpu
