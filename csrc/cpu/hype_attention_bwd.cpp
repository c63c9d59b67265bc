// HyPE attention, backward: dq, dk, dv and the gradient of the gate, from lse and the ungated output.
//
// Math, with x_ti, lse and o_ungated as in hype_attention_fwd.cpp, z = sigmoid(gate), do the gradient of o:
//   do'_t = do_t z_t,  dgate_t = do_t o_ungated_t z_t (1 - z_t),  delta_t = do'_t . o_ungated_t
//   P_ti = exp(x_ti - lse_t),  dP_ti = do'_t . v_i,  dX_ti = s_t scale P_ti (dP_ti - delta_t)
//   dv_i = sum_t P_ti do'_t,  dk_i = sum_t dX_ti q_t,  dq_t = sum_i dX_ti k_i
// dk and dv sum over the query heads of the group as well.
//
// Shapes: params.h, HypeAttentionBwdParams.
//
// Mapping: if there are enough of them, (1) one task per (sequence, key head) computes dq, dk and dv: for
// each block of queries it iterates over the key blocks; dq stays in the tile, dk and dv accumulate in
// memory. Otherwise (2) one task per (key head, block of queries) computes dq and (3) one per (key head,
// block of keys) dk and dv; both recompute P and dX. Queries are cut into tiles as in the forward, and the
// order of every sum is the same in both cases: dq over ascending blocks of keys; dk and dv over the tiles of
// a block of queries, then over ascending blocks. So the result is bitwise independent of this choice and of
// the number of threads.
//
// Products, for the lanes c of a tile and the keys i of a block:
//   X^T[i, c] = K[i, :] Q^T[:, c]         dP^T[i, c] = V[i, :] dO^T[:, c]
//   dV[i, :] += P^T[i, c] dO[c, :]        dK[i, :] += dX^T[i, c] Q[c, :]
//   dQ^T[:, c] += K^T[:, i] dX^T[i, c]
//
// Numerics: all intermediate results are in the accumulation type; x_ti - lse_t <= 0 up to rounding. In
// products of bfloat16 pairs (pairs.h), do', P and dX are rounded to bfloat16. Rows that are not finite meet
// no masked weight (masked_product.h).
//
// Cost: 10 D FLOPs per visible (query, key) pair, 14 D in two passes; compute bound. Memory: a few blocks per
// thread; in (1), unless the outputs have the accumulation type, also dk and dv of one key head per thread.
#include <cstdint>
#include <type_traits>
#include <vector>

#include "gemm.h"
#include "hype_attention.h"
#include "kernels.h"
#include "masked_product.h"
#include "simd.h"

namespace hypenet::cpu {
using namespace attention;
namespace {

constexpr int64_t kQueryBlock = 32;  // its tiles share a block of keys and one part of dk and dv
constexpr int64_t kKeysAlone = 128;  // keys per task of (3)
constexpr int64_t kTilesPerBlock = ceil_div(kQueryBlock * kTileHeads, kTileLanes);

// The state of a tile: q and do' as factors of sums over lanes and over D, dq, and scalars per lane.
template <class Factor, class Acc>
struct TileBlocks {
  Factor *q, *do_;                       // [packed(kTileLanes), D]
  Factor *q_transposed, *do_transposed;  // [packed(D), kTileLanes]
  Acc* dq;                               // [D, kTileLanes]
  Acc *scale, *lse, *delta, *position;   // [kTileLanes]

