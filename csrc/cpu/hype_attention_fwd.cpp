// HyPE attention, forward: causal grouped-query attention by online softmax.
//
// Math, for query t of head h at position p = query_offset + t (of its sequence):
//   x_ti = s_p scale q_t . k_i,  i <= p,  s_p = ln(p + a) / ln(a)        (s_p = 1 without a base)
//   lse_t = ln sum_i exp(x_ti)
//   o_ungated_t = sum_i exp(x_ti - lse_t) v_i,  o_t = o_ungated_t sigmoid(gate_t)
//
// Shapes: params.h, HypeAttentionFwdParams.
//
// Mapping: a task is (sequence, key head, up to kTileHeads query heads of its group, block of queries). It is
// cut into tiles, which share the key blocks that the task iterates over in ascending order. Tasks are
// independent, so the result is bitwise the same for any number of threads.
//
// Products, for the lanes c of a tile and the keys i of a block: X^T[i, c] = K[i, :] Q^T[:, c], then O^T[:,
// c] += V^T[:, i] P^T[i, c]. Keys and values are copied once per block; queries and outputs are transposed
// once per task.
//
// Numerics: logits, maxima, sums and outputs are in the accumulation type, and q . k is scaled there. In
// products of bfloat16 pairs (pairs.h), the weights are rounded to bfloat16 for the product with V, but not
// in their sum. Every exponent is <= 0 up to rounding: every query sees the first key of the first block, so
// its maximum is finite from there on. Keys after a query's position enter neither maximum nor sum and have
// weight zero; if a value among them is not finite, masked_product.h keeps it away from the earlier queries.
//
// Cost: 4 D FLOPs per visible (query, key) pair; compute bound. Memory: a few blocks per thread.
#include <cstdint>
#include <limits>
#include <vector>

#include "gemm.h"
#include "hype_attention.h"
#include "kernels.h"
#include "masked_product.h"
#include "simd.h"

namespace hypenet::cpu {
using namespace attention;
namespace {

// Queries per task: more share a block of keys, fewer give more tasks. The result does not depend on it.
constexpr int64_t kMinQueryBlock = 64, kMaxQueryBlock = 128, kTasksPerThread = 4;

// Queries [begin, end) of sequence n for some heads of a key head's group.
struct Task {
  int64_t n, key_head, head, num_heads, begin, end;
};

// Lists the tasks, the longest first, so that the last ones to finish are short.
std::vector<Task> list_tasks(const HypeAttentionFwdParams& p, int64_t query_block) {
  const int64_t group = p.H / p.HK;
  std::vector<Task> tasks;
  int64_t max_length = 0;
  for (int64_t n = 0; n < p.N; ++n) max_length = std::max(max_length, sequence(p, n).T);
  for (int64_t begin = (max_length - 1) / query_block * query_block; begin >= 0; begin -= query_block) {
    for (int64_t n = 0; n < p.N; ++n) {
      const int64_t end = std::min(begin + query_block, sequence(p, n).T);
      if (begin >= end) continue;
      for (int64_t key_head = 0; key_head < p.HK; ++key_head) {
        for (int64_t g = 0; g < group; g += kTileHeads) {
          tasks.push_back({n, key_head, key_head * group + g, std::min(kTileHeads, group - g), begin, end});
        }
      }
    }
  }
  return tasks;
}

// The state of a tile: its queries, the scale of their logits, and the running output, maximum and sum of the
// online softmax.
template <class Factor, class Acc>
struct TileBlocks {
  Factor* q;                   // [packed(D), kTileLanes]
  Acc *o, *scale, *max, *sum;  // [D, kTileLanes], [kTileLanes] three times

  TileBlocks(Arena<Acc>& arena, int64_t D)
      : q(arena.template take<Factor>(packed<Factor>(D) * kTileLanes)),
        o(arena.take(D * kTileLanes)),
        scale(arena.take(kTileLanes)),
        max(arena.take(kTileLanes)),
        sum(arena.take(kTileLanes)) {}
};

// The buffers shared by the tiles of a thread: a block of keys and of values, the logits and the rows of one
// tile.
template <class Factor, class Acc>
struct Blocks {
  Factor *k, *v, *q_rows;  // [kKeyBlock, packed(D)], [packed(kKeyBlock), D], [kTileLanes, packed(D)]
  Acc *logits, *rows;      // [kKeyBlock, kTileLanes], [kTileLanes + 1, D]

