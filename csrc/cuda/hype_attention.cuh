// What the attention kernels share: how a position scales logits, which rows a block owns, and the products
// that a warp takes of tiles in shared memory.
#pragma once

#include <cstdint>
#include <limits>

#include "../params.h"
#include "arch/sm80.cuh"
#include "limits.h"
#include "numbers.h"
#include "tile.cuh"
#include "view.cuh"

namespace hypenet::cuda::attention {

constexpr int64_t kMaxTokens = std::numeric_limits<int32_t>::max() / 2;  // rows are counted in 32 bits
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// scale log2(e) s_t, by which the product q_t . k_i becomes a logit of base 2. s_t = 1 + log(1 + t / a) /
// log(a) is ln(t + a) / ln(a), written so that it is exact at t = 0 and loses nothing where a is near 1.
struct LogitScale {
  float scale_log2, inverse_base, inverse_log2_base;

  __device__ float operator()(int position) const {
    const float ratio = static_cast<float>(position) * inverse_base;
    return scale_log2 * (1.0f + log2f(1.0f + ratio) * inverse_log2_base);
  }
};

// T queries from row `first` of `batch` on, at positions offset ..., against S keys: from the same row on, or, of
// sequence n >= 0 that continues a cache, those of row n of the cache. The tail is the rows after packed sequences,
// without queries or keys.
struct Sequence {
  int batch, first, T, S, offset;
  bool is_tail = false;
  int cached = -1;
};

// ---- tiles of kRows rows, numbered over all sequences without a table: sequence n of a packed batch has the
// slots from cu_seqlens[n] / kRows + n on, which are at least ceil(length / kRows) and at most one too many. The tail
// is sequence N.

// The last n in [0, N) for which start(n), which never falls, is at most x.
template <class Start>
__device__ __forceinline__ int64_t last_at_most(int64_t N, int64_t x, Start&& start) {
  int64_t low = 0, high = N - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (start(middle) <= x) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Bound n of packed sequences, within [0, T] whatever cu_seqlens holds, so that no tile leaves its tensors.
template <class Params>
__device__ __forceinline__ int bound(const Params& p, int64_t n) {
  const int64_t bound = p.cu_seqlens[n];
  return bound < 0 ? 0 : static_cast<int>(bound < p.T ? bound : p.T);
}

// Sets `begin` to the tile's first row in its sequence; it may lie past the end. Tiles rise with `slot`.
template <int kRows, class Params>
__device__ __forceinline__ Sequence find_tile(const Params& p, unsigned slot, int& begin) {
  if (p.cu_seqlens == nullptr) {
    const auto B = static_cast<unsigned>(p.B);
    begin = static_cast<int>(slot / B) * kRows;
    return {static_cast<int>(slot % B), 0, static_cast<int>(p.T), static_cast<int>(p.S),
            static_cast<int>(p.query_offset)};
  }
  const auto first_slot = [&](int64_t n) { return bound(p, n) / kRows + n; };
  const int64_t n = last_at_most(p.N + 1, slot, first_slot);
  const int first = bound(p, n), tile = static_cast<int>(slot - first_slot(n));
  begin = tile < 0 ? 0 : tile * kRows;
  if (tile < 0) return {0, first, 0, 0, 0};  // rows of no sequence
  if (n == p.N) return {0, first, 0, 0, 0, true};
  const int length = bound(p, n + 1) - first;
  if constexpr (requires { p.query_offsets; }) {
    if (p.query_offsets != nullptr) {
      const auto capacity = static_cast<int>(p.S);
      const int64_t given = p.query_offsets[n];
      const int offset = given < 0 ? 0 : static_cast<int>(given < capacity ? given : capacity);
      const int keys = offset + length < capacity ? offset + length : capacity;
      return {0, first, length, keys, offset, false, static_cast<int>(n)};
    }
  }
  return {0, first, length, length, 0};
}

// ---- rows of one head

// row_of in a contiguous [B, T, heads, D] tensor.
template <int D, class Element>
__device__ __forceinline__ Element* contiguous_row(void* x, int64_t T, int64_t heads, int64_t batch,
                                                   int64_t token, int64_t head) {
  return static_cast<Element*>(x) + ((batch * T + token) * heads + head) * D;
}

// Zeros one head of a tile's rows in a contiguous [1, T, heads, D] tensor.
template <int kRows, int kThreads, int D, class Element>
__device__ __forceinline__ void zero_rows(void* x, int64_t T, int64_t heads, int64_t head, int64_t first) {
  constexpr int kPieces = D / kPiece;
  for (int i = arch::thread_idx(); i < kRows * kPieces && first + i / kPieces < T; i += kThreads) {
    Element* row = contiguous_row<D, Element>(x, T, heads, 0, first + i / kPieces, head);
    arch::store_16_bytes(row + i % kPieces * kPiece, uint4{0, 0, 0, 0});
  }
}

// sigmoid(x) by an exponent that is never positive.
__device__ __forceinline__ float sigmoid(float x) {
  const float e = arch::exp2(-fabsf(x) * kLog2E);
  return (x < 0 ? e : 1.0f) * arch::reciprocal(1.0f + e);
}

// ---- products of one warp. d [16 kBlocks, 8 kColumns]

// d += A B^T: A is rows [m, m + 16 kBlocks) of a tile, B all rows of a tile.
template <int kBlocks, int kColumns, class TileA, class TileB>
__device__ __forceinline__ void multiply_transposed(float (&d)[kBlocks][kColumns][4], const TileA& tile_a,
                                                    int m, const TileB& tile_b) {
  static_assert(TileB::kRows == 8 * kColumns && TileA::kCols == TileB::kCols);
#pragma unroll 8  // more would keep more addresses than there are registers
  for (int k = 0; k < TileA::kCols; k += 16) {
    uint32_t a[kBlocks][4];
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) load_a(a[i], tile_a, m + 16 * i, k);
#pragma unroll
    for (int n = 0; n < kColumns; n += 2) {
      uint32_t b[2][2];
      load_b_transposed(b, tile_b, k, 8 * n);
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        arch::mma_16x8x16<typename TileA::Element>(d[i][n], a[i], b[0]);
        arch::mma_16x8x16<typename TileA::Element>(d[i][n + 1], a[i], b[1]);
      }
    }
  }
}

