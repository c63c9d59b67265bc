// What the two kernels of the gated delta rule's backward share: gates and decays, products of warps, sums
// over lanes.
#pragma once

#include "arch/sm80.cuh"
#include "gated_delta.cuh"
#include "tile.cuh"

namespace hypenet::cuda::gated_delta::bwd {

// This thread's number, from which nothing is known to follow: addresses that outlive a step cost more
// registers than there are.
__device__ __forceinline__ int fresh_thread() { return arch::opaque(arch::thread_idx()); }

// Starts the copies of G and beta of a chunk, beta past the end zero; both by threads 0 to kChunk - 1.
template <bool kDelta>
__device__ __forceinline__ void copy_gates_async(float (&G)[kChunk], float (&beta)[kChunk],
                                                 const GatedDeltaBwdParams& params, int64_t chunk, int head,
                                                 int64_t batch, int64_t token, int num_tokens) {
  const int i = fresh_thread();
  if (i >= kChunk) return;
  arch::copy_4_async(&G[i], params.G + (chunk * params.HV + head) * kChunk + i, true);
  if constexpr (kDelta) {
    const bool valid = i < num_tokens;
    arch::copy_4_async(&beta[i], row_of<float>(params.beta, batch, token + (valid ? i : 0), head), valid);
  }
}

// Gamma_ij = 2^(G_i - G_j) for j <= i, else 0.
__device__ __forceinline__ float decay_between(const float (&G)[kChunk], int i, int j) {
  return j <= i ? gated_delta::decay_between(G[i], G[j]) : 0.0f;
}

// Rows of a tile times a factor each, rounded, into another tile or the same one.
template <int kThreads, class Tile, class Factor>
__device__ __forceinline__ void scale_rows(Tile& to, const Tile& from, Factor&& factor) {
  using Element = typename Tile::Element;
  for_each_piece<kThreads, Tile>(fresh_thread(), [&](int, int row, int col) {
    uint4 piece = arch::load_16_bytes(from.at(row, col));
    uint32_t* pairs = &piece.x;
    const float by = factor(row);
#pragma unroll
    for (int i = 0; i < kPiece / 2; ++i) {
      const float2 x = arch::unpack<Element>(pairs[i]);
      pairs[i] = arch::pack<Element>(x.x * by, x.y * by);
    }
    arch::store_16_bytes(to.at(row, col), piece);
  });
}

// d [16 kM, 8 kN] += A B over kDepth, by one warp. load_a(a, m, k) and load_b(b, k, n) fill fragments [16,
// 16]. kSteps of the sum stand in line; fewer need fewer registers.
template <class Element, int kDepth, int kSteps = kDepth / 16, int kM, int kN, class LoadA, class LoadB>
__device__ __forceinline__ void multiply(float (&d)[kM][kN][4], LoadA&& load_a, LoadB&& load_b) {
  static_assert(kDepth % 16 == 0 && kN % 2 == 0);
#pragma unroll kSteps
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) load_a(a[m], 16 * m, k);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t b[2][2];
      load_b(b, k, 8 * n);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        arch::mma_16x8x16<Element>(d[m][n], a[m], b[0]);
        arch::mma_16x8x16<Element>(d[m][n + 1], a[m], b[1]);
      }
    }
  }
}

// The same with two of its steps in line, so that nothing spills.
template <class Element, int kDepth, int kN, class LoadA, class LoadB>
__device__ __forceinline__ void multiply_by_twos(float (&d)[1][kN][4], LoadA&& load_a, LoadB&& load_b) {
  multiply<Element, kDepth, 2>(d, load_a, load_b);
}

template <int kM, int kN>
__device__ __forceinline__ void set_zero(float (&d)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) d[m][n][0] = d[m][n][1] = d[m][n][2] = d[m][n][3] = 0.0f;
  }
}

// run(element of d, row, column, and its number in d[m][n]) for what this lane holds of a product [16 kM, 8
// kN] that lies at (row, col).
template <int kM, int kN, class Run>
__device__ __forceinline__ void for_each_element(float (&d)[kM][kN][4], int row, int col, Run&& run) {
  const int lane = lane_idx();
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        run(d[m][n][i], row + 16 * m + lane / 4 + i / 2 * 8, col + 8 * n + lane % 4 * 2 + i % 2);
      }
    }
  }
}

template <class Tile, int kM, int kN>
__device__ __forceinline__ void store_product(Tile& tile, int row, int col, const float (&d)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) store_d(tile, row + 16 * m, col + 8 * n, d[m][n]);
  }
}

// What store_product's rounding leaves off.
template <class Tile, int kM, int kN>
__device__ __forceinline__ void store_low(Tile& tile, int row, int col, const float (&d)[kM][kN][4]) {
  using Element = typename Tile::Element;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        uint32_t high, low;
        pack_hi_lo<Element>(high, low, d[m][n][i], d[m][n][i + 1]);
        const int to_row = row + 16 * m + lane_idx() / 4 + 4 * i, to_col = col + 8 * n + lane_idx() % 4 * 2;
        *reinterpret_cast<uint32_t*>(tile.at(to_row, to_col)) = low;
      }
    }
  }
}

// The sum over the four lanes that share a row.
__device__ __forceinline__ float sum_row(float x) {
  x += arch::shuffle_xor(x, 1);
  return x + arch::shuffle_xor(x, 2);
}

// The sum over the eight lanes that share a column.
__device__ __forceinline__ float sum_column(float x) {
  x += arch::shuffle_xor(x, 4);
  x += arch::shuffle_xor(x, 8);
  return x + arch::shuffle_xor(x, 16);
}

template <int kParts>
__device__ __forceinline__ float sum_parts(const float (&parts)[kParts][kChunk], int i) {
  float sum = parts[0][i];
#pragma unroll
  for (int part = 1; part < kParts; ++part) sum += parts[part][i];
  return sum;
}

}  // namespace hypenet::cuda::gated_delta::bwd
