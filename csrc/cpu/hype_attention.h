// Shared by the attention kernels: sequences, the position scale, tiles, rows of heads and their packed
// forms.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../params.h"
#include "convert.h"
#include "dtype.h"
#include "elementwise.h"
#include "pairs.h"
#include "simd.h"
#include "tail.h"
#include "workspace.h"

namespace hypenet::cpu::attention {

constexpr int64_t kKeyBlock = 64;
constexpr int64_t kTileLanes = 64;
constexpr int64_t kTileHeads = 4;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sequence n: T queries from row `first` of `batch` on, query t at position offset + t, and S keys from row `first_key`
// of `key_batch` on.
struct Sequence {
  int64_t batch, first, T, S, offset, key_batch, first_key;
};

template <class Params>
Sequence sequence(const Params& p, int64_t n) {
  if (p.cu_seqlens == nullptr) return {n, 0, p.T, p.S, p.query_offset, n, 0};
  const int64_t first = p.cu_seqlens[n], length = p.cu_seqlens[n + 1] - first;
  if constexpr (requires { p.query_offsets; }) {
    if (p.query_offsets != nullptr) {
      const int64_t offset = p.query_offsets[n];
      return {0, first, length, offset + length, offset, n, 0};
    }
  }
  return {0, first, length, length, 0, 0, first};
}

// The approximate cost of both products over all visible (query, key) pairs.
template <class Params>
double multiply_adds(const Params& p) {
  const double keys = std::max<double>(p.query_offset + p.T / 2.0, p.S / 2.0);
  return 2.0 * p.B * p.H * p.T * keys * p.D;
}

// s_t = ln(t + a) / ln(a) at position t; 1 without a base.
inline double position_scale(int64_t t, double logit_scale_base) {
  if (logit_scale_base == 0) return 1;
  return std::log(static_cast<double>(t) + logit_scale_base) / std::log(logit_scale_base);
}

// The rows of one head: row r starts at data + r * stride.
template <class T>
struct Rows {
  T* data;
  int64_t stride;

  T* operator[](int64_t r) const { return data + r * stride; }
};

template <class Element>
Rows<Element> head_rows(const View& x, int64_t batch, int64_t token, int64_t head) {
  if (x.data == nullptr) return {nullptr, 0};
  return {static_cast<Element*>(x.data) + batch * x.batch + token * x.token + head * x.head, x.token};
}

// The same for a contiguous [B, T, heads, D] tensor.
template <class Element>
Rows<Element> head_rows(std::conditional_t<std::is_const_v<Element>, const void*, void*> x, int64_t T,
                        int64_t heads, int64_t D, int64_t batch, int64_t token, int64_t head) {
  if (x == nullptr) return {nullptr, 0};
  return {static_cast<Element*>(x) + ((batch * T + token) * heads + head) * D, heads * D};
}

// The unit of the products in forward and backward: a few tokens of a few query heads that share a key head,
// one (head, token) pair per lane. So a key is one broadcast, and maxima and sums over keys need no shuffles.
// Data of the lanes is stored as [.., kTileLanes]; the lanes from lanes() up to `padded` are computed and
// ignored.
struct Tile {
  int64_t head, num_heads;    // query heads
  int64_t begin, num_tokens;  // within the sequence

  int64_t lanes() const { return num_heads * num_tokens; }
  template <class T>
  int64_t padded() const {
    return ceil_div(lanes(), kLanes<T>) * kLanes<T>;
  }
};

// Calls body(tile) for all tiles of tokens [begin, end) of `num_heads` heads from `head` on.
template <class Body>
void for_each_tile(int64_t head, int64_t num_heads, int64_t begin, int64_t end, Body&& body) {
  constexpr int64_t kStep = kTileLanes / kTileHeads;
  const int64_t tokens = kTileLanes / num_heads / kStep * kStep;
  for (; begin < end; begin += tokens) body(Tile{head, num_heads, begin, std::min(tokens, end - begin)});
}

// y [rows, packed(D)]: the rows as factors (pairs.h) of a product that sums over D.
template <class Element, class Factor>
void pack_rows(Rows<Element> x, int64_t rows, int64_t D, Factor* y) {
  for (int64_t r = 0; r < rows; ++r) pack_row(x[r], D, y + r * packed<Factor>(D));
}

// y [packed(rows), D]: the rows as factors of a product that sums over the rows.
template <class Element, class Factor>
void pack_across_rows(Rows<Element> x, int64_t rows, int64_t D, Factor* y) {
  for (int64_t r = 0; r < rows; r += kPacked<Factor>) {
    const Element* next = r + 1 < rows ? x[r + 1] : nullptr;
    pack_columns(x[r], next, D, y + r / kPacked<Factor> * D);
  }
}

}  // namespace hypenet::cpu::attention