  Blocks(Arena<Acc>& arena, int64_t D)
      : k(arena.template take<Factor>(kKeyBlock * packed<Factor>(D))),
        v(arena.template take<Factor>(packed<Factor>(kKeyBlock) * D)),
        q_rows(arena.template take<Factor>(kTileLanes * packed<Factor>(D))),
        logits(arena.take(kKeyBlock * kTileLanes)),
        rows(arena.take((kTileLanes + 1) * D)) {}
};

template <class Element, class Factor, class Acc>
void load_queries(const HypeAttentionFwdParams& p, const Sequence& s, const Tile& tile, Factor* rows,
                  const TileBlocks<Factor, Acc>& out) {
  const int64_t D = p.D, width = packed<Factor>(D), lanes = tile.lanes(), padded = tile.padded<Acc>();
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const int64_t head = tile.head + lane / tile.num_tokens, t = tile.begin + lane % tile.num_tokens;
    pack_row(head_rows<Element>(p.q, s.batch, s.first + t, head)[0], D, rows + lane * width);
    out.scale[lane] = static_cast<Acc>(p.scale * position_scale(s.offset + t, p.logit_scale_base));
  }
  std::fill(rows + lanes * width, rows + padded * width, Factor{});
  transpose(padded, width, rows, width, out.q, kTileLanes);
  std::fill_n(out.o, D * kTileLanes, Acc(0));
  std::fill(out.scale + lanes, out.scale + padded, Acc(0));
  std::fill_n(out.max, padded, -std::numeric_limits<Acc>::infinity());
  std::fill_n(out.sum, padded, Acc(0));
}

// Replaces the logits [keys, lanes] of kVecs vectors of lanes by the weights exp(scale x - max), as factors
// [packed(keys), lanes], and rescales max, sum and o of the previous key blocks. A lane sees the first
// `visible` keys, or all of them without kMasked.
template <int kVecs, bool kMasked, class Factor, class Acc>
void online_softmax(int64_t keys, int64_t D, const Acc* visible, const Acc* scale, Acc* logits, Acc* max,
                    Acc* sum, Acc* o) {
  constexpr int L = kLanes<Acc>;
  constexpr int64_t kStep = kPacked<Factor>;
  vec<Acc> most[kVecs], total[kVecs] = {}, factor[kVecs], seen[kVecs];
#pragma GCC unroll 4
  for (int c = 0; c < kVecs; ++c) {
    most[c] = load(max + c * L);
    factor[c] = load(scale + c * L);
    if (kMasked) seen[c] = load(visible + c * L);
  }
  for (int64_t i = 0; i < keys; ++i) {
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) {
      const vec<Acc> x = load(logits + i * kTileLanes + c * L) * factor[c];
      const vec<Acc> larger = x > most[c] ? x : most[c];
      most[c] = kMasked ? (broadcast(Acc(i)) < seen[c] ? larger : most[c]) : larger;
    }
  }
  const auto weigh = [&](int64_t i, int c) {
    const vec<Acc> weight = exp<Acc>(load(logits + i * kTileLanes + c * L) * factor[c] - most[c]);
    return kMasked ? (broadcast(Acc(i)) < seen[c] ? weight : vec<Acc>{}) : weight;
  };
  Factor* weights = reinterpret_cast<Factor*>(logits);
  for (int64_t i = 0; i < keys; i += kStep) {
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) {
      vec<Acc> weight[kStep] = {};
#pragma GCC unroll 2
      for (int j = 0; j < kStep; ++j) {
        if (j > 0 && i + j == keys) break;
        weight[j] = weigh(i + j, c);
        total[c] += weight[j];
      }
      store(weights + i / kStep * kTileLanes + c * L, pack<Factor, Acc>(weight));
    }
  }
  for (int c = 0; c < kVecs; ++c) {
    const vec<Acc> keep = exp<Acc>(load(max + c * L) - most[c]);
    store(sum + c * L, load(sum + c * L) * keep + total[c]);
    store(max + c * L, most[c]);
    const auto changed = keep != broadcast(Acc(1));
    bool any = false;
    for (int lane = 0; lane < L; ++lane) any |= changed[lane] != 0;
    if (!any) continue;
    for (int64_t d = 0; d < D; ++d) {
      store(o + d * kTileLanes + c * L, load(o + d * kTileLanes + c * L) * keep);
    }
  }
}

