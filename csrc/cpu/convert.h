// Conversions between the element type in memory and the accumulation type, of vectors and of rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "dtype.h"
#include "simd.h"

namespace hypenet::cpu {

// The masked intrinsics are used because the others start from an undefined register, and g++ 12 warns about
// it.
#if defined(__AVX512F__)
#define HYPENET_F16C 1
inline vec<float> widen(const float16* x) {
  return (vec<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
inline void narrow(vec<float> x, float16* y) {
  _mm256_storeu_si256(
      reinterpret_cast<__m256i*>(y),
      _mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__AVX2__) && defined(__F16C__)
#define HYPENET_F16C 1
inline vec<float> widen(const float16* x) {
  return (vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
inline void narrow(vec<float> x, float16* y) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(y), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}
#else
#define HYPENET_F16C 0
inline vec<float> widen(const float16* x) {
  float y[kLanes<float>];
  for (int i = 0; i < kLanes<float>; ++i) y[i] = static_cast<float>(x[i]);
  return load(y);
}
#endif

// Loads kLanes<Acc> elements as the accumulation type.
template <class Acc, class Element>
inline vec<Acc> load_as(const Element* x) {
  if constexpr (std::is_same_v<Acc, Element>) {
    return load(x);
  } else if constexpr (std::is_same_v<Element, float16>) {
    return widen(x);
  } else {
    static_assert(std::is_same_v<Element, bfloat16> && std::is_same_v<Acc, float>);
    typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
    typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
    Halves halves;
    std::memcpy(&halves, x, sizeof(halves));
    const Words words = __builtin_convertvector(halves, Words) << 16;
    vec<Acc> y;
    std::memcpy(&y, &words, sizeof(y));
    return y;
  }
}

// Loads the first n elements, 0 < n < kLanes<Acc>; the other lanes are zero.
template <class Acc, class Element>
inline vec<Acc> load_partial_as(const Element* x, int n) {
  if constexpr (std::is_same_v<Acc, Element>) {
    return load_partial(x, n);
  } else {
    Element padded[kLanes<Acc>] = {};
    std::copy_n(x, n, padded);
    return load_as<Acc>(padded);
  }
}

// y[i] = x[i] for i < n, converted between the two types.
template <class From, class To>
inline void convert_row(const From* x, int64_t n, To* y) {
  int64_t i = 0;
#if HYPENET_F16C
  if constexpr (std::is_same_v<From, float16>) {
    for (; i + kLanes<float> <= n; i += kLanes<float>) store(y + i, widen(x + i));
  } else if constexpr (std::is_same_v<To, float16>) {
    for (; i + kLanes<float> <= n; i += kLanes<float>) narrow(load(x + i), y + i);
  }
#endif
  for (; i < n; ++i) y[i] = static_cast<To>(x[i]);
}

}  // namespace hypenet::cpu
