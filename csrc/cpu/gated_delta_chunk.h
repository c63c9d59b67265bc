// Shared by the gated delta kernels: loads and stores of tiles, the decays of a chunk, triangular products
// and solves.
//
// Notation beyond params.h: C is the chunk length, c <= C the tokens of this chunk. All tiles are in the
// accumulation type T.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../params.h"
#include "convert.h"
#include "dtype.h"
#include "gemm.h"
#include "tail.h"
#include "workspace.h"

namespace hypenet::cpu::gated_delta {

inline constexpr int64_t kMaxChunk = 32;
inline constexpr double kLowestDecay = -50;  // per token, in log space: e^-50 forgets everything

// The width of a panel: columns of V that are processed together, so that their part of the state, stored as
// contiguous rows of this width, stays in L1. A narrower panel is padded to whole vectors; padding columns
// are computed and not stored.
template <class T>
inline constexpr int64_t kPanel = 256 / sizeof(T);
template <class T>
int64_t whole_vectors(int64_t columns) {
  return (columns + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// A longer chunk reads the state less often, a shorter one does less work within the chunk.
inline int64_t chunk_length(int64_t K, int64_t V) { return K + V >= 128 ? kMaxChunk : kMaxChunk / 2; }

struct Sequence {
  int64_t batch, start, length;
};

template <class Params>
Sequence sequence(const Params& p, int64_t n) {
  if (p.cu_seqlens == nullptr) return {n, 0, p.T};
  return {0, p.cu_seqlens[n], p.cu_seqlens[n + 1] - p.cu_seqlens[n]};
}

// Offset of sequence n's state [HV, K, V] in a pool, or among the states of all sequences; negative: skip it.
template <class Params>
int64_t state_offset(const Params& p, int64_t n) {
  const int64_t slot = p.state_indices.data == nullptr ? n : index_at(p.state_indices, n);
  return slot * (p.slot_stride == 0 ? p.HV * p.K * p.V : p.slot_stride);
}

// Zeros columns [start, start + width) of a value head in a sequence's rows of o.
template <class Element, class Params>
void zero_output(const Params& p, const Sequence& seq, int64_t head, int64_t start, int64_t width) {
  Element* o = static_cast<Element*>(p.o) + ((seq.batch * p.T + seq.start) * p.HV + head) * p.V + start;
  for (int64_t t = 0; t < seq.length; ++t) std::fill_n(o + t * p.HV * p.V, width, Element(0.0f));
}

template <class Element>
inline Element* row(const View& x, int64_t b, int64_t t, int64_t head) {
  return static_cast<Element*>(x.data) + b * x.batch + t * x.token + head * x.head;
}

template <class Element, class T>
void load_rows(int64_t rows, int64_t dim, const Element* src, int64_t src_ld, T* dst, int64_t dst_ld) {
  for (int64_t i = 0; i < rows; ++i) {
    if constexpr (std::is_same_v<Element, T>) {
      std::memcpy(dst + i * dst_ld, src + i * src_ld, dim * sizeof(T));
    } else {
      convert_row(src + i * src_ld, dim, dst + i * dst_ld);
    }
  }
}

template <class Element, class T>
void store_rows(int64_t rows, int64_t dim, const T* src, int64_t src_ld, Element* dst, int64_t dst_ld) {
  load_rows<T, Element>(rows, dim, src, src_ld, dst, dst_ld);
}

// dst_i = factor_i src_i for every row i.
template <class T>
void scale_rows(int64_t rows, int64_t dim, const T* factor, const T* src, int64_t src_ld, T* dst,
                int64_t dst_ld) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < dim; ++j) dst[i * dst_ld + j] = factor[i] * src[i * src_ld + j];
  }
}

// The decays of one chunk. G, the cumulative sum of g from the start of the chunk, is in double, so that
// differences of large sums stay accurate. Every exponent is <= 0.
template <class T>
struct ChunkDecay {
  T from_start[kMaxChunk];           // gamma_i = exp(G_i)
  T to_end[kMaxChunk];               // exp(G_c - G_i)
  T between[kMaxChunk * kMaxChunk];  // Gamma_ij = exp(G_i - G_j) for j <= i, else 0; leading dimension C
  T whole;                           // exp(G_c)
  bool clamped[kMaxChunk];           // g < kLowestDecay: its gradient is 0