// Adds one block of keys and values to a tile whose first token sees the first `first_visible` keys of the
// block.
template <class Factor, class Acc>
void add_keys(const Tile& tile, int64_t keys, int64_t first_visible, int64_t D, const Blocks<Factor, Acc>& b,
              const TileBlocks<Factor, Acc>& t) {
  constexpr int64_t L = kLanes<Acc>, kWide = 4 * L;
  const int64_t padded = tile.padded<Acc>(), width = packed<Factor>(D);
  gemm<Op::kNN>(keys, padded, width, b.k, width, t.q, kTileLanes, b.logits, kTileLanes);
  Acc visible[kTileLanes];
  for (int64_t c = 0; c < padded; ++c) visible[c] = static_cast<Acc>(first_visible + c % tile.num_tokens);
  const auto softmax = [&]<int kVecs>(int64_t c, std::integral_constant<int, kVecs>) {
    const auto run = [&]<bool kMasked>(std::bool_constant<kMasked>) {
      online_softmax<kVecs, kMasked, Factor>(keys, D, visible + c, t.scale + c, b.logits + c, t.max + c,
                                             t.sum + c, t.o + c);
    };
    if (first_visible >= keys) {
      run(std::false_type());
    } else {
      run(std::true_type());
    }
  };
  int64_t c = 0;
  for (; c + kWide <= padded; c += kWide) softmax(c, std::integral_constant<int, 4>());
  for (; c < padded; c += L) softmax(c, std::integral_constant<int, 1>());
  const Factor* weights = reinterpret_cast<const Factor*>(b.logits);
  const auto product = [&](const Factor* v) {
    gemm_from<Op::kTN>(AddedLast<Acc>{t.o, kTileLanes}, D, padded, packed<Factor>(keys), v, D, weights,
                       kTileLanes, t.o, kTileLanes);
  };
  if (first_visible >= packed<Factor>(keys) * kPacked<Factor>) return product(b.v);
  product_of_visible<Acc>(keys, D, b.v, reinterpret_cast<Factor*>(b.rows), product, [&](int64_t i) {
    for (int64_t c = 0; c < tile.lanes(); ++c) {
      if (i >= first_visible + c % tile.num_tokens) continue;
      const Acc weight = static_cast<Acc>(element(weights, kTileLanes, i, c));
      for (int64_t d = 0; d < D; ++d)
        t.o[d * kTileLanes + c] += weight * static_cast<Acc>(element(b.v, D, i, d));
    }
  });
}

// Writes o (gated, if there is a gate) and the tensors saved for backward: the ungated output and lse.
template <class Element, class Factor, class Acc>
void store_output(const HypeAttentionFwdParams& p, const Sequence& s, const Tile& tile,
                  const Blocks<Factor, Acc>& b, const TileBlocks<Factor, Acc>& t) {
  const int64_t D = p.D, token = s.first + tile.begin;
  Acc* gate_row = b.rows + kTileLanes * D;
  transpose(D, tile.lanes(), t.o, kTileLanes, b.rows, D);
  for (int64_t lane = 0; lane < tile.lanes(); ++lane) {
    const int64_t head = tile.head + lane / tile.num_tokens, r = lane % tile.num_tokens;
    const auto gate = head_rows<Element>(p.gate, s.batch, token, head);
    Acc* x = b.rows + lane * D;
    const Acc norm = 1 / t.sum[lane];
    if (p.lse != nullptr) {
      Acc* lse = static_cast<Acc*>(p.lse) + (s.batch * p.H + head) * p.T + token;
      lse[r] = t.max[lane] + std::log(t.sum[lane]);
    }
    for (int64_t d = 0; d < D; ++d) x[d] *= norm;
    if (gate.data != nullptr) {
      const auto ungated = head_rows<Element>(p.o_ungated, p.T, p.H, D, s.batch, token, head);
      if (ungated.data != nullptr) convert_row(x, D, ungated[r]);
      convert_row(gate[r], D, gate_row);
      sigmoid_row(gate_row, D, gate_row);
      for (int64_t d = 0; d < D; ++d) x[d] *= gate_row[d];
    }
    convert_row(x, D, head_rows<Element>(p.o, p.T, p.H, D, s.batch, token, head)[r]);
  }
}

