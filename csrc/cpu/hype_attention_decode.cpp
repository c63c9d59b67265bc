// HyPE attention, decode: a few query tokens of each sequence against its cache of keys and values.
//
// Math: hype_attention_fwd.cpp for the last T positions of a sequence whose length after the append is L:
//   query t is at position p = L - T + t and sees keys 0 ... p;
//   L = cache_seqlens + T, or cache_seqlens without k.
//
// Shapes: params.h, HypeAttentionDecodeParams.
//
// Mapping: (1) k and v are appended to the cache. (2) A task is (sequence, split of its keys): for the query
// rows of all heads it computes the maximum logit, the sum of weights and the weighted sum of values over its
// keys. It processes a few keys of all key heads before the next keys, which reads a cache [B, capacity, HK,
// D] sequentially. (3) The splits of a row are combined in ascending order. Splits depend on the sequence's
// own length alone, so the result is bitwise the same for any number of threads and any batch. More than
// kMaxRows rows per key head take several rounds of (2) and (3).
//
// Registers: a tile of logits is a few query rows by a few keys and loads each key once; logits are stored as
// [key, row], so that the softmax over keys has one row per lane. A tile of outputs is rows by vectors of D.
//
// Prefetching: a core only reaches its memory bandwidth with many cache lines in flight, and hardware keeps
// most of them in flight if they are requested in sequential order, whatever the order of the products. So
// each tile prefetches as many lines as it reads, in memory order and a fixed distance ahead; the last keys
// of a split prefetch its first values.
//
// Numerics: as in the forward. A cache is read once per round, only up to its length, and converted in
// registers. Of several query tokens, the earlier ones are unaffected by later values that are not finite.
//
// Cost: 2 L HK D elements read per sequence, 4 H T D FLOPs per key; memory bound for small H T / HK.
// Workspace: D accumulators per (row, split); a sequence has kSplits splits, or L / kMaxSplit if that is
// more.
#include <omp.h>

#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "hype_attention.h"
#include "kernels.h"
#include "masked_product.h"
#include "simd.h"

namespace hypenet::cpu {
using namespace attention;
namespace {

constexpr int64_t kSplits = 64, kMinSplit = 64, kMaxSplit = 512;
constexpr int64_t kMaxRows = 64;
constexpr int kTileRows = 4;
#if defined(__AVX512F__)
constexpr int kTileSums = 16, kTileVecs = 4;
#else
constexpr int kTileSums = 8, kTileVecs = 2;
#endif

// The prefetch distance in bytes, or one block of all heads if that is larger.
constexpr int64_t kPrefetch = 16384;
// The number of keys of one head whose values are read before those of the next head.
template <class Element>
constexpr int64_t kValueKeys = sizeof(Element) == 2 ? 16 : 4;

// Keys [start, start + keys) of sequence b.
struct Task {
  int64_t b, start, keys;
};

// The queries of one round: tokens [begin, begin + num_tokens). Row t * group + g of a key head is token t of
// head g of its group; the rows of the key heads are consecutive.
struct Round {
  int64_t begin, num_tokens;
};

int64_t length(const HypeAttentionDecodeParams& p, int64_t b) {
  return index_at(p.cache_seqlens, b) + (p.k.data == nullptr ? 0 : p.T);
}

int64_t split_size(int64_t length) {
  return std::clamp(ceil_div(ceil_div(length, kSplits), kMinSplit) * kMinSplit, kMinSplit, kMaxSplit);
}

// D rounded up to whole vectors.
template <class Acc>
constexpr int64_t padded(int64_t D) {
  return ceil_div(D, kLanes<Acc>) * kLanes<Acc>;
}

// Returns the vector whose lane j is the sum of the lanes of x[j].
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

// out[j, r] = q[r] . k[j] for kRows rows and `keys` keys, at most kTileSums / kRows. Rows of q are padded.
// Prefetches as many lines as it reads, sequentially from `ahead` on.
template <int kRows, class Element, class Acc>
void logits_tile(int64_t keys, int64_t D, const Acc* q, Rows<const Element> k, const Element* ahead, Acc* out,
                 int64_t out_stride) {
  constexpr int L = kLanes<Acc>, kLine = 64 / sizeof(Element), kKeys = kTileSums / kRows;
  static_assert(kTileSums % kRows == 0 && kTileSums % L == 0);
  const int64_t q_stride = padded<Acc>(D);
  const Element* rows[kKeys];
  for (int j = 0; j < kKeys; ++j) rows[j] = k[std::min<int64_t>(j, keys - 1)];
  vec<Acc> acc[kKeys * kRows] = {};
  const auto step = [&](int64_t d, auto&& read) {
    vec<Acc> x[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) x[r] = load(q + r * q_stride + d);
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) {
      const vec<Acc> y = read(rows[j] + d);
      if (d % kLine == 0) __builtin_prefetch(ahead + d * kKeys + j * kLine);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) acc[j * kRows + r] += x[r] * y;
    }
  };
  int64_t d = 0;
  for (; d + L <= D; d += L) step(d, [](const Element* x) { return load_as<Acc>(x); });
  if (d < D) step(d, [&](const Element* x) { return load_partial_as<Acc>(x, static_cast<int>(D - d)); });
  Acc sums[kTileSums];
#pragma GCC unroll 16
  for (int i = 0; i < kTileSums; i += L) {
    vec<Acc> part[L];
#pragma GCC unroll 16
    for (int j = 0; j < L; ++j) part[j] = acc[i + j];
    store(sums + i, sum_each<Acc, L>(part));
  }
  for (int j = 0; j < std::min<int64_t>(kKeys, keys); ++j) {
    std::copy_n(sums + j * kRows, kRows, out + j * out_stride);
  }
}