  TileBlocks(Arena<Acc>& arena, int64_t D)
      : q(arena.template take<Factor>(packed<Factor>(kTileLanes) * D)),
        do_(arena.template take<Factor>(packed<Factor>(kTileLanes) * D)),
        q_transposed(arena.template take<Factor>(packed<Factor>(D) * kTileLanes)),
        do_transposed(arena.template take<Factor>(packed<Factor>(D) * kTileLanes)),
        dq(arena.take(D * kTileLanes)),
        scale(arena.take(kTileLanes)),
        lse(arena.take(kTileLanes)),
        delta(arena.take(kTileLanes)),
        position(arena.take(kTileLanes)) {}
};

// The buffers shared by the tiles of a thread: X and dP of a tile and a block of keys, replaced in place by P
// and dX as factors of sums over lanes; dX as factors of a sum over keys; rows.
template <class Factor, class Acc>
struct Blocks {
  Acc *weights, *dlogits;        // [kKeyBlock, kTileLanes]
  Factor* dlogits_of_keys;       // [packed(kKeyBlock), kTileLanes]
  Factor* packed_rows;           // [kTileLanes, packed(D)]
  Acc *rows, *o_row, *gate_row;  // [kTileLanes, D], [D] twice

  Blocks(Arena<Acc>& arena, int64_t D)
      : weights(arena.take(kKeyBlock * kTileLanes)),
        dlogits(arena.take(kKeyBlock * kTileLanes)),
        dlogits_of_keys(reinterpret_cast<Factor*>(dlogits)),
        packed_rows(arena.template take<Factor>(kTileLanes * packed<Factor>(D))),
        rows(arena.take(kTileLanes * D)),
        o_row(arena.take(D)),
        gate_row(arena.take(D)) {
    if (kPacked<Factor> > 1)
      dlogits_of_keys = arena.template take<Factor>(packed<Factor>(kKeyBlock) * kTileLanes);
  }
};

// Keys [start, start + keys) with their values, and the accumulators of their gradients, or null. The part
// that one block of queries adds is summed separately, so that rounding errors grow with the number of
// blocks, not of tokens.
template <class Factor, class Acc>
struct KeyBlock {
  Factor *k, *v;         // [kKeyBlock, packed(D)]
  Factor* k_transposed;  // [packed(kKeyBlock), D]: factors of a sum over keys
  Acc* parts;            // [2, kKeyBlock, D]
  Rows<Acc> dk{}, dv{}, dk_part{}, dv_part{};
  int64_t start = 0, keys = 0;
  bool own_parts = false;

  KeyBlock(Arena<Acc>& arena, int64_t D)
      : k(arena.template take<Factor>(kKeyBlock * packed<Factor>(D))),
        v(arena.template take<Factor>(kKeyBlock * packed<Factor>(D))),
        k_transposed(k),
        parts(arena.take(2 * kKeyBlock * D)) {
    if (kPacked<Factor> > 1) k_transposed = arena.template take<Factor>(packed<Factor>(kKeyBlock) * D);
  }

  template <class Element>
  void load(const HypeAttentionBwdParams& p, const Sequence& s, int64_t key_head, int64_t begin,
            int64_t end) {
    start = begin;
    keys = std::min(kKeyBlock, end - begin);
    const auto k_rows = head_rows<Element>(p.k, s.batch, s.first + start, key_head);
    pack_rows(k_rows, keys, p.D, k);
    if (kPacked<Factor> > 1) pack_across_rows(k_rows, keys, p.D, k_transposed);
    pack_rows(head_rows<Element>(p.v, s.batch, s.first + start, key_head), keys, p.D, v);
  }

  // Starts a block of queries of `num_heads` heads. A single tile needs no part of its own, since its product
  // is summed before it is added, and neither do products of bfloat16, whose own rounding errors are far
  // larger.
  void begin_queries(int64_t num_heads, int64_t D) {
    own_parts = kPacked<Factor> == 1 && dk.data != nullptr && num_heads * kQueryBlock > kTileLanes;
    dk_part = own_parts ? Rows<Acc>{parts, D} : dk;
    dv_part = own_parts ? Rows<Acc>{parts + kKeyBlock * D, D} : dv;
    if (own_parts) std::fill_n(parts, 2 * kKeyBlock * D, Acc(0));
  }

