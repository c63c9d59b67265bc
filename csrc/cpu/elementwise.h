// Loops over rows of elements in vectors of the accumulation type, for kernels that are bound by memory.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "convert.h"
#include "dtype.h"
#include "simd.h"

namespace hypenet::cpu {

// The first n lanes of a vector from memory, the others 0; and to memory.
template <class T, class Element>
HYPENET_INLINE vec<T> read(const Element* x, int64_t n) {
  return n == kLanes<T> ? load_as<T>(x) : load_partial_as<T>(x, int(n));
}

// Rounds to nearest even. The instruction takes subnormal numbers for 0.
HYPENET_INLINE void narrow_vector(vec<float> x, bfloat16* y) {
#if defined(__AVX512BF16__)
  const __m256bh halves = _mm512_cvtneps_pbh((__m512)x);
#else
  typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
  const Words words = std::bit_cast<Words>(x), quiet = words | 0x400000u;
  const Words rounded = words + 0x7fffu + ((words >> 16) & 1u);
  const Halves halves = __builtin_convertvector((x == x ? rounded : quiet) >> 16, Halves);
#endif
  std::memcpy(y, &halves, sizeof(halves));
}

HYPENET_INLINE void narrow_vector(vec<float> x, float16* y) {
#if HYPENET_F16C
  narrow(x, y);
#else
  for (int i = 0; i < kLanes<float>; ++i) y[i] = float16(x[i]);
#endif
}

template <class T, class Element>
HYPENET_INLINE void write(Element* y, vec<T> x, int64_t n) {
  if constexpr (std::is_same_v<T, Element>) {
    n == kLanes<T> ? store(y, x) : store_partial(y, x, int(n));
  } else if (n == kLanes<T>) {
    narrow_vector(x, y);
  } else {
    Element whole[kLanes<T>];
    narrow_vector(x, whole);
    std::copy_n(whole, n, y);
  }
}

// body(j, n) for every vector [j, j + n) of a row.
template <class T, class Body>
HYPENET_INLINE void for_vectors(int64_t D, const Body& body) {
  int64_t j = 0;
  for (; j + kLanes<T> <= D; j += kLanes<T>) body(j, int64_t{kLanes<T>});
  if (j < D) body(j, D - j);
}

// The exponent is never positive.
template <class T>
HYPENET_INLINE vec<T> sigmoid(vec<T> x) {
  const vec<T> e = exp<T>(x < 0 ? x : -x);
  return (x < 0 ? e : broadcast(T(1))) / (e + 1);
}

// y[i] = sigmoid(x[i]) for i < n; y may be x.
template <class T>
void sigmoid_row(const T* x, int64_t n, T* y) {
  for_vectors<T>(
      n, [&](int64_t j, int64_t count) { write<T>(y + j, sigmoid<T>(read<T>(x + j, count)), count); });
}

}  // namespace hypenet::cpu