// o[r, c] += sum over keys j of weights[j, r] v[j, c], for kRows rows and kVecs vectors of columns.
// Prefetches like logits_tile.
template <int kRows, int kVecs, class Element, class Acc, class Read>
void values_tile(int64_t keys, const Acc* weights, int64_t num_rows, const Rows<const Element>& v,
                 const Element* ahead, Acc* o, int64_t o_stride, const Read& read) {
  constexpr int L = kLanes<Acc>, kLine = 64 / sizeof(Element);
  vec<Acc> acc[kRows][kVecs];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) acc[r][c] = load(o + r * o_stride + c * L);
  }
  for (int64_t j = 0; j < keys; ++j) {
    vec<Acc> y[kVecs];
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) {
      y[c] = read(v[j] + c * L);
      if (c * L % kLine == 0) __builtin_prefetch(ahead + (j * kVecs + c) * L);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const vec<Acc> x = broadcast(weights[j * num_rows + r]);
#pragma GCC unroll 4
      for (int c = 0; c < kVecs; ++c) acc[r][c] += x * y[c];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) store(o + r * o_stride + c * L, acc[r][c]);
  }
}

// values_tile for all columns; rows of o are padded.
template <int kRows, class Element, class Acc>
void add_values(int64_t keys, int64_t D, const Acc* weights, int64_t num_rows, Rows<const Element> v,
                const Element* ahead, Acc* o) {
  constexpr int L = kLanes<Acc>;
  const int64_t o_stride = padded<Acc>(D);
  const auto whole = [](const Element* x) { return load_as<Acc>(x); };
  const auto at = [&](int64_t d) { return Rows<const Element>{v.data + d, v.stride}; };
  int64_t d = 0;
  for (; d + kTileVecs * L <= D; d += kTileVecs * L) {
    values_tile<kRows, kTileVecs>(keys, weights, num_rows, at(d), ahead + d * keys, o + d, o_stride, whole);
  }
  for (; d + L <= D; d += L)
    values_tile<kRows, 1>(keys, weights, num_rows, at(d), ahead + d * keys, o + d, o_stride, whole);
  if (d < D) {
    const auto part = [&](const Element* x) { return load_partial_as<Acc>(x, static_cast<int>(D - d)); };
    values_tile<kRows, 1>(keys, weights, num_rows, at(d), ahead + d * keys, o + d, o_stride, part);
  }
}

// The same sums for rows that see only some of the keys: row r the first seen(r). Reads no value that is
// masked.
template <class Element, class Acc, class Seen>
void add_visible_values(int64_t keys, int64_t D, const Acc* weights, int64_t num_rows, int64_t rows,
                        Rows<const Element> v, Acc* o, const Seen& seen) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < std::min(keys, seen(r)); ++j) {
      for (int64_t d = 0; d < D; ++d)
        o[r * padded<Acc>(D) + d] += weights[j * num_rows + r] * static_cast<Acc>(v[j][d]);
    }
  }
}

// Calls body.operator()<n>(first) for tiles of n rows that cover `rows`, n in {kTileRows, 2, 1}.
template <class Body>
void for_each_row_tile(int64_t rows, Body&& body) {
  int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows) body.template operator()<kTileRows>(r);
  if (r + 2 <= rows) {
    body.template operator()<2>(r);
    r += 2;
  }
  if (r < rows) body.template operator()<1>(r);
}

