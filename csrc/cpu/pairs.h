// The operands of matrix products ("factors"): elements in the accumulation type or, with AVX512-BF16, pairs
// of bfloat16. Its instruction multiplies two pairs and adds first * first + second * second to a float, so a
// matrix of pairs is half as long in the dimension that is summed over.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "convert.h"
#include "dtype.h"
#include "simd.h"

namespace hypenet::cpu {

#if defined(__AVX512BF16__)

struct BFloat16Pair {
  bfloat16 first, second;
};
template <>
struct Vector<BFloat16Pair> {
  typedef uint32_t type __attribute__((vector_size(kVectorBytes)));
};
inline vec<BFloat16Pair> broadcast(BFloat16Pair x) {
  return std::bit_cast<uint32_t>(x) - vec<BFloat16Pair>{};
}

template <class Element>
using factor_t = std::conditional_t<std::is_same_v<Element, bfloat16>, BFloat16Pair, acc_t<Element>>;
template <class Factor>
inline constexpr int64_t kPacked = std::is_same_v<Factor, BFloat16Pair> ? 2 : 1;
template <class Factor>
using packed_t = std::conditional_t<kPacked<Factor> == 2, bfloat16, Factor>;  // the element type of a factor

#else

template <class Element>
using factor_t = acc_t<Element>;
template <class Factor>
inline constexpr int64_t kPacked = 1;
template <class Factor>
using packed_t = Factor;

#endif

// The number of factors that hold n elements.
template <class Factor>
constexpr int64_t packed(int64_t n) {
  return (n + kPacked<Factor> - 1) / kPacked<Factor>;
}

// sum + a b, lane by lane. Products of bfloat16 treat subnormal numbers as zero.
template <class Factor, class Acc>
HYPENET_INLINE vec<Acc> multiply_add(vec<Factor> a, vec<Factor> b, vec<Acc> sum) {
  if constexpr (kPacked<Factor> == 1) {
    return sum + a * b;
  } else {
#if defined(__AVX512BF16__)
    return (vec<Acc>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
  }
}

// Packs kPacked vectors, consecutive rows in the dimension that is summed over, into one vector of factors.
template <class Factor, class Acc>
HYPENET_INLINE vec<Factor> pack(const vec<Acc> (&x)[kPacked<Factor>]) {
  if constexpr (kPacked<Factor> == 1) {
    return x[0];
  } else {
#if defined(__AVX512BF16__)
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                                23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]);
    return (vec<Factor>)_mm512_permutexvar_epi16(interleave, halves);
#endif
  }
}

// Stores a vector as factors, adjacent lanes packed together.
template <class Factor, class Acc>
HYPENET_INLINE void store_packed(Factor* y, vec<Acc> x) {
  if constexpr (kPacked<Factor> == 1) {
    store(y, x);
  } else {
#if defined(__AVX512BF16__)
    const __m256bh halves = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(y, &halves, sizeof(halves));
#endif
  }
}

// Returns x [rows, columns], whole vectors wide, as factors [packed(rows), columns] of a product that sums
// over rows: x itself, or a copy in `buffer`. Both have the leading dimension ld.
template <class Factor, class Acc>
const Factor* as_factors(int64_t rows, int64_t columns, const Acc* x, int64_t ld,
                         [[maybe_unused]] Factor* buffer) {
  if constexpr (kPacked<Factor> == 1) {
    return x;
  } else {
    for (int64_t i = 0; i < rows; i += 2) {
      for (int64_t j = 0; j < columns; j += kLanes<Acc>) {
        const vec<Acc> both[2] = {load(x + i * ld + j),
                                  i + 1 < rows ? load(x + (i + 1) * ld + j) : vec<Acc>{}};
        store(buffer + i / 2 * ld + j, pack<Factor, Acc>(both));
      }
    }
    return buffer;
  }
}

// y [packed(n)]: the n elements of x, adjacent ones packed together; an odd one at the end is paired with
// zero.
template <class Element, class Factor>
void pack_row(const Element* x, int64_t n, Factor* y) {
  if constexpr (kPacked<Factor> == 1) {
    convert_row(x, n, y);
  } else {
    std::memcpy(y, x, n / 2 * sizeof(Factor));
    if (n % 2 != 0) y[n / 2] = {x[n - 1], bfloat16(0.0f)};
  }
}

// y [n]: kPacked rows, column by column; `next` is null if there is no second row, which then is zero.
template <class Element, class Factor>
void pack_columns(const Element* x, [[maybe_unused]] const Element* next, int64_t n, Factor* y) {
  if constexpr (kPacked<Factor> == 1) {
    convert_row(x, n, y);
  } else if (next == nullptr) {
    for (int64_t i = 0; i < n; ++i) y[i] = {x[i], bfloat16(0.0f)};
  } else {
    for (int64_t i = 0; i < n; ++i) y[i] = {x[i], next[i]};
  }
}

}  // namespace hypenet::cpu
