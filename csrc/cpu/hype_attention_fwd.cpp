// HyPE attention, forward: causal grouped-query attention by online softmax.
//
// Math, for query t of head h at position p = query_offset + t (of its sequence):
//   x_ti = s_p scale q_t . k_i,  i <= p,  s_p = ln(p + a) / ln(a)        (s_p = 1 without a base)
//   lse_t = ln sum_i exp(x_ti)
//   o_ungated_t = sum_i exp(x_ti - lse_t) v_i,  o_t = o_ungated_t sigmoid(gate_t)
//
// Shapes: params.h, HypeAttentionFwdParams.
//
// Mapping: a task is (sequence, key head, up to kHeadsPerTask query heads of its group, block of kQueryBlock
// queries). It walks over the key blocks in rising order and holds one transposed key block, which all its
// heads read. Tasks share nothing, so that any number of threads gives the same bits.
//
// Numerics: q is scaled in the accumulation type, where also logits, maxima, sums and outputs live. Every
// exponent taken is <= 0: every query sees the first key of the first block, so its maximum is finite from
// there on. Keys after a query's position enter neither maximum nor sum and weigh zero.
//
// Cost: 4 D FLOPs per visible (query, key) pair; compute bound. Memory: a few blocks per thread.
//
// Limits: a value v_i that is not finite reaches back to the queries of its strip, 0 times it being NaN.
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

constexpr int64_t kHeadsPerTask = 4;

struct Task {
  int64_t n, key_head, head, num_heads, query_block;
};

// Longest first, so that the last ones to finish are short.
std::vector<Task> list_tasks(const HypeAttentionFwdParams& p) {
  const int64_t group = p.H / p.HK;
  std::vector<Task> tasks;
  int64_t max_blocks = 0;
  for (int64_t n = 0; n < p.N; ++n)
    max_blocks = std::max(max_blocks, ceil_div(sequence(p, n).T, kQueryBlock));
  for (int64_t block = max_blocks - 1; block >= 0; --block) {
    for (int64_t n = 0; n < p.N; ++n) {
      if (block * kQueryBlock >= sequence(p, n).T) continue;
      for (int64_t key_head = 0; key_head < p.HK; ++key_head) {
        for (int64_t g = 0; g < group; g += kHeadsPerTask) {
          tasks.push_back({n, key_head, key_head * group + g, std::min(kHeadsPerTask, group - g), block});
        }
      }
    }
  }
  return tasks;
}

// What a thread holds: per head of the task the scaled queries, the sums over keys so far, their maxima and
// weights; shared by the heads the transposed key block, room for a block of rows, and one block of
// weights.
template <class Acc>
struct Blocks {
  Acc *q[kHeadsPerTask], *o[kHeadsPerTask], *max[kHeadsPerTask], *sum[kHeadsPerTask];
  Acc *k_transposed, *rows, *weights;

  Blocks(Arena<Acc>& arena, int64_t num_heads, int64_t D) {
    for (int64_t h = 0; h < num_heads; ++h) {
      q[h] = arena.take(kQueryBlock * D);
      o[h] = arena.take(kQueryBlock * D);
      max[h] = arena.take(kQueryBlock);
      sum[h] = arena.take(kQueryBlock);
    }
    k_transposed = arena.take(D * kKeyBlock);
    rows = arena.take(kKeyBlock * D);
    weights = arena.take(kQueryBlock * kKeyBlock);
  }
};

template <class Element, class Acc>
void load_scaled_queries(const HypeAttentionFwdParams& p, Rows<Element> x, int64_t rows, int64_t position,
                         Acc* q) {
  for (int64_t r = 0; r < rows; ++r) {
    const Acc factor = static_cast<Acc>(p.scale * position_scale(position + r, p.logit_scale_base));
    for (int64_t d = 0; d < p.D; ++d) q[r * p.D + d] = static_cast<Acc>(x[r][d]) * factor;
  }
}

// Turns logits into weights exp(x - max), and carries max, sum and o over from the key blocks before. Row r
// sees `first_visible + r` keys of the block, at most `keys`.
template <class Acc>
void online_softmax(int64_t rows, int64_t keys, int64_t first_visible, bool first_block, int64_t D,
                    Acc* weights, Acc* max, Acc* sum, Acc* o) {
  for (int64_t r = 0; r < rows; ++r) {
    Acc* x = weights + r * kKeyBlock;
    const int64_t visible = std::clamp<int64_t>(first_visible + r, 0, keys);
    const Acc block_max = row_max(x, visible);
    if (first_block) {
      max[r] = block_max;
      sum[r] = exp_row(x, visible, block_max);
    } else {
      if (block_max > max[r]) {
        const Acc keep = exp_scalar(max[r] - block_max);
        max[r] = block_max;
        sum[r] *= keep;
        for (int64_t d = 0; d < D; ++d) o[r * D + d] *= keep;
      }
      sum[r] += exp_row(x, visible, max[r]);
    }
    std::fill(x + visible, x + keys, Acc(0));
  }
}

