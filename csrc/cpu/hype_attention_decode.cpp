// HyPE attention, decode: a few query tokens of each sequence against its cache of keys and values.
//
// Math: hype_attention_fwd.cpp for the last T positions of a sequence whose length after the append is L:
//   query t stands at position p = L - T + t and sees keys 0 ... p;  L = cache_seqlens + T, or cache_seqlens
//   without k.
//
// Shapes: params.h, HypeAttentionDecodeParams.
//
// Mapping: (1) k and v are copied behind the valid keys. (2) A task is (sequence, key head, split of kSplit
// keys): it computes, for all query rows that share the key head, the weighted sum of values over its keys,
// with its own maximum. (3) The splits of a row are combined in rising order. Splits depend on lengths alone,
// so that any number of threads gives the same bits. More than kMaxRows rows per key head take several rounds
// of (2) and (3).
//
// Numerics: as in the forward. A cache is read once per round, only up to its length, and converted kLanes
// keys (for the logits) or kValueBlock values at a time, in the first cache.
//
// Cost: 2 L HK D elements read per sequence; bound by memory. Workspace: one row of D accumulators per (row,
// split).
#include <omp.h>

#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "gemm.h"
#include "hype_attention.h"
#include "kernels.h"
#include "simd.h"

namespace hypenet::cpu {
using namespace attention;
namespace {

constexpr int64_t kSplit = 512;
constexpr int64_t kValueBlock = 32;
constexpr int64_t kMaxRows = 64;

struct Task {
  int64_t b, key_head, start;
};

// The queries of one round: tokens [begin, begin + num_tokens). Row t * group + g is head g of the group,
// token t.
struct Round {
  int64_t begin, num_tokens;
};

int64_t length(const HypeAttentionDecodeParams& p, int64_t b) {
  return p.cache_seqlens[b] + (p.k.data == nullptr ? 0 : p.T);
}

// Lane j of the result is the sum over the lanes of x[j].
template <class T, int n>
vec<T> sum_each(const vec<T> (&x)[n]) {
  if constexpr (n == 1) {
    return x[0];
  } else {
    vec<T> y[n / 2];
    for (int i = 0; i < n / 2; ++i) {
      [&]<int... lane>(std::integer_sequence<int, lane...>) {
        y[i] = __builtin_shufflevector(x[2 * i], x[2 * i + 1], (2 * lane)...) +
               __builtin_shufflevector(x[2 * i], x[2 * i + 1], (2 * lane + 1)...);
      }(std::make_integer_sequence<int, kLanes<T>>{});
    }
    return sum_each<T, n / 2>(y);
  }
}

// out[r, j] = q[r] . k[j] for kLanes keys; q and k contiguous.
template <class T>
void logits_of_keys(int64_t rows, int64_t D, const T* q, const T* k, T* out, int64_t stride) {
  constexpr int L = kLanes<T>;
  for (int64_t r = 0; r < rows; ++r) {
    vec<T> acc[L] = {};
    int64_t d = 0;
    for (; d + L <= D; d += L) {
      const vec<T> x = load(q + r * D + d);
#pragma GCC unroll 16
      for (int j = 0; j < L; ++j) acc[j] += x * load(k + j * D + d);
    }
    if (d < D) {
      const vec<T> x = load_partial(q + r * D + d, static_cast<int>(D - d));
#pragma GCC unroll 16
      for (int j = 0; j < L; ++j) acc[j] += x * load_partial(k + j * D + d, static_cast<int>(D - d));
    }
    store(out + r * stride, sum_each<T, L>(acc));
  }
}

template <class Element>
void append(const HypeAttentionDecodeParams& p, int64_t b, int64_t t) {
  const int64_t row = p.cache_seqlens[b] + t;
  for (int64_t head = 0; head < p.HK; ++head) {
    std::copy_n(head_rows<const Element>(p.k, b, t, head)[0], p.D,
                head_rows<Element>(p.k_cache, b, row, head)[0]);
    std::copy_n(head_rows<const Element>(p.v, b, t, head)[0], p.D,
                head_rows<Element>(p.v_cache, b, row, head)[0]);
  }
}

// What a thread holds: the scaled queries, the weights of one split, and a block of keys or values.
template <class Acc>
struct Blocks {
  Acc *q, *weights, *block;

