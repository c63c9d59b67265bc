// Tiles of 16-bit elements in shared memory, and how a warp takes matrix fragments from them.
//
// A tile's rows are cut into 16-byte pieces, and piece p of row r lies at p ^ key(r): the eight rows that one
// ldmatrix reads then lie in eight different groups of banks, without padding.
#pragma once

#include "arch/sm80.cuh"
#include "warp.cuh"

namespace hypenet::cuda {

constexpr int kPiece = 8;  // elements of 16 bits in 16 bytes

template <class Element_, int kRows_, int kCols_>
struct alignas(128) Tile {
  using Element = Element_;
  static constexpr int kRows = kRows_, kCols = kCols_, kPieces = kCols / kPiece;
  static_assert(sizeof(Element) == 2 && kCols % 16 == 0 && (kPieces & (kPieces - 1)) == 0);

  Element data[kRows * kCols];

  // In unsigned numbers, of which quotients and remainders are single bit operations.
  __device__ static constexpr unsigned key(unsigned row) {
    return kPieces >= 8 ? row % 8 : kPieces == 4 ? row / 2 % 4 : row / 4 % 2;
  }
  __device__ static constexpr unsigned offset(unsigned row, unsigned col) {
    return row * kCols + (col / kPiece ^ key(row)) * kPiece + col % kPiece;
  }
  __device__ Element* at(int row, int col) { return data + offset(row, col); }
  __device__ const Element* at(int row, int col) const { return data + offset(row, col); }
};

// ---- fragments. The letters name the operand's own rows and columns; `tile` holds it as it is or
// transposed.

// A [16, 16] at (m, k) of a tile [M, K].
template <class Tile>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const Tile& tile, int m, int k) {
  const int lane = lane_idx();
  arch::ldmatrix_x4(a, tile.at(m + lane % 16, k + lane / 16 * 8));
}

// A [16, 16] at (m, k) of a tile that holds its transpose, [K, M].
template <class Tile>
__device__ __forceinline__ void load_a_transposed(uint32_t (&a)[4], const Tile& tile, int m, int k) {
  const int lane = lane_idx();
  arch::ldmatrix_x4_trans(a, tile.at(k + lane % 8 + lane / 16 * 8, m + lane / 8 % 2 * 8));
}

// B [16, 16] at (k, n) of a tile [K, N]: b[0] is its left half, b[1] its right half.
template <class Tile>
__device__ __forceinline__ void load_b(uint32_t (&b)[2][2], const Tile& tile, int k, int n) {
  const int lane = lane_idx();
  uint32_t r[4];
  arch::ldmatrix_x4_trans(r, tile.at(k + lane % 16, n + lane / 16 * 8));
  b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
}

// B [16, 16] at (k, n) of a tile that holds its transpose, [N, K].
template <class Tile>
__device__ __forceinline__ void load_b_transposed(uint32_t (&b)[2][2], const Tile& tile, int k, int n) {
  const int lane = lane_idx();
  uint32_t r[4];
  arch::ldmatrix_x4(r, tile.at(n + lane % 8 + lane / 16 * 8, k + lane / 8 % 2 * 8));
  b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
}

// Two neighbouring results [16, 8], rounded, as one operand A [16, 16].
template <class Element>
__device__ __forceinline__ void round_to_a(uint32_t (&a)[4], const float (&left)[4],
                                           const float (&right)[4]) {
  a[0] = arch::pack<Element>(left[0], left[1]);
  a[1] = arch::pack<Element>(left[2], left[3]);
  a[2] = arch::pack<Element>(right[0], right[1]);
  a[3] = arch::pack<Element>(right[2], right[3]);
}

// A result [16, 8] at (m, n) of a tile, rounded.
template <class Tile>
__device__ __forceinline__ void store_d(Tile& tile, int m, int n, const float (&d)[4]) {
  const int row = m + lane_idx() / 4, col = n + lane_idx() % 4 * 2;
  *reinterpret_cast<uint32_t*>(tile.at(row, col)) = arch::pack<typename Tile::Element>(d[0], d[1]);
  *reinterpret_cast<uint32_t*>(tile.at(row + 8, col)) = arch::pack<typename Tile::Element>(d[2], d[3]);
}

// ---- copies by kThreads threads, this one being number `thread`

// run(i, row, col) for the pieces of a tile that fall to a thread, kRowStep<kThreads, Tile> rows apart;
// neighbouring threads have neighbouring pieces.
template <int kThreads, class Tile>
constexpr int kRowStep = kThreads / Tile::kPieces;

template <int kThreads, class Tile, class Run>
__device__ __forceinline__ void for_each_piece(int thread, Run&& run) {
  constexpr int kStep = kRowStep<kThreads, Tile>, kCount = (Tile::kRows + kStep - 1) / kStep;
  static_assert(kThreads % Tile::kPieces == 0);
  const int row = static_cast<unsigned>(thread) / Tile::kPieces;
  const int col = static_cast<unsigned>(thread) % Tile::kPieces * kPiece;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (Tile::kRows % kStep == 0 || row + i * kStep < Tile::kRows) run(i, row + i * kStep, col);
  }
}

// Starts the copy of rows [0, num_rows) of a matrix whose rows are `stride` elements apart; the tile's other
// rows become zero. Addresses are multiples of 16 bytes.
template <int kThreads, class Tile>
__device__ __forceinline__ void copy_tile_async(Tile& tile, const typename Tile::Element* global,
                                                int64_t stride, int num_rows, int thread) {
  const int64_t step = kRowStep<kThreads, Tile> * stride;
  for_each_piece<kThreads, Tile>(thread, [&](int i, int row, int col) {
    if (i == 0) global += row * stride + col;
    arch::copy_16_async(tile.at(row, col), global + i * step, row < num_rows);
  });
}

// Stores rows [0, num_rows) of a tile to a matrix whose rows are `stride` elements apart.
template <int kThreads, class Tile>
__device__ __forceinline__ void store_tile(typename Tile::Element* global, int64_t stride, int num_rows,
                                           const Tile& tile, int thread) {
  const int64_t step = kRowStep<kThreads, Tile> * stride;
  for_each_piece<kThreads, Tile>(thread, [&](int i, int row, int col) {
    if (i == 0) global += row * stride + col;
    if (row < num_rows) arch::store_16_bytes(global + i * step, arch::load_16_bytes(tile.at(row, col)));
  });
}

}  // namespace hypenet::cuda