// The rows of a cache that a task reads, in memory order.
template <class Element>
struct CacheRows {
  const View& cache;
  const Task& task;
  int64_t heads;

  bool heads_inside() const { return cache.head <= cache.token; }
  int64_t count() const { return heads * task.keys; }
  Rows<const Element> of_head(int64_t head) const {
    return head_rows<const Element>(cache, task.b, task.start, head);
  }
  const Element* operator[](int64_t i) const {
    return heads_inside() ? of_head(i % heads)[i / heads] : of_head(i / task.keys)[i % task.keys];
  }

  // Calls body(key head, first key, keys, rows before) for blocks of at most `size` keys of one head.
  template <class Body>
  void for_each_block(int64_t size, Body&& body) const {
    const int64_t blocks = ceil_div(task.keys, size), outer = heads_inside() ? blocks : heads,
                  inner = heads_inside() ? heads : blocks;
    int64_t before = 0;
    for (int64_t i = 0; i < outer; ++i) {
      for (int64_t j = 0; j < inner; ++j) {
        const int64_t begin = (heads_inside() ? i : j) * size, keys = std::min(size, task.keys - begin);
        body(heads_inside() ? j : i, begin, keys, before);
        before += keys;
      }
    }
  }
};

template <class Element>
void append(const HypeAttentionDecodeParams& p, int64_t b, int64_t t) {
  const int64_t row = index_at(p.cache_seqlens, b) + t;
  for (int64_t head = 0; head < p.HK; ++head) {
    std::copy_n(head_rows<const Element>(p.k, b, t, head)[0], p.D,
                head_rows<Element>(p.k_cache, b, row, head)[0]);
    std::copy_n(head_rows<const Element>(p.v, b, t, head)[0], p.D,
                head_rows<Element>(p.v_cache, b, row, head)[0]);
  }
}

// The buffers of a thread: the scaled queries (in (3): two rows) and the weights of one split.
template <class Acc>
struct Blocks {
  Acc *q, *weights;

  Blocks(Arena<Acc>& arena, int64_t rows, int64_t D, int64_t max_split)
      : q(arena.take((rows + 1) * padded<Acc>(D))), weights(arena.take(rows * max_split)) {}
};

// The result of a task: per row the weighted sum of values, the maximum logit, and the sum of weights.
template <class Acc>
struct Partial {
  Acc *o, *max, *sum;

  Partial(Arena<Acc> arena, int64_t rows, int64_t D)
      : o(arena.take(rows * padded<Acc>(D))), max(arena.take(rows)), sum(arena.take(rows)) {}

  static int64_t size(int64_t rows, int64_t D) {
    Arena<Acc> arena;
    arena.take(rows * padded<Acc>(D));
    arena.take(rows);
    arena.take(rows);
    return arena.used();
  }
};

template <class Element, class Acc>
void load_queries(const HypeAttentionDecodeParams& p, int64_t b, const Round& round, Acc* q) {
  const int64_t D = p.D, group = p.H / p.HK, rows = round.num_tokens * group;
  for (int64_t t = 0; t < round.num_tokens; ++t) {
    const int64_t position = length(p, b) - p.T + round.begin + t;
    const Acc factor = static_cast<Acc>(p.scale * position_scale(position, p.logit_scale_base));
    for (int64_t head = 0; head < p.H; ++head) {
      const auto x = head_rows<Element>(p.q, b, round.begin + t, head)[0];
      Acc* row = q + (head / group * rows + t * group + head % group) * padded<Acc>(D);
      for (int64_t d = 0; d < D; ++d) row[d] = static_cast<Acc>(x[d]) * factor;
      std::fill(row + D, row + padded<Acc>(D), Acc(0));
    }
  }
}

