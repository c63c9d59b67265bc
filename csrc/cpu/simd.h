// SIMD vectors of the width of the instruction set that the file is compiled for (GCC's vector extension),
// with the operations that the kernels need beyond + and *: partial loads and stores, exp, horizontal sums,
// transposes.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace hypenet::cpu {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class T>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t bits __attribute__((vector_size(kVectorBytes)));
  static constexpr int kMantissa = 23;
  static constexpr int kExpDegree = 7;             // first omitted Taylor term: (ln2 / 2)^8 / 8! < 2^-27
  static constexpr float kExpLowest = -87.3f;      // below, the result is not a normal number and becomes 0
  static constexpr float kRound = 12582912.0f;     // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLn2High = 0.693359375f;  // short enough that n * kLn2High is exact
  static constexpr float kLn2Low = -2.12194440e-4f;
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t bits __attribute__((vector_size(kVectorBytes)));
  static constexpr int kMantissa = 52;
  static constexpr int kExpDegree = 13;
  static constexpr double kExpLowest = -708.0;
  static constexpr double kRound = 6755399441055744.0;
  static constexpr double kLn2High = 0.69314718036912381649;
  static constexpr double kLn2Low = 1.9082149292705877000e-10;
};

template <class T>
using vec = typename Vector<T>::type;
template <class T>
inline constexpr int kLanes = kVectorBytes / sizeof(T);

// For functions that must be inlined: compilers drop calls to a function that only prefetches.
#define HYPENET_INLINE inline __attribute__((always_inline))

// Prefetches n elements at x into L2.
template <bool kWrite, class Element>
HYPENET_INLINE void prefetch_row(const Element* x, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(Element);
  for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(x + i, kWrite, 2);
}

