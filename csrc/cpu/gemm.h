// Small row-major matrix products: C[M, N] = A B, or A B added to a matrix. Every element of C is summed over
// k in ascending order in one register, so its value does not depend on how rows or columns are tiled or
// split. No allocation, no packing. A and B have one type, C's or pairs of bfloat16 (pairs.h); K counts
// stored factors, so a pair counts once.
#pragma once

#include <cstdint>
#include <type_traits>

#include "pairs.h"
#include "simd.h"

namespace hypenet::cpu {

enum class Op { kNN, kTN };  // kTN: A is stored [K, M]

// The initial value of the sums of a product: zero, a matrix times `factor`, or a matrix with a factor per
// row. AddedLast starts from zero and adds the matrix at the end: over many accumulated products, rounding
// errors then grow with the number of products instead of the number of terms.
struct FromZero {
  FromZero at(int64_t, int64_t) const { return *this; }
};
template <class T>
struct FromScaled {
  const T* from;
  int64_t ld;
  T factor;
  FromScaled at(int64_t row, int64_t column) const { return {from + row * ld + column, ld, factor}; }
  T of_row(int) const { return factor; }
};
template <class T>
struct FromScaledRows {
  const T* from;
  int64_t ld;
  const T* factor;  // [M]
  FromScaledRows at(int64_t row, int64_t column) const {
    return {from + row * ld + column, ld, factor + row};
  }
  T of_row(int row) const { return factor[row]; }
};
template <class T>
struct AddedLast {
  const T* from;
  int64_t ld;
  AddedLast at(int64_t row, int64_t column) const { return {from + row * ld + column, ld}; }
};

namespace gemm_detail {

// The register tile: rows x vectors of accumulators, one row of B, one broadcast element of A.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kMaxVecs = 4;
#else
inline constexpr int kMaxVecs = 2;
#endif
#if defined(__FMA__) || defined(__aarch64__)
inline constexpr int kRowsOfWidest = 6;
#else
inline constexpr int kRowsOfWidest = 4;  // leaves a register for the product of the multiply
#endif
constexpr int rows_of_tile(int vecs, Op op) {
  if (vecs < kMaxVecs) return 8;
  return op == Op::kTN && kMaxVecs == 4 ? 4 : kRowsOfWidest;
}
constexpr int next_fewer_rows(int rows) { return rows == 6 ? 4 : rows / 2; }

// kTail: the tile is one vector wide, of which only `tail` columns exist.
template <int kRows, int kVecs, Op op, bool kTail, class Start, class Factor, class T>
HYPENET_INLINE void tile(int64_t K, const Factor* A, int64_t lda, const Factor* B, int64_t ldb, T* C,
                         int64_t ldc, Start start, int tail) {
  static_assert((!kTail || kVecs == 1) && sizeof(Factor) == sizeof(T));
  constexpr int L = kLanes<T>;
  const auto read = [tail](const auto* p) {
    if constexpr (kTail) return load_partial(p, tail);
    return load(p);
  };
  vec<T> acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) {
      acc[r][c] = vec<T>{};
      if constexpr (requires { start.of_row(r); })
        acc[r][c] = start.of_row(r) * read(start.from + r * start.ld + c * L);
    }
  }
  for (int64_t k = 0; k < K; ++k) {
    vec<Factor> b[kVecs];
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) b[c] = read(B + k * ldb + c * L);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const vec<Factor> a = broadcast(op == Op::kTN ? A[k * lda + r] : A[r * lda + k]);
#pragma GCC unroll 4
      for (int c = 0; c < kVecs; ++c) acc[r][c] = multiply_add<Factor, T>(a, b[c], acc[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) {
      T* p = C + r * ldc + c * L;
      if constexpr (std::is_same_v<Start, AddedLast<T>>) acc[r][c] += read(start.from + r * start.ld + c * L);
      if constexpr (kTail) {
        store_partial(p, acc[r][c], tail);
      } else {
        store(p, acc[r][c]);
      }
    }
  }
}

// All rows of a panel of kVecs vectors of columns.
template <int kRows, int kVecs, Op op, bool kTail, class Start, class Factor, class T>
void panel(int64_t M, int64_t K, const Factor* A, int64_t lda, const Factor* B, int64_t ldb, T* C,
           int64_t ldc, Start start, int tail) {
  const auto rows_from = [=](int64_t m) { return op == Op::kTN ? A + m : A + m * lda; };
  int64_t m = 0;
  for (; m + kRows <= M; m += kRows) {
    tile<kRows, kVecs, op, kTail>(K, rows_from(m), lda, B, ldb, C + m * ldc, ldc, start.at(m, 0), tail);
  }
  if constexpr (kRows > 1) {
    if (m < M) {
      panel<next_fewer_rows(kRows), kVecs, op, kTail>(M - m, K, rows_from(m), lda, B, ldb, C + m * ldc, ldc,
                                                      start.at(m, 0), tail);
    }
  }
}

// All columns: panels of kVecs vectors, then of half as many, and so on.
template <int kVecs, Op op, class Start, class Factor, class T>
void columns(int64_t M, int64_t N, int64_t K, const Factor* A, int64_t lda, const Factor* B, int64_t ldb,
             T* C, int64_t ldc, Start start) {
  constexpr int kRows = rows_of_tile(kVecs, op), kWidth = kVecs * kLanes<T>;
  int64_t n = 0;
  for (; n + kWidth <= N; n += kWidth) {
    panel<kRows, kVecs, op, false>(M, K, A, lda, B + n, ldb, C + n, ldc, start.at(0, n), 0);
  }
  if (n == N) return;
  if constexpr (kVecs > 1) {
    columns<kVecs / 2, op>(M, N - n, K, A, lda, B + n, ldb, C + n, ldc, start.at(0, n));
  } else {
    panel<kRows, 1, op, true>(M, K, A, lda, B + n, ldb, C + n, ldc, start.at(0, n), int(N - n));
  }
}

}  // namespace gemm_detail

// C[M, N] = start + A B. lda, ldb and ldc are leading dimensions. `start` may refer to C.
template <Op op, class Start, class Factor, class T>
void gemm_from(Start start, int64_t M, int64_t N, int64_t K, const Factor* A, int64_t lda, const Factor* B,
               int64_t ldb, T* C, int64_t ldc) {
  gemm_detail::columns<gemm_detail::kMaxVecs, op>(M, N, K, A, lda, B, ldb, C, ldc, start);
}

// C[M, N] = A B; with kAccumulate: C = keep C + A B.
template <Op op, bool kAccumulate = false, class Factor, class T>
void gemm(int64_t M, int64_t N, int64_t K, const Factor* A, int64_t lda, const Factor* B, int64_t ldb, T* C,
          int64_t ldc, std::type_identity_t<T> keep = 1) {
  if constexpr (kAccumulate) {
    gemm_from<op>(FromScaled<T>{C, ldc, keep}, M, N, K, A, lda, B, ldb, C, ldc);
  } else {
    gemm_from<op>(FromZero{}, M, N, K, A, lda, B, ldb, C, ldc);
  }
}

}  // namespace hypenet::cpu