// Replaces the logits of `count` rows, at most a vector, by weights exp(x - max); writes their maxima and
// sums. Row r sees the first seen[r] keys, or all of them with kAll.
template <bool kAll, class Acc>
void softmax_of_lanes(int64_t keys, int64_t stride, vec<Acc> seen, int count, Acc* x, Acc* max, Acc* sum) {
  constexpr int kChains = 4;
  const Lanes<Acc> lanes(count);
  vec<Acc> most[kChains], total[kChains] = {};
  for (vec<Acc>& m : most) m = broadcast(-std::numeric_limits<Acc>::infinity());
  const auto by_key = [&](auto&& body) {
    int64_t j = 0;
    for (; j + kChains <= keys; j += kChains) {
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) body(j + i, i);
    }
    for (; j < keys; ++j) body(j, 0);
  };
  by_key([&](int64_t j, int i) {
    const vec<Acc> logit = lanes.read(x + j * stride);
    if constexpr (kAll) {
      most[i] = logit > most[i] ? logit : most[i];
    } else {
      most[i] = (broadcast(Acc(j)) < seen && logit > most[i]) ? logit : most[i];
    }
  });
  for (int i = 1; i < kChains; ++i) most[0] = most[i] > most[0] ? most[i] : most[0];
  by_key([&](int64_t j, int i) {
    vec<Acc> weight = exp<Acc>(lanes.read(x + j * stride) - most[0]);
    if constexpr (!kAll) weight = broadcast(Acc(j)) < seen ? weight : vec<Acc>{};
    total[i] += weight;
    lanes.write(x + j * stride, weight);
  });
  lanes.write(max, most[0]);
  lanes.write(sum, (total[0] + total[1]) + (total[2] + total[3]));
}

// softmax_of_lanes for all rows of [keys, rows]; row r sees the first visible(r) keys.
template <class Acc, class Visible>
void softmax_over_keys(int64_t keys, int64_t rows, Acc* x, Acc* max, Acc* sum, Visible&& visible) {
  for (int64_t r = 0; r < rows; r += kLanes<Acc>) {
    const int count = static_cast<int>(std::min<int64_t>(kLanes<Acc>, rows - r));
    vec<Acc> seen{};
    bool all = true;
    for (int i = 0; i < count; ++i) {
      seen[i] = static_cast<Acc>(visible(r + i));
      all = all && visible(r + i) == keys;
    }
    const auto run = all ? softmax_of_lanes<true, Acc> : softmax_of_lanes<false, Acc>;
    run(keys, rows, seen, count, x + r, max + r, sum + r);
  }
}

// (2)
template <class Element, class Acc>
void run_split(const HypeAttentionDecodeParams& p, const Task& task, const Round& round, Blocks<Acc> b,
               Partial<Acc> out) {
  const int64_t D = p.D, D_padded = padded<Acc>(D), group = p.H / p.HK, rows = round.num_tokens * group;
  const int64_t num_rows = p.HK * rows, position = length(p, task.b) - p.T + round.begin;
  const CacheRows<Element> k_rows{p.k_cache, task, p.HK}, v_rows{p.v_cache, task, p.HK};
  const int64_t rows_ahead =
      std::max(ceil_div(kPrefetch, D * int64_t(sizeof(Element))), kValueKeys<Element> * p.HK);
  load_queries<Element>(p, task.b, round, b.q);
  const int64_t tile_keys = kTileSums / (rows >= kTileRows ? kTileRows : rows >= 2 ? 2 : 1);
  k_rows.for_each_block(tile_keys, [&](int64_t head, int64_t begin, int64_t keys, int64_t before) {
    const auto k = k_rows.of_head(head);
    const int64_t next = before + rows_ahead;
    const Element* ahead =
        next < k_rows.count() ? k_rows[next] : v_rows[(next - k_rows.count()) % v_rows.count()];
    for_each_row_tile(rows, [&]<int kRows>(int64_t r) {
      constexpr int64_t kKeys = kTileSums / kRows;
      for (int64_t j = begin; j < begin + keys; j += kKeys) {
        logits_tile<kRows, Element>(std::min(kKeys, begin + keys - j), D, b.q + (head * rows + r) * D_padded,
                                    {k[j], k.stride}, ahead, b.weights + j * num_rows + head * rows + r,
                                    num_rows);
      }
    });
  });
  const auto seen = [&](int64_t row) {
    return std::clamp<int64_t>(position + row % rows / group + 1 - task.start, 0, task.keys);
  };
  softmax_over_keys(task.keys, num_rows, b.weights, out.max, out.sum, seen);
  std::fill_n(out.o, num_rows * D_padded, Acc(0));
  v_rows.for_each_block(kValueKeys<Element>, [&](int64_t head, int64_t begin, int64_t keys, int64_t before) {
    const auto v = v_rows.of_head(head);
    const Element* ahead = v_rows[std::min(before + rows_ahead, v_rows.count() - keys)];
    bool finite = true;  // of the values that some rows do not see
    for (int64_t j = std::max(begin, seen(0)); j < begin + keys; ++j) finite &= all_finite<Acc>(v[j], D);
    if (!finite) {
      add_visible_values(keys, D, b.weights + begin * num_rows + head * rows, num_rows, rows,
                         Rows<const Element>{v[begin], v.stride}, out.o + head * rows * D_padded,
                         [&](int64_t r) { return seen(r) - begin; });
      return;
    }
    for_each_row_tile(rows, [&]<int kRows>(int64_t r) {
      add_values<kRows, Element>(keys, D, b.weights + begin * num_rows + head * rows + r, num_rows,
                                 {v[begin], v.stride}, ahead, out.o + (head * rows + r) * D_padded);
    });
  });
}