  void compute(int64_t c, int64_t C, const T* g, int64_t g_ld) {
    constexpr T kMasked = T(-1e4);
    double G[kMaxChunk];
    double running = 0;
    for (int64_t i = 0; i < c; ++i) {
      clamped[i] = g[i * g_ld] < T(kLowestDecay);
      running += clamped[i] ? kLowestDecay : double(g[i * g_ld]);
      G[i] = running;
    }
    for (int64_t i = 0; i < c; ++i) {
      from_start[i] = T(G[i]);
      to_end[i] = T(G[c - 1] - G[i]);
      for (int64_t j = 0; j <= i; ++j) between[i * C + j] = T(G[i] - G[j]);
      for (int64_t j = i + 1; j < C; ++j) between[i * C + j] = kMasked;
    }
    exp_in_place(from_start, c);
    exp_in_place(to_end, c);
    exp_in_place(between, c * C);
    whole = from_start[c - 1];
  }
};

// Rows per block of a triangular product; the part of a block row right of its diagonal block is skipped.
inline constexpr int64_t kTriangleRows = 16;

// Y = start + L X for a lower-triangular L [c, c].
template <class Start, class Factor, class T>
void add_lower_product(Start start, int64_t c, int64_t dim, const Factor* L, int64_t L_ld, const Factor* X,
                       int64_t X_ld, T* Y, int64_t Y_ld) {
  for (int64_t i = 0; i < c; i += kTriangleRows) {
    const int64_t rows = std::min(kTriangleRows, c - i);
    gemm_from<Op::kNN>(start.at(i, 0), rows, dim, packed<Factor>(i + rows), L + i * L_ld, L_ld, X, X_ld,
                       Y + i * Y_ld, Y_ld);
  }
}

// Y = start + L^T X for a lower-triangular L [c, c].
template <class Start, class T>
void add_lower_transposed_product(Start start, int64_t c, int64_t dim, const T* L, int64_t L_ld, const T* X,
                                  int64_t X_ld, T* Y, int64_t Y_ld) {
  for (int64_t i = 0; i < c; i += kTriangleRows) {
    const int64_t rows = std::min(kTriangleRows, c - i);
    gemm_from<Op::kTN>(start.at(i, 0), rows, dim, c - i, L + i * L_ld + i, L_ld, X + i * X_ld, X_ld,
                       Y + i * Y_ld, Y_ld);
  }
}

template <class T>
void add_scaled_row(int64_t dim, T factor, const T* x, T* y) {
  for (int64_t j = 0; j < dim; ++j) y[j] += factor * x[j];
}

// x . y, in four vector accumulators that are added at the end.
template <class T>
T dot(int64_t dim, const T* x, const T* y) {
  constexpr int L = kLanes<T>;
  vec<T> total[4] = {};
  int64_t j = 0;
  for (; j + 4 * L <= dim; j += 4 * L) {
    for (int i = 0; i < 4; ++i) total[i] += load(x + j + i * L) * load(y + j + i * L);
  }
  for (; j < dim; j += L) {
    const Lanes<T> lanes(dim - j);
    total[0] += lanes.read(x + j) * lanes.read(y + j);
  }
  return sum<T>((total[0] + total[1]) + (total[2] + total[3]));
}

// Rows solved one by one; the contribution of all other rows to them is a matrix product.
inline constexpr int64_t kSolveRows = 4;