template <class Element>
void run_task(const HypeAttentionFwdParams& p, const Task& task, acc_t<Element>* memory) {
  using Acc = acc_t<Element>;
  using Factor = factor_t<Element>;
  const Sequence s = sequence(p, task.n);
  const int64_t D = p.D, end = s.offset + task.end;
  Arena<Acc> arena(memory);
  const Blocks<Factor, Acc> b(arena, D);
  const Arena<Acc> tiles = arena;
  const auto for_each = [&](auto&& body) {
    Arena<Acc> rest = tiles;
    for_each_tile(task.head, task.num_heads, task.begin, task.end,
                  [&](const Tile& tile) { body(tile, TileBlocks<Factor, Acc>(rest, D)); });
  };

  for_each([&](const Tile& tile, const TileBlocks<Factor, Acc>& t) {
    load_queries<Element>(p, s, tile, b.q_rows, t);
  });
  for (int64_t start = 0; start < end; start += kKeyBlock) {
    const int64_t keys = std::min(kKeyBlock, end - start);
    pack_rows(head_rows<Element>(p.k, s.key_batch, s.first_key + start, task.key_head), keys, D, b.k);
    pack_across_rows(head_rows<Element>(p.v, s.key_batch, s.first_key + start, task.key_head), keys, D, b.v);
    for_each([&](const Tile& tile, const TileBlocks<Factor, Acc>& t) {
      const int64_t first_visible = s.offset + tile.begin - start + 1;
      const int64_t seen = std::min(keys, first_visible + tile.num_tokens - 1);
      if (seen > 0) add_keys(tile, seen, first_visible, D, b, t);
    });
  }
  for_each(
      [&](const Tile& tile, const TileBlocks<Factor, Acc>& t) { store_output<Element>(p, s, tile, b, t); });
}

}  // namespace

Status hype_attention_fwd(const HypeAttentionFwdParams& params) {
  return dispatch_dtype(params.dtype, [&]<class Element>() -> Status {
    using Acc = acc_t<Element>;
    using Factor = factor_t<Element>;
    std::vector<Task> tasks = list_tasks(params, kMaxQueryBlock);
    const int64_t enough = kTasksPerThread * params.num_threads;
    if (static_cast<int64_t>(tasks.size()) < enough) tasks = list_tasks(params, kMinQueryBlock);
    const int64_t num_tasks = static_cast<int64_t>(tasks.size());
    const int64_t threads = useful_threads(params.num_threads, num_tasks, multiply_adds(params));
    Arena<Acc> count;
    Blocks<Factor, Acc>(count, params.D);
    for (int64_t tile = 0; tile < kMaxQueryBlock * kTileHeads / kTileLanes; ++tile)
      TileBlocks<Factor, Acc>(count, params.D);
    ThreadBlocks<Acc> memory(threads, count.used());
    for_each_task(num_tasks, threads, [&](int64_t i, int64_t thread) {
      run_task<Element>(params, tasks[i], memory.thread(thread));
    });
    for (void* x : {params.o, params.o_ungated}) zero_tail<Element>(params, x, params.H * params.D);
    if (params.lse == nullptr) return nullptr;
    for (int64_t head = 0; head < params.H; ++head)
      zero_tail<Acc>(params, static_cast<Acc*>(params.lse) + head * params.T, 1);
    return nullptr;
  });
}

}  // namespace hypenet::cpu