// Results of this warp, rounded, as operand A.
template <class Element, int kBlocks, int kInner>
__device__ __forceinline__ void round_results(uint32_t (&a)[kBlocks][kInner / 2][4],
                                              const float (&result)[kBlocks][kInner][4]) {
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
    for (int k = 0; k < kInner; k += 2) round_to_a<Element>(a[i][k / 2], result[i][k], result[i][k + 1]);
  }
}

// d += A B: A is of round_results, B all rows of a tile.
template <int kBlocks, int kColumns, int kSteps, class TileB>
__device__ __forceinline__ void multiply_rounded(float (&d)[kBlocks][kColumns][4],
                                                 const uint32_t (&a)[kBlocks][kSteps][4],
                                                 const TileB& tile_b) {
  static_assert(TileB::kRows == 16 * kSteps && TileB::kCols == 8 * kColumns);
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int n = 0; n < kColumns; n += 2) {
      uint32_t b[2][2];
      load_b(b, tile_b, 16 * k, 8 * n);
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        arch::mma_16x8x16<typename TileB::Element>(d[i][n], a[i][k], b[0]);
        arch::mma_16x8x16<typename TileB::Element>(d[i][n + 1], a[i][k], b[1]);
      }
    }
  }
}

// The same of a result that is rounded here.
template <int kBlocks, int kColumns, int kInner, class TileB>
__device__ __forceinline__ void multiply_result(float (&d)[kBlocks][kColumns][4],
                                                const float (&a_result)[kBlocks][kInner][4],
                                                const TileB& tile_b) {
  uint32_t a[kBlocks][kInner / 2][4];
  round_results<typename TileB::Element>(a, a_result);
  multiply_rounded(d, a, tile_b);
}

// Rounds d into rows [m, m + 16 kBlocks) of a tile, which no other warp touches, and stores the first
// num_rows of them, 16 bytes at a time.
template <int kBlocks, int kColumns, class Tile>
__device__ __forceinline__ void store_rows(typename Tile::Element* global, int64_t stride, int num_rows,
                                           Tile& tile, int m, const float (&d)[kBlocks][kColumns][4]) {
  static_assert(Tile::kCols == 8 * kColumns);
  arch::sync_warp();
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) store_d(tile, m + 16 * i, 8 * j, d[i][j]);
  }
  arch::sync_warp();
#pragma unroll
  for (int i = 0; i < 16 * kBlocks * Tile::kPieces / arch::kWarpSize; ++i) {
    const unsigned piece = lane_idx() + i * arch::kWarpSize;
    const int row = piece / Tile::kPieces, col = piece % Tile::kPieces * kPiece;
    if (row < num_rows) {
      arch::store_16_bytes(global + row * stride + col, arch::load_16_bytes(tile.at(m + row, col)));
    }
  }
}

}  // namespace hypenet::cuda::attention