// X := (I + A)^-1 X by forward substitution. Only the entries of minus_A [c, c] below the diagonal are read.
template <class T>
void solve_unit_lower(int64_t c, int64_t dim, const T* minus_A, int64_t A_ld, T* X, int64_t X_ld) {
  for (int64_t start = 0; start < c; start += kSolveRows) {
    const int64_t stop = std::min(start + kSolveRows, c);
    const T* block = minus_A + start * A_ld;
    if (start > 0)
      gemm<Op::kNN, true>(stop - start, dim, start, block, A_ld, X, X_ld, X + start * X_ld, X_ld);
    for (int64_t i = start + 1; i < stop; ++i) {
      for (int64_t j = start; j < i; ++j)
        add_scaled_row(dim, minus_A[i * A_ld + j], X + j * X_ld, X + i * X_ld);
    }
  }
}

// X := (I + A)^-T X by backward substitution.
template <class T>
void solve_unit_lower_transposed(int64_t c, int64_t dim, const T* minus_A, int64_t A_ld, T* X, int64_t X_ld) {
  for (int64_t start = (c - 1) / kSolveRows * kSolveRows; start >= 0; start -= kSolveRows) {
    const int64_t stop = std::min(start + kSolveRows, c);
    if (stop < c) {
      gemm<Op::kTN, true>(stop - start, dim, c - stop, minus_A + stop * A_ld + start, A_ld, X + stop * X_ld,
                          X_ld, X + start * X_ld, X_ld);
    }
    for (int64_t i = stop - 2; i >= start; --i) {
      for (int64_t j = i + 1; j < stop; ++j)
        add_scaled_row(dim, minus_A[j * A_ld + i], X + j * X_ld, X + i * X_ld);
    }
  }
}

// minus_A = -stril(diag(beta) KK . Gamma); KK and Gamma [c, C]. The other entries are not written and never
// read.
template <class T>
void form_system(int64_t c, int64_t C, const T* beta, const T* KK, const ChunkDecay<T>& decay, T* minus_A) {
  for (int64_t i = 1; i < c; ++i) {
    for (int64_t j = 0; j < i; ++j) minus_A[i * C + j] = -beta[i] * KK[i * C + j] * decay.between[i * C + j];
  }
}

// R = V - gamma Z, in place of V, and E = beta R, the right-hand side of the solve.
template <class T>
void form_residual(int64_t c, int64_t dim, const T* beta, const ChunkDecay<T>& decay, const T* Z,
                   int64_t Z_ld, T* R, T* E, int64_t ld) {
  for (int64_t i = 0; i < c; ++i) {
    for (int64_t j = 0; j < dim; ++j) {
      const T r = R[i * ld + j] - decay.from_start[i] * Z[i * Z_ld + j];
      R[i * ld + j] = r;
      E[i * ld + j] = beta[i] * r;
    }
  }
}

// The split of the columns of V into blocks when there are fewer heads than threads. Blocks are whole
// vectors, so that only the last one has a tail.
struct ColumnSplit {
  int64_t blocks, columns, tasks;
};

template <class T>
ColumnSplit split_columns(int64_t heads, int64_t V, int64_t num_threads) {
  constexpr int64_t kFewest = 2 * kLanes<T>;
  const int64_t wanted = heads == 0 ? 1 : (num_threads + heads - 1) / heads;
  const int64_t per_block = (V + wanted - 1) / wanted;
  const int64_t columns = std::max(kFewest, (per_block + kLanes<T> - 1) / kLanes<T> * kLanes<T>);
  const int64_t blocks = std::max<int64_t>(1, (V + columns - 1) / columns);
  return {blocks, columns, heads * blocks};
}

// The address at which to store the state after the first `tokens` tokens of a sequence, from column `start`
// of a value head on; null if no checkpoint is due.
template <class T>
T* checkpoint(const GatedDeltaFwdParams& p, const Sequence& seq, int64_t head, int64_t start,
              int64_t tokens) {
  static_assert(64 % kMaxChunk == 0);  // checkpoints are at ends of chunks
  const int64_t every = p.checkpoint_every;
  if (every == 0 || tokens % every != 0) return nullptr;
  const int64_t row = seq.batch * (p.T / every) + seq.start / every + tokens / every - 1;
  return static_cast<T*>(p.checkpoints) + (row * p.HV + head) * p.K * p.V + start;
}

}  // namespace hypenet::cpu::gated_delta