// One block of keys and values for the queries of head h of the task.
template <class Acc>
void add_keys(int64_t rows, int64_t keys, int64_t first_visible, bool first_block, int64_t D,
              const Blocks<Acc>& b, int64_t h) {
  for_each_strip(rows, keys, first_visible, [&](int64_t r, int64_t count, int64_t seen) {
    Acc *weights = b.weights + r * kKeyBlock, *o = b.o[h] + r * D;
    gemm<Op::kNN, false>(count, seen, D, b.q[h] + r * D, D, b.k_transposed, kKeyBlock, weights, kKeyBlock);
    online_softmax(count, seen, first_visible + r, first_block, D, weights, b.max[h] + r, b.sum[h] + r, o);
    if (first_block) {
      gemm<Op::kNN, false>(count, D, seen, weights, kKeyBlock, b.rows, D, o, D);
    } else {
      gemm<Op::kNN, true>(count, D, seen, weights, kKeyBlock, b.rows, D, o, D);
    }
  });
}

// Writes o, gated where there is a gate, the output before the gate for the backward, and the logarithm of
// the sums.
template <class Element, class Acc>
void store_output(const HypeAttentionFwdParams& p, const Sequence& s, int64_t head, int64_t begin,
                  int64_t rows, Acc* o, const Acc* max, const Acc* sum, Acc* gate_row) {
  const int64_t token = s.first + begin;
  const auto out = head_rows<Element>(p.o, p.T, p.H, p.D, s.batch, token, head);
  const auto gate = head_rows<Element>(p.gate, s.batch, token, head);
  const auto ungated = head_rows<Element>(p.o_ungated, p.T, p.H, p.D, s.batch, token, head);
  Acc* lse = static_cast<Acc*>(p.lse) + (s.batch * p.H + head) * p.T + token;
  for (int64_t r = 0; r < rows; ++r) {
    Acc* x = o + r * p.D;
    const Acc norm = 1 / sum[r];
    lse[r] = max[r] + std::log(sum[r]);
    for (int64_t d = 0; d < p.D; ++d) x[d] *= norm;
    if (gate.data != nullptr) {
      if (ungated.data != nullptr) store_row(x, p.D, ungated[r]);
      load_row(gate[r], p.D, gate_row);
      sigmoid_in_place(gate_row, p.D);
      for (int64_t d = 0; d < p.D; ++d) x[d] *= gate_row[d];
    }
    store_row(x, p.D, out[r]);
  }
}

template <class Element>
void run_task(const HypeAttentionFwdParams& p, const Task& task, acc_t<Element>* memory) {
  using Acc = acc_t<Element>;
  const Sequence s = sequence(p, task.n);
  const int64_t D = p.D, begin = task.query_block * kQueryBlock;
  const int64_t rows = std::min(kQueryBlock, s.T - begin), position = s.offset + begin,
                seen = position + rows;
  Arena<Acc> arena(memory);
  const Blocks<Acc> b(arena, task.num_heads, D);

  for (int64_t h = 0; h < task.num_heads; ++h) {
    load_scaled_queries(p, head_rows<Element>(p.q, s.batch, s.first + begin, task.head + h), rows, position,
                        b.q[h]);
  }
  for (int64_t start = 0; start < seen; start += kKeyBlock) {
    const int64_t keys = std::min(kKeyBlock, seen - start);
    load_rows(head_rows<Element>(p.k, s.batch, s.first + start, task.key_head), keys, D, b.rows);
    transpose(keys, D, b.rows, D, b.k_transposed, kKeyBlock);
    load_rows(head_rows<Element>(p.v, s.batch, s.first + start, task.key_head), keys, D, b.rows);
    for (int64_t h = 0; h < task.num_heads; ++h) {
      add_keys(rows, keys, position - start + 1, start == 0, D, b, h);
    }
  }
  for (int64_t h = 0; h < task.num_heads; ++h) {
    store_output<Element>(p, s, task.head + h, begin, rows, b.o[h], b.max[h], b.sum[h], b.rows);
  }
}

}  // namespace

Status hype_attention_fwd(const HypeAttentionFwdParams& params) {
  return dispatch_dtype(params.dtype, [&]<class Element>() -> Status {
    using Acc = acc_t<Element>;
    const std::vector<Task> tasks = list_tasks(params);
    const int64_t num_tasks = static_cast<int64_t>(tasks.size());
    const int64_t threads = useful_threads(params.num_threads, num_tasks, multiply_adds(params));
    Arena<Acc> count;
    Blocks<Acc>(count, kHeadsPerTask, params.D);
    ThreadBlocks<Acc> memory(threads, count.used());
    for_each_task(num_tasks, threads, [&](int64_t i, int64_t thread) {
      run_task<Element>(params, tasks[i], memory.thread(thread));
    });
    return nullptr;
  });
}

}  // namespace hypenet::cpu