// (3) for one row of a sequence, whose partial results come from tasks [first, last).
template <class Element, class Acc>
void combine(const HypeAttentionDecodeParams& p, int64_t b, int64_t token, int64_t head, int64_t row,
             int64_t num_rows, const ThreadBlocks<Acc>& partials, int64_t first, int64_t last, Acc* buffer) {
  const int64_t D = p.D, D_padded = padded<Acc>(D);
  const auto split = [&](int64_t i) { return Partial<Acc>(Arena<Acc>(partials.thread(i)), num_rows, D); };
  Acc *o = buffer, *gate_row = buffer + D;
  Acc max = split(first).max[row], total = 0;
  for (int64_t i = first + 1; i < last; ++i) max = std::max(max, split(i).max[row]);
  std::fill_n(o, D, Acc(0));
  for (int64_t i = first; i < last; ++i) {
    const Partial<Acc> part = split(i);
    const Acc sum = part.sum[row];
    if (sum == 0) continue;  // the row sees no key of this split, and the maximum is -infinity
    const Acc weight = exp_scalar(part.max[row] - max);
    total += weight * sum;
    for (int64_t d = 0; d < D; ++d) o[d] += weight * part.o[row * D_padded + d];
  }
  const Acc norm = 1 / total;
  for (int64_t d = 0; d < D; ++d) o[d] *= norm;
  if (p.gate.data != nullptr) {
    convert_row(head_rows<Element>(p.gate, b, token, head)[0], D, gate_row);
    sigmoid_row(gate_row, D, gate_row);
    for (int64_t d = 0; d < D; ++d) o[d] *= gate_row[d];
  }
  convert_row(o, D, head_rows<Element>(p.o, p.T, p.H, D, b, token, head)[0]);
}

template <class Element>
void decode(const HypeAttentionDecodeParams& p) {
  using Acc = acc_t<Element>;
  const int64_t group = p.H / p.HK, D = p.D;
  const int64_t round_tokens = std::min(p.T, std::max<int64_t>(kMaxRows / group, 1));
  std::vector<Task> tasks;
  std::vector<int64_t> first_task;  // of each sequence
  int64_t num_keys = 0, max_split = 0;
  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t total = length(p, b), split = split_size(total);
    first_task.push_back(static_cast<int64_t>(tasks.size()));
    for (int64_t start = 0; start < total; start += split) {
      tasks.push_back({b, start, std::min(split, total - start)});
    }
    num_keys += total;
    max_split = std::max(max_split, split);
  }
  const int64_t num_tasks = static_cast<int64_t>(tasks.size());
  first_task.push_back(num_tasks);
  const int64_t threads = useful_threads(p.num_threads, num_tasks, 2.0 * num_keys * p.H * p.T * D);
  Arena<Acc> count;
  Blocks<Acc>(count, round_tokens * p.H, D, max_split);
  const ThreadBlocks<Acc> memories(threads, count.used()),
      partials(num_tasks, Partial<Acc>::size(round_tokens * p.H, D));

#pragma omp parallel num_threads(int(threads))
  {
    Acc* memory = memories.thread(omp_get_thread_num());
    if (p.k.data != nullptr) {
#pragma omp for
      for (int64_t i = 0; i < p.B * p.T; ++i) append<Element>(p, i / p.T, i % p.T);
    }
    for (int64_t begin = 0; begin < p.T; begin += round_tokens) {
      const Round round{begin, std::min(round_tokens, p.T - begin)};
      const int64_t num_rows = round.num_tokens * p.H;
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < num_tasks; ++i) {
        Arena<Acc> arena(memory);
        run_split<Element>(p, tasks[i], round, Blocks<Acc>(arena, num_rows, D, max_split),
                           Partial<Acc>(Arena<Acc>(partials.thread(i)), num_rows, D));
      }
#pragma omp for
      for (int64_t i = 0; i < p.B * num_rows; ++i) {
        const int64_t b = i / num_rows, row = i % num_rows, rows = round.num_tokens * group;
        combine<Element>(p, b, begin + row % rows / group, row / rows * group + row % group, row, num_rows,
                         partials, first_task[b], first_task[b + 1], memory);
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