  Blocks(Arena<Acc>& arena, int64_t rows, int64_t D)
      : q(arena.take(rows * D)),
        weights(arena.take(rows * kSplit)),
        block(arena.take(std::max<int64_t>(kValueBlock, kLanes<Acc>) * D)) {}
};

// What a task leaves: per row the sum of weights times values, then the maxima, then the sums of the weights.
template <class Acc>
struct Partial {
  Acc *o, *max, *sum;

  Partial(Arena<Acc> arena, int64_t rows, int64_t D)
      : o(arena.take(rows * D)), max(arena.take(rows)), sum(arena.take(rows)) {}

  static int64_t size(int64_t rows, int64_t D) {
    Arena<Acc> arena;
    arena.take(rows * D);
    arena.take(rows);
    arena.take(rows);
    return arena.used();
  }
};

// (2)
template <class Element, class Acc>
void run_split(const HypeAttentionDecodeParams& p, const Task& task, const Round& round, Blocks<Acc> b,
               Partial<Acc> out) {
  constexpr int64_t L = kLanes<Acc>;
  const int64_t D = p.D, group = p.H / p.HK, rows = round.num_tokens * group, total = length(p, task.b);
  const int64_t keys = std::min(kSplit, total - task.start), position = total - p.T + round.begin;
  for (int64_t r = 0; r < rows; ++r) {
    const auto x =
        head_rows<Element>(p.q, task.b, round.begin + r / group, task.key_head * group + r % group);
    const Acc factor = static_cast<Acc>(p.scale * position_scale(position + r / group, p.logit_scale_base));
    for (int64_t d = 0; d < D; ++d) b.q[r * D + d] = static_cast<Acc>(x[0][d]) * factor;
  }
  const auto k = head_rows<Element>(p.k_cache, task.b, task.start, task.key_head);
  for (int64_t i = 0; i < keys; i += L) {
    const int64_t count = std::min(L, keys - i);
    load_rows(Rows<Element>{k[i], k.stride}, count, D, b.block);
    std::fill(b.block + count * D, b.block + L * D, Acc(0));
    logits_of_keys(rows, D, b.q, b.block, b.weights + i, kSplit);
  }
  for (int64_t r = 0; r < rows; ++r) {
    Acc* x = b.weights + r * kSplit;
    const int64_t visible = std::clamp<int64_t>(position + r / group + 1 - task.start, 0, keys);
    out.max[r] = row_max(x, visible);
    out.sum[r] = exp_row(x, visible, out.max[r]);
    std::fill(x + visible, x + keys, Acc(0));
  }
  const auto v = head_rows<Element>(p.v_cache, task.b, task.start, task.key_head);
  std::fill_n(out.o, rows * D, Acc(0));
  for (int64_t i = 0; i < keys; i += kValueBlock) {
    const int64_t count = std::min(kValueBlock, keys - i);
    load_rows(Rows<Element>{v[i], v.stride}, count, D, b.block);
    gemm<Op::kNN, true>(rows, D, count, b.weights + i, kSplit, b.block, D, out.o, D);
  }
}

// (3) for one row of a (sequence, key head), whose partial results are those of tasks [first, last).
template <class Element, class Acc>
void combine(const HypeAttentionDecodeParams& p, int64_t b, int64_t token, int64_t head, int64_t row,
             int64_t rows, const ThreadBlocks<Acc>& partials, int64_t first, int64_t last, Acc* room) {
  const int64_t D = p.D;
  const auto split = [&](int64_t i) { return Partial<Acc>(Arena<Acc>(partials.thread(i)), rows, D); };
  Acc *o = room, *gate_row = room + D;
  Acc max = split(first).max[row], total = 0;
  for (int64_t i = first + 1; i < last; ++i) max = std::max(max, split(i).max[row]);
  std::fill_n(o, D, Acc(0));
  for (int64_t i = first; i < last; ++i) {
    const Partial<Acc> part = split(i);
    const Acc sum = part.sum[row];
    if (sum == 0) continue;  // the row sees no key of this split, and the maximum is -infinity
    const Acc weight = exp_scalar(part.max[row] - max);
    total += weight * sum;
    for (int64_t d = 0; d < D; ++d) o[d] += weight * part.o[row * D + d];
  }
  const Acc norm = 1 / total;
  for (int64_t d = 0; d < D; ++d) o[d] *= norm;
  if (p.gate.data != nullptr) {
    load_row(head_rows<Element>(p.gate, b, token, head)[0], D, gate_row);
    sigmoid_in_place(gate_row, D);
    for (int64_t d = 0; d < D; ++d) o[d] *= gate_row[d];
  }
  store_row(o, D, head_rows<Element>(p.o, p.T, p.H, D, b, token, head)[0]);
}

template <class Element>
void decode(const HypeAttentionDecodeParams& p) {
  using Acc = acc_t<Element>;
  const int64_t group = p.H / p.HK, D = p.D;
  const int64_t round_tokens = std::min(p.T, std::max<int64_t>(kMaxRows / group, 1));
  std::vector<Task> tasks;
  std::vector<int64_t> first_task;  // of each (sequence, key head)
  for (int64_t b = 0; b < p.B; ++b) {
    for (int64_t key_head = 0; key_head < p.HK; ++key_head) {
      first_task.push_back(static_cast<int64_t>(tasks.size()));
      for (int64_t start = 0; start < length(p, b); start += kSplit) tasks.push_back({b, key_head, start});
    }
  }
  const int64_t num_tasks = static_cast<int64_t>(tasks.size());
  first_task.push_back(num_tasks);
  const int64_t threads =
      useful_threads(p.num_threads, num_tasks, 2.0 * num_tasks * kSplit * group * p.T * D);
  const int64_t partial_size = Partial<Acc>::size(round_tokens * group, D);
  Arena<Acc> count;
  Blocks<Acc>(count, round_tokens * group, D);
  const ThreadBlocks<Acc> memories(threads, count.used()), partials(num_tasks, partial_size);

#pragma omp parallel num_threads(int(threads))
  {
    Acc* memory = memories.thread(omp_get_thread_num());
    if (p.k.data != nullptr) {
#pragma omp for
      for (int64_t i = 0; i < p.B * p.T; ++i) append<Element>(p, i / p.T, i % p.T);
    }
    for (int64_t begin = 0; begin < p.T; begin += round_tokens) {
      const Round round{begin, std::min(round_tokens, p.T - begin)};
      const int64_t rows = round.num_tokens * group;
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < num_tasks; ++i) {
        Arena<Acc> arena(memory);
        run_split<Element>(p, tasks[i], round, Blocks<Acc>(arena, rows, D),
                           Partial<Acc>(Arena<Acc>(partials.thread(i)), rows, D));
      }
#pragma omp for
      for (int64_t i = 0; i < p.B * p.HK * rows; ++i) {
        const int64_t pair = i / rows, row = i % rows;
        combine<Element>(p, pair / p.HK, begin + row / group, pair % p.HK * group + row % group, row, rows,
                         partials, first_task[pair], first_task[pair + 1], memory);
      }
    }
  }
}

}  // namespace

Status hype_attention_decode(const HypeAttentionDecodeParams& params) {
  return dispatch_dtype(params.dtype, [&]<class Element>() -> Status {
    decode<Element>(params);
    return nullptr;
  });
}

}  // namespace hypenet::cpu