  void end_queries(int64_t D) const {
    if (!own_parts) return;
    for (int64_t r = 0; r < keys; ++r) {
      for (int64_t d = 0; d < D; ++d) dk[r][d] += dk_part[r][d];
      for (int64_t d = 0; d < D; ++d) dv[r][d] += dv_part[r][d];
    }
  }
};

// One (head, token) of a tile: do_row = do'_t, rounded as in the products. Returns delta_t; writes dgate on
// request.
template <class Element, class Factor, class Acc>
Acc load_output_gradient(const HypeAttentionBwdParams& p, const Sequence& s, int64_t head, int64_t token,
                         bool with_dgate, const Blocks<Factor, Acc>& b, Acc* do_row) {
  const int64_t D = p.D, row = s.first + token;
  convert_row(head_rows<Element>(p.do_, s.batch, row, head)[0], D, do_row);
  convert_row(head_rows<const Element>(p.o_ungated, p.T, p.H, D, s.batch, row, head)[0], D, b.o_row);
  if (p.gate.data != nullptr) {
    Element* dgate = head_rows<Element>(p.dgate, p.T, p.H, D, s.batch, row, head)[0];
    convert_row(head_rows<Element>(p.gate, s.batch, row, head)[0], D, b.gate_row);
    sigmoid_row(b.gate_row, D, b.gate_row);
    for (int64_t d = 0; d < D; ++d) {
      const Acc gated = do_row[d] * b.gate_row[d];
      if (with_dgate) dgate[d] = static_cast<Element>(gated * b.o_row[d] * (1 - b.gate_row[d]));
      do_row[d] = static_cast<Acc>(static_cast<packed_t<Factor>>(gated));
    }
  }
  Acc delta = 0;
#pragma omp simd reduction(+ : delta)
  for (int64_t d = 0; d < D; ++d) delta += do_row[d] * b.o_row[d];
  return delta;
}

// Writes the rows [lanes, packed(D)] of a tile in both forms of factors; lanes up to `padded` become zero.
template <class Factor>
void form_factors(int64_t lanes, int64_t padded, int64_t D, Factor* rows, Factor* x, Factor* x_transposed) {
  const int64_t width = packed<Factor>(D);
  std::fill(rows + lanes * width, rows + padded * width, Factor{});
  transpose(padded, width, rows, width, x_transposed, kTileLanes);
  pack_across_rows(Rows<packed_t<Factor>>{reinterpret_cast<packed_t<Factor>*>(rows), width * kPacked<Factor>},
                   padded, D, x);
}

template <class Element, class Factor, class Acc>
void load_tile(const HypeAttentionBwdParams& p, const Sequence& s, const Tile& tile, bool with_dgate,
               const Blocks<Factor, Acc>& b, const TileBlocks<Factor, Acc>& t) {
  const int64_t D = p.D, width = packed<Factor>(D), lanes = tile.lanes(), padded = tile.padded<Acc>();
  const auto for_each_lane = [&](auto&& body) {
    for (int64_t lane = 0; lane < lanes; ++lane)
      body(lane, tile.head + lane / tile.num_tokens, tile.begin + lane % tile.num_tokens);
  };
  for_each_lane([&](int64_t lane, int64_t head, int64_t token) {
    pack_row(head_rows<Element>(p.q, s.batch, s.first + token, head)[0], D, b.packed_rows + lane * width);
    t.scale[lane] = static_cast<Acc>(p.scale * position_scale(s.offset + token, p.logit_scale_base));
    t.lse[lane] = static_cast<const Acc*>(p.lse)[(s.batch * p.H + head) * p.T + s.first + token];
    t.position[lane] = static_cast<Acc>(s.offset + token);
  });
  form_factors(lanes, padded, D, b.packed_rows, t.q, t.q_transposed);
  for_each_lane([&](int64_t lane, int64_t head, int64_t token) {
    t.delta[lane] = load_output_gradient<Element>(p, s, head, token, with_dgate, b, b.rows);
    auto* row = reinterpret_cast<packed_t<Factor>*>(b.packed_rows + lane * width);
    for (int64_t d = 0; d < D; ++d) row[d] = static_cast<packed_t<Factor>>(b.rows[d]);
    if (D % kPacked<Factor> != 0) row[D] = packed_t<Factor>(0);
  });
  form_factors(lanes, padded, D, b.packed_rows, t.do_, t.do_transposed);
  for (Acc* x : {t.scale, t.delta, t.lse, t.position}) std::fill(x + lanes, x + padded, Acc(0));
  std::fill_n(t.dq, D * kTileLanes, Acc(0));
}

// Computes P and dX of a tile and the first `keys` keys of a block.
template <class Factor, class Acc>
void differentiate(const Tile& tile, const KeyBlock<Factor, Acc>& block, int64_t keys, bool masked, int64_t D,
                   const Blocks<Factor, Acc>& b, const TileBlocks<Factor, Acc>& t) {
  constexpr int64_t L = kLanes<Acc>, kStep = kPacked<Factor>;
  const int64_t padded = tile.padded<Acc>(), width = packed<Factor>(D);
  gemm<Op::kNN>(keys, padded, width, block.k, width, t.q_transposed, kTileLanes, b.weights, kTileLanes);
  gemm<Op::kNN>(keys, padded, width, block.v, width, t.do_transposed, kTileLanes, b.dlogits, kTileLanes);
  for (int64_t i = 0; i < keys; i += kStep) {
    for (int64_t c = 0; c < padded; c += L) {
      vec<Acc> gradients[kStep] = {};
#pragma GCC unroll 2
      for (int j = 0; j < kStep; ++j) {
        if (j > 0 && i + j == keys) break;
        Acc *P = b.weights + (i + j) * kTileLanes, *dX = b.dlogits + (i + j) * kTileLanes;
        const vec<Acc> scale = load(t.scale + c);
        vec<Acc> weight = exp<Acc>(load(P + c) * scale - load(t.lse + c));
        vec<Acc> gradient = weight * (load(dX + c) - load(t.delta + c)) * scale;
        if (masked) {
          const auto hidden = broadcast(static_cast<Acc>(block.start + i + j)) > load(t.position + c);
          weight = hidden ? vec<Acc>{} : weight;
          gradient = hidden ? vec<Acc>{} : gradient;
        }
        store_packed<Factor, Acc>(reinterpret_cast<Factor*>(P) + c / kStep, weight);
        store_packed<Factor, Acc>(reinterpret_cast<Factor*>(dX) + c / kStep, gradient);
        gradients[j] = gradient;
      }
      if (kStep > 1) store(b.dlogits_of_keys + i / kStep * kTileLanes + c, pack<Factor, Acc>(gradients));
    }
  }
}

// Adds the contribution of a tile and a block of keys to dq, and to dk and dv if the block collects them.
template <class Factor, class Acc>
void add_gradients(const Sequence& s, const Tile& tile, const KeyBlock<Factor, Acc>& block, int64_t D,
                   const Blocks<Factor, Acc>& b, const TileBlocks<Factor, Acc>& t, bool with_dq) {
  const int64_t lanes = tile.lanes(), first_visible = s.offset + tile.begin - block.start + 1;
  const int64_t seen = std::min(block.keys, first_visible + tile.num_tokens - 1);
  if (seen <= 0) return;
  const bool masked = first_visible < packed<Factor>(seen) * kPacked<Factor>;
  differentiate(tile, block, seen, masked, D, b, t);
  const auto multiply = [&](int64_t rows, const Factor* x, auto&& product, auto&& add_row) {
    if (!masked) return product(x);
    product_of_visible<Acc>(rows, D, x, reinterpret_cast<Factor*>(b.rows), product, add_row);
  };
  const auto visible = [&](int64_t i, int64_t c) { return i < first_visible + c % tile.num_tokens; };
  if (with_dq) {
    const auto product = [&](const Factor* k) {
      gemm_from<Op::kTN>(AddedLast<Acc>{t.dq, kTileLanes}, D, tile.padded<Acc>(), packed<Factor>(seen), k, D,
                         b.dlogits_of_keys, kTileLanes, t.dq, kTileLanes);
    };
    multiply(seen, block.k_transposed, product, [&](int64_t i) {
      for (int64_t c = 0; c < lanes; ++c) {
        if (!visible(i, c)) continue;
        const Acc dX = static_cast<Acc>(element(b.dlogits_of_keys, kTileLanes, i, c));
        for (int64_t d = 0; d < D; ++d)
          t.dq[d * kTileLanes + c] += dX * static_cast<Acc>(element(block.k_transposed, D, i, d));
      }
    });
  }
  if (block.dk.data == nullptr) return;
  const auto add = [&](const Acc* weights, const Factor* x, Rows<Acc> sum) {
    const auto product = [&](const Factor* rows) {
      gemm_from<Op::kNN>(AddedLast<Acc>{sum.data, sum.stride}, seen, D, packed<Factor>(lanes),
                         reinterpret_cast<const Factor*>(weights), kTileLanes, rows, D, sum.data, sum.stride);
    };
    multiply(lanes, x, product, [&](int64_t c) {
      for (int64_t i = 0; i < seen; ++i) {
        if (!visible(i, c)) continue;
        const auto* row = reinterpret_cast<const packed_t<Factor>*>(weights + i * kTileLanes);
        const Acc weight = static_cast<Acc>(row[c]);
        for (int64_t d = 0; d < D; ++d) sum[i][d] += weight * static_cast<Acc>(element(x, D, c, d));
      }
    });
  };
  add(b.dlogits, t.q, block.dk_part);
  add(b.weights, t.do_, block.dv_part);
}

template <class Element, class Factor, class Acc>
void store_dq(const HypeAttentionBwdParams& p, const Sequence& s, const Tile& tile,
              const Blocks<Factor, Acc>& b, const TileBlocks<Factor, Acc>& t) {
  const int64_t D = p.D;
  transpose(D, tile.lanes(), t.dq, kTileLanes, b.rows, D);
  for (int64_t lane = 0; lane < tile.lanes(); ++lane) {
    const int64_t head = tile.head + lane / tile.num_tokens, token = tile.begin + lane % tile.num_tokens;
    convert_row(b.rows + lane * D, D,
                head_rows<Element>(p.dq, p.T, p.H, D, s.batch, s.first + token, head)[0]);
  }
}

template <class Element, class Acc>
void store_keys(void* out, const HypeAttentionBwdParams& p, const Sequence& s, int64_t key_head,
                int64_t start, int64_t keys, Rows<Acc> x) {
  const auto rows = head_rows<Element>(out, p.S, p.HK, p.D, s.batch, s.first + start, key_head);
  for (int64_t r = 0; r < keys; ++r) convert_row(x[r], p.D, rows[r]);
}

// Calls body(head, num_heads, begin, end) for the blocks of queries from `begin` on, and in each for
// kTileHeads heads of the key head's group at a time: the order in which dk and dv are summed.
template <class Body>
void for_each_query_block(const HypeAttentionBwdParams& p, const Sequence& s, int64_t key_head, int64_t begin,
                          Body&& body) {
  const int64_t group = p.H / p.HK;
  for (; begin < s.T; begin += kQueryBlock) {
    for (int64_t g = 0; g < group; g += kTileHeads) {
      body(key_head * group + g, std::min(kTileHeads, group - g), begin, std::min(begin + kQueryBlock, s.T));
    }
  }
}

// (2) dq of queries [begin, end) of some heads of a group, and their contribution to dk and dv [S, D] if
// given.
template <class Element, class Acc>
void run_queries(const HypeAttentionBwdParams& p, const Sequence& s, int64_t head, int64_t num_heads,
                 int64_t begin, int64_t end, Rows<Acc> dk, Rows<Acc> dv, Acc* memory) {
  using Factor = factor_t<Element>;
  using InTile = TileBlocks<Factor, Acc>;
  const int64_t key_head = head / (p.H / p.HK);
  Arena<Acc> arena(memory);
  const Blocks<Factor, Acc> b(arena, p.D);
  KeyBlock<Factor, Acc> block(arena, p.D);
  const auto for_each = [&](auto&& body) {
    Arena<Acc> rest = arena;
    for_each_tile(head, num_heads, begin, end, [&](const Tile& tile) { body(tile, InTile(rest, p.D)); });
  };
  for_each([&](const Tile& tile, const InTile& t) { load_tile<Element>(p, s, tile, true, b, t); });
  for (int64_t start = 0; start < s.offset + end; start += kKeyBlock) {
    block.template load<Element>(p, s, key_head, start, s.offset + end);
    if (dk.data != nullptr) {
      block.dk = {dk[start], dk.stride};
      block.dv = {dv[start], dv.stride};
    }
    block.begin_queries(num_heads, p.D);
    for_each([&](const Tile& tile, const InTile& t) { add_gradients(s, tile, block, p.D, b, t, true); });
    block.end_queries(p.D);
  }
  for_each([&](const Tile& tile, const InTile& t) { store_dq<Element>(p, s, tile, b, t); });
}

// (1) All gradients of one key head's group. Outputs in the accumulation type serve as accumulators of dk and
// dv.
template <class Element, class Acc>
void run_group(const HypeAttentionBwdParams& p, const Sequence& s, int64_t key_head, Acc* memory,
               Acc* dk_dv) {
  const int64_t D = p.D;
  Rows<Acc> dk{dk_dv, D}, dv{dk_dv + s.S * D, D};
  if constexpr (std::is_same_v<Element, Acc>) {
    dk = head_rows<Acc>(p.dk, p.S, p.HK, D, s.batch, s.first, key_head);
    dv = head_rows<Acc>(p.dv, p.S, p.HK, D, s.batch, s.first, key_head);
  }
  for (int64_t r = 0; r < s.S; ++r) {
    std::fill_n(dk[r], D, Acc(0));
    std::fill_n(dv[r], D, Acc(0));
  }
  for_each_query_block(p, s, key_head, 0, [&](int64_t head, int64_t num_heads, int64_t begin, int64_t end) {
    run_queries<Element>(p, s, head, num_heads, begin, end, dk, dv, memory);
  });
  if constexpr (!std::is_same_v<Element, Acc>) {
    store_keys<Element>(p.dk, p, s, key_head, 0, s.S, dk);
    store_keys<Element>(p.dv, p, s, key_head, 0, s.S, dv);
  }
}

// (3) dk and dv of keys [begin, begin + kKeysAlone).
template <class Element, class Acc>
void run_keys(const HypeAttentionBwdParams& p, const Sequence& s, int64_t key_head, int64_t begin,
              Acc* memory) {
  using Factor = factor_t<Element>;
  const int64_t D = p.D, end = std::min(begin + kKeysAlone, s.S);
  Arena<Acc> arena(memory);
  const Blocks<Factor, Acc> b(arena, D);
  const TileBlocks<Factor, Acc> t(arena, D);
  const Rows<Acc> dk{arena.take(kKeysAlone * D), D}, dv{arena.take(kKeysAlone * D), D};
  std::fill_n(dk.data, (end - begin) * D, Acc(0));
  std::fill_n(dv.data, (end - begin) * D, Acc(0));
  std::vector<KeyBlock<Factor, Acc>> blocks;
  for (int64_t start = begin; start < end; start += kKeyBlock) {
    blocks.emplace_back(arena, D).template load<Element>(p, s, key_head, start, end);
    blocks.back().dk = {dk[start - begin], D};
    blocks.back().dv = {dv[start - begin], D};
  }
  const int64_t first_query = std::max<int64_t>(begin - s.offset, 0) / kQueryBlock * kQueryBlock;
  const auto add_queries = [&](int64_t head, int64_t num_heads, int64_t from, int64_t to) {
    for (auto& block : blocks) block.begin_queries(num_heads, D);
    for_each_tile(head, num_heads, from, to, [&](const Tile& tile) {
      load_tile<Element>(p, s, tile, false, b, t);
      for (const auto& block : blocks) add_gradients(s, tile, block, D, b, t, false);
    });
    for (const auto& block : blocks) block.end_queries(D);
  };
  for_each_query_block(p, s, key_head, first_query, add_queries);
  store_keys<Element>(p.dk, p, s, key_head, begin, end - begin, dk);
  store_keys<Element>(p.dv, p, s, key_head, begin, end - begin, dv);
}

// The rows from `begin` on of a head of sequence n.
struct Task {
  int64_t n, head, begin;
};

// Lists the blocks of `size` rows of the first length(sequence) rows of every head.
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

// Whether (1), with 5 products per pair of blocks, takes less time than (2) and (3), with 7 but many more
// tasks.
bool one_pass(const HypeAttentionBwdParams& p, int64_t threads) {
  const int64_t tasks = p.N * p.HK;
  return 5 * ceil_div(tasks, threads) * threads <= 7 * tasks;
}

template <class Element>
void backward(const HypeAttentionBwdParams& p) {
  using Acc = acc_t<Element>;
  using Factor = factor_t<Element>;
  const int64_t D = p.D, group = p.H / p.HK;
  for (void* x : {p.dq, p.dgate}) zero_tail<Element>(p, x, p.H * D);
  for (void* x : {p.dk, p.dv}) zero_tail<Element>(p, x, p.HK * D);
  const std::vector<Task> queries = list_blocks(p, p.HK, kQueryBlock, [](const Sequence& s) { return s.T; });
  const int64_t threads = useful_threads(p.num_threads, queries.size(), 3 * multiply_adds(p));
  const bool single = one_pass(p, threads);

  Arena<Acc> count;
  Blocks<Factor, Acc>(count, D);
  for (int64_t i = 0; i < kKeysAlone / kKeyBlock; ++i) KeyBlock<Factor, Acc>(count, D);
  for (int64_t i = 0; i < kTilesPerBlock; ++i) TileBlocks<Factor, Acc>(count, D);
  count.take(2 * kKeysAlone * D);
  const int64_t block_size = count.used();
  if (single && !std::is_same_v<Element, Acc>) count.take(2 * p.S * D);
  const ThreadBlocks<Acc> memory(threads, count.used());

  const auto for_each_block = [&](const std::vector<Task>& tasks, auto&& run) {
    for_each_task(tasks.size(), threads, [&](int64_t i, int64_t thread) {
      run(sequence(p, tasks[i].n), tasks[i].head, tasks[i].begin, memory.thread(thread));
    });
  };
  if (single) {
    for_each_block(list_blocks(p, p.HK, 1, [](const Sequence&) { return 1; }),
                   [&](const Sequence& s, int64_t key_head, int64_t, Acc* buffer) {
                     run_group<Element>(p, s, key_head, buffer, buffer + block_size);
                   });
    return;
  }
  for_each_block(queries, [&](const Sequence& s, int64_t key_head, int64_t begin, Acc* buffer) {
    const int64_t end = std::min(begin + kQueryBlock, s.T);
    for (int64_t g = 0; g < group; g += kTileHeads) {
      run_queries<Element>(p, s, key_head * group + g, std::min(kTileHeads, group - g), begin, end,
                           Rows<Acc>{}, Rows<Acc>{}, buffer);
    }
  });
  for_each_block(list_blocks(p, p.HK, kKeysAlone, [](const Sequence& s) { return s.S; }),
                 [&](const Sequence& s, int64_t key_head, int64_t begin, Acc* buffer) {
                   run_keys<Element>(p, s, key_head, begin, buffer);
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
