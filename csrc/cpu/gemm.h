// Small row-major matrix products: C[M, N] = A B, or keep C + A B. Every element of C is summed over k in
// rising order in one register, so its value does not depend on how the rows or columns were tiled or split.
// No allocation; transposed B is packed on the stack.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace hypenet::cpu {

enum class Op { kNN, kTN, kNT };  // kTN: A is stored [K, M]. kNT: B is stored [N, K].

namespace gemm_detail {

// The register tile: kRows x kVecs accumulators, kVecs rows of B, one broadcast element of A.
#if defined(__AVX512F__)
inline constexpr int kMaxVecs = 4, kRowsWide = 4, kRowsNarrow = 8;
#else
inline constexpr int kMaxVecs = 2, kRowsWide = 4, kRowsNarrow = 8;
#endif

// kTail: the tile is one vector wide, of which `tail` columns exist.
template <int kRows, int kVecs, Op op, bool kAccumulate, bool kTail, class T>
inline __attribute__((always_inline)) void tile(int64_t K, const T* A, int64_t lda, const T* B, int64_t ldb,
                                                T* C, int64_t ldc, T keep, int tail) {
  static_assert(!kTail || kVecs == 1);
  constexpr int L = kLanes<T>;
  const auto read = [tail](const T* p) {
    if constexpr (kTail) return load_partial(p, tail);
    return load(p);
  };
  vec<T> acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) {
      acc[r][c] = vec<T>{};
      if constexpr (kAccumulate) acc[r][c] = keep * read(C + r * ldc + c * L);
    }
  }
  for (int64_t k = 0; k < K; ++k) {
    vec<T> b[kVecs];
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) b[c] = read(B + k * ldb + c * L);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const vec<T> a = broadcast(op == Op::kTN ? A[k * lda + r] : A[r * lda + k]);
#pragma GCC unroll 4
      for (int c = 0; c < kVecs; ++c) acc[r][c] += a * b[c];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) {
      T* p = C + r * ldc + c * L;
      if constexpr (kTail) {
        store_partial(p, acc[r][c], tail);
      } else {
        store(p, acc[r][c]);
      }
    }
  }
}

// All rows of a panel of kVecs vectors of columns.
template <int kRows, int kVecs, Op op, bool kAccumulate, bool kTail, class T>
void panel(int64_t M, int64_t K, const T* A, int64_t lda, const T* B, int64_t ldb, T* C, int64_t ldc, T keep,
           int tail) {
  int64_t m = 0;
  for (; m + kRows <= M; m += kRows) {
    tile<kRows, kVecs, op, kAccumulate, kTail>(K, op == Op::kTN ? A + m : A + m * lda, lda, B, ldb,
                                               C + m * ldc, ldc, keep, tail);
  }
  if constexpr (kRows > 1) {
    if (m < M) {
      panel<kRows / 2, kVecs, op, kAccumulate, kTail>(M - m, K, op == Op::kTN ? A + m : A + m * lda, lda, B,
                                                      ldb, C + m * ldc, ldc, keep, tail);
    }
  }
}

template <Op op, bool kAccumulate, class T>
void columns(int64_t M, int64_t N, int64_t K, const T* A, int64_t lda, const T* B, int64_t ldb, T* C,
             int64_t ldc, T keep) {
  constexpr int L = kLanes<T>;
  int64_t n = 0;
  for (; n + kMaxVecs * L <= N; n += kMaxVecs * L) {
    panel<kRowsWide, kMaxVecs, op, kAccumulate, false>(M, K, A, lda, B + n, ldb, C + n, ldc, keep, 0);
  }
  if constexpr (kMaxVecs > 2) {
    for (; n + 2 * L <= N; n += 2 * L) {
      panel<kRowsNarrow, 2, op, kAccumulate, false>(M, K, A, lda, B + n, ldb, C + n, ldc, keep, 0);
    }
  }
  for (; n + L <= N; n += L) {
    panel<kRowsNarrow, 1, op, kAccumulate, false>(M, K, A, lda, B + n, ldb, C + n, ldc, keep, 0);
  }
  if (n < N) {
    panel<kRowsNarrow, 1, op, kAccumulate, true>(M, K, A, lda, B + n, ldb, C + n, ldc, keep, int(N - n));
  }
}

// Transposes B panel by panel into a buffer and multiplies from there.
template <bool kAccumulate, class T>
void packed_columns(int64_t M, int64_t N, int64_t K, const T* A, int64_t lda, const T* B, int64_t ldb, T* C,
                    int64_t ldc, T keep) {
  constexpr int64_t kPackN = kMaxVecs * kLanes<T>, kPackK = 128;
  alignas(kVectorBytes) T packed[kPackK * kPackN];
  for (int64_t n = 0; n < N; n += kPackN) {
    const int64_t num_cols = std::min(kPackN, N - n);
    // runs once for K = 0 too: C is then keep C, or zero
    for (int64_t k = 0; k == 0 || k < K; k += kPackK) {
      const int64_t depth = std::min(kPackK, K - k);
      transpose(num_cols, depth, B + n * ldb + k, ldb, packed, kPackN);
      if (kAccumulate || k > 0) {
        const T factor = k > 0 ? T(1) : keep;
        columns<Op::kNN, true>(M, num_cols, depth, A + k, lda, packed, kPackN, C + n, ldc, factor);
      } else {
        columns<Op::kNN, false>(M, num_cols, depth, A, lda, packed, kPackN, C + n, ldc, keep);
      }
    }
  }
}

}  // namespace gemm_detail

// C[M, N] = A B; with kAccumulate: C = keep C + A B. lda, ldb, ldc are the distances between stored rows.
template <Op op, bool kAccumulate = false, class T>
void gemm(int64_t M, int64_t N, int64_t K, const T* A, int64_t lda, const T* B, int64_t ldb, T* C,
          int64_t ldc, T keep = T(1)) {
  if constexpr (op == Op::kNT) {
    gemm_detail::packed_columns<kAccumulate>(M, N, K, A, lda, B, ldb, C, ldc, keep);
  } else {
    gemm_detail::columns<op, kAccumulate>(M, N, K, A, lda, B, ldb, C, ldc, keep);
  }
}

}  // namespace hypenet::cpu