template <class T>
inline vec<T> load(const T* p) {
  vec<T> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
inline void store(T* p, vec<T> v) {
  std::memcpy(p, &v, sizeof(v));
}

template <class T>
inline vec<T> broadcast(T x) {
  return x - vec<T>{};  // x + 0 would be an addition: it is not x for -0
}

// Loads the first n lanes, 0 < n < kLanes<T>, and zeros the others; does not touch the memory past them.
template <class T>
inline vec<T> load_partial(const T* p, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (vec<T>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
  if constexpr (sizeof(T) == 8) return (vec<T>)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
#else
  vec<T> v{};
  std::memcpy(&v, p, n * sizeof(T));
  return v;
#endif
}

template <class T>
inline void store_partial(T* p, vec<T> v, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
  if constexpr (sizeof(T) == 8) _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
#else
  std::memcpy(p, &v, n * sizeof(T));
#endif
}

// A whole vector, or the lanes that remain at the end of a row: the others read as zero and are not written.
template <class T>
struct Lanes {
  int count;
  explicit Lanes(int64_t left) : count(int(left < kLanes<T> ? left : kLanes<T>)) {}
  vec<T> read(const T* p) const { return count == kLanes<T> ? load(p) : load_partial(p, count); }
  void write(T* p, vec<T> v) const {
    if (count == kLanes<T>) return store(p, v);
    store_partial(p, v, count);
  }
};

template <class T>
inline T sum(vec<T> v) {
  T lanes[kLanes<T>];
  std::memcpy(lanes, &v, sizeof(v));
  for (int width = kLanes<T> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// e^x for x <= 88 (float) or 709 (double); 0 where the result would not be a normal number; NaN for NaN.
// x = n ln2 + r with |r| <= ln2 / 2, a Taylor series for e^r, and n added to the exponent bits.
template <class T>
inline vec<T> exp(vec<T> x) {
  using V = Vector<T>;
  const vec<T> lowest = broadcast(V::kExpLowest);
  const vec<T> bounded = x < lowest ? lowest : x;
  const vec<T> shifted = bounded * T(1.44269504088896340736) + V::kRound;
  const vec<T> n = shifted - V::kRound;
  const vec<T> r = (bounded - n * V::kLn2High) - n * V::kLn2Low;
  double factorial[V::kExpDegree + 1] = {1};
  for (int i = 1; i <= V::kExpDegree; ++i) factorial[i] = factorial[i - 1] * i;
  vec<T> series = broadcast(T(1 / factorial[V::kExpDegree]));
#pragma GCC unroll 16
  for (int i = V::kExpDegree - 1; i >= 0; --i) series = series * r + T(1 / factorial[i]);
  typename V::bits series_bits, n_bits;
  std::memcpy(&series_bits, &series, sizeof(series));
  std::memcpy(&n_bits, &shifted, sizeof(shifted));
  const typename V::bits result_bits = series_bits + (n_bits << V::kMantissa);
  vec<T> result;
  std::memcpy(&result, &result_bits, sizeof(result));
  result = x < lowest ? vec<T>{} : result;
  return x == x ? result : x;
}

template <class T>
inline void exp_in_place(T* x, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) store(x + i, exp<T>(load(x + i)));
  if (i < n) store_partial(x + i, exp<T>(load_partial(x + i, int(n - i))), int(n - i));
}

// exp of one value, with the same arithmetic as the vector form.
template <class T>
inline T exp_scalar(T x) {
  return exp<T>(broadcast(x))[0];
}

// Concatenates the quads at p, p + step, p + 2 step, ... in one vector, with their bits taken as floats.
template <int kQuads, class T>
inline auto gather_quads(const T* p, int64_t step) {
  static_assert(sizeof(T) == sizeof(float));
  typedef float Wide __attribute__((vector_size(16 * kQuads)));
  if constexpr (kQuads == 1) {
    Wide quad;
    std::memcpy(&quad, p, sizeof(quad));
    return quad;
  } else {
    const auto low = gather_quads<kQuads / 2>(p, step);
    const auto high = gather_quads<kQuads / 2>(p + kQuads / 2 * step, step);
    return [&]<int... i>(std::integer_sequence<int, i...>) -> Wide {
      return __builtin_shufflevector(low, high, i...);
    }(std::make_integer_sequence<int, 4 * kQuads>());
  }
}

// For every quad of lanes: a[first], b[first], a[first + 1], b[first + 1].
template <int first, class Wide>
inline Wide interleave_quads(Wide a, Wide b) {
  constexpr int kWide = sizeof(Wide) / sizeof(a[0]);
  return [&]<int... i>(std::integer_sequence<int, i...>) -> Wide {
    return __builtin_shufflevector(a, b, (i % 2 * kWide + i / 4 * 4 + i % 4 / 2 + first)...);
  }(std::make_integer_sequence<int, kWide>());
}

// For every quad of lanes: a[first], a[first + 1], b[first], b[first + 1].
template <int first, class Wide>
inline Wide join_quads(Wide a, Wide b) {
  constexpr int kWide = sizeof(Wide) / sizeof(a[0]);
  return [&]<int... i>(std::integer_sequence<int, i...>) -> Wide {
    return __builtin_shufflevector(a, b, (i % 4 / 2 * kWide + i / 4 * 4 + i % 2 + first)...);
  }(std::make_integer_sequence<int, kWide>());
}

// Transposes four columns of kLanes<float> rows into four vectors.
template <class T>
inline void transpose_four_columns(const T* src, int64_t src_ld, T* dst, int64_t dst_ld) {
  constexpr int kQuads = kLanes<float> / 4;
  vec<float> row[4];
  for (int r = 0; r < 4; ++r) row[r] = gather_quads<kQuads>(src + r * src_ld, 4 * src_ld);
  const vec<float> a = interleave_quads<0>(row[0], row[1]), b = interleave_quads<0>(row[2], row[3]);
  const vec<float> c = interleave_quads<2>(row[0], row[1]), d = interleave_quads<2>(row[2], row[3]);
  store(dst, (vec<T>)join_quads<0>(a, b));
  store(dst + dst_ld, (vec<T>)join_quads<2>(a, b));
  store(dst + 2 * dst_ld, (vec<T>)join_quads<0>(c, d));
  store(dst + 3 * dst_ld, (vec<T>)join_quads<2>(c, d));
}

// dst[j, i] = src[i, j] for i < rows, j < cols; row-major, leading dimensions in elements.
template <class T>
inline void transpose(int64_t rows, int64_t cols, const T* src, int64_t src_ld, T* dst, int64_t dst_ld) {
  int64_t i = 0;
  if constexpr (sizeof(T) == 4) {
    for (; i + kLanes<T> <= rows; i += kLanes<T>) {
      int64_t j = 0;
      for (; j + 4 <= cols; j += 4)
        transpose_four_columns(src + i * src_ld + j, src_ld, dst + j * dst_ld + i, dst_ld);
      for (; j < cols; ++j) {
        for (int r = 0; r < kLanes<T>; ++r) dst[j * dst_ld + i + r] = src[(i + r) * src_ld + j];
      }
    }
  }
  for (; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) dst[j * dst_ld + i] = src[i * src_ld + j];
  }
}

}  // namespace hypenet::cpu
