// Vectors as wide as the instruction set that this file is compiled for, in the compilers' vector extension,
// and what the kernels need beyond + and *: partial loads, exp, sums, a transpose.
#pragma once

#include <cstdint>
#include <cstring>

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
  typedef int32_t bits __attribute__((vector_size(kVectorBytes)));
  static constexpr int kMantissa = 23;
  static constexpr int kExpDegree = 7;             // first Taylor term left out: (ln2 / 2)^8 / 8! < 2^-27
  static constexpr float kExpLowest = -87.3f;      // below, the result is not a normal number and becomes 0
  static constexpr float kRound = 12582912.0f;     // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLn2High = 0.693359375f;  // short enough that n * kLn2High is exact
  static constexpr float kLn2Low = -2.12194440e-4f;
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t bits __attribute__((vector_size(kVectorBytes)));
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

// The first n lanes, 0 < n < kLanes<T>; memory behind them is not touched, the other lanes read as zero.
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

template <class T>
inline T sum(vec<T> v) {
  T lanes[kLanes<T>];
  std::memcpy(lanes, &v, sizeof(v));
  for (int width = kLanes<T> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// e^x for x <= 88 (float) or 709 (double); 0 where it would not be a normal number, NaN stays NaN.
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

// One value, by the same arithmetic as the vectors.
template <class T>
inline T exp_scalar(T x) {
  return exp<T>(broadcast(x))[0];
}

// dst[j, i] = src[i, j] for i < rows, j < cols; row-major, leading dimensions in elements.
template <class T>
inline void transpose(int64_t rows, int64_t cols, const T* src, int64_t src_ld, T* dst, int64_t dst_ld) {
  int64_t i = 0;
  if constexpr (sizeof(T) == 4) {
    typedef float quad __attribute__((vector_size(16)));
    for (; i + 4 <= rows; i += 4) {
      int64_t j = 0;
      for (; j + 4 <= cols; j += 4) {
        quad a[4], b[4];
        for (int r = 0; r < 4; ++r) std::memcpy(&a[r], src + (i + r) * src_ld + j, sizeof(quad));
        b[0] = __builtin_shufflevector(a[0], a[1], 0, 4, 1, 5);
        b[1] = __builtin_shufflevector(a[2], a[3], 0, 4, 1, 5);
        b[2] = __builtin_shufflevector(a[0], a[1], 2, 6, 3, 7);
        b[3] = __builtin_shufflevector(a[2], a[3], 2, 6, 3, 7);
        a[0] = __builtin_shufflevector(b[0], b[1], 0, 1, 4, 5);
        a[1] = __builtin_shufflevector(b[0], b[1], 2, 3, 6, 7);
        a[2] = __builtin_shufflevector(b[2], b[3], 0, 1, 4, 5);
        a[3] = __builtin_shufflevector(b[2], b[3], 2, 3, 6, 7);
        for (int r = 0; r < 4; ++r) std::memcpy(dst + (j + r) * dst_ld + i, &a[r], sizeof(quad));
      }
      for (; j < cols; ++j) {
        for (int r = 0; r < 4; ++r) dst[j * dst_ld + i + r] = src[(i + r) * src_ld + j];
      }
    }
  }
  for (; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) dst[j * dst_ld + i] = src[i * src_ld + j];
  }
}

}  // namespace hypenet::cpu
