// Products of tensor cores, with the arithmetic of those of sm_80: the coarsest, and so a bound for sm_90, which keeps
// more bits.
#pragma once

#include <algorithm>
#include <cstdint>

#include "types.h"

namespace hypenet::emu {

template <class Element>
void widen_pair(uint32_t pair, float& low, float& high) {
  low = widen(Element{static_cast<uint16_t>(pair)});
  high = widen(Element{static_cast<uint16_t>(pair >> 16)});
}

// Summands are truncated this many bits past the last bit of the largest, and the sum is rounded towards zero.
constexpr int kGuardBits = 1;

inline float towards_zero(double x) {
  const auto nearest = static_cast<float>(x);
  return std::isfinite(nearest) && std::abs(nearest) > std::abs(x) ? std::nextafter(nearest, 0.0f) : nearest;
}

// The bits of |x|, which order like |x|; infinity and NaN are the largest.
inline int32_t magnitude(float x) { return std::bit_cast<int32_t>(x) & 0x7fffffff; }

// d += the sum of terms [kTerms][8], column by column. A term is a product of 16-bit or tf32 numbers: exact.
template <int kTerms>
void add_products(float (&d)[8], const float (&terms)[kTerms][8]) {
  constexpr int32_t kSmall = std::bit_cast<int32_t>(0x1p-80f), kLarge = std::bit_cast<int32_t>(0x1p80f);
  int32_t largest[8];
  for (int n = 0; n < 8; ++n) largest[n] = magnitude(d[n]);
  for (int i = 0; i < kTerms; ++i) {
    for (int n = 0; n < 8; ++n) largest[n] = std::max(largest[n], magnitude(terms[i][n]));
  }
  if (*std::min_element(largest, largest + 8) > kSmall && *std::max_element(largest, largest + 8) < kLarge) {
    float per_unit[8];  // units of a summand's last bit in one
    int32_t sums[8];
    for (int n = 0; n < 8; ++n) {
      const int32_t inverse_power = (254 << 23) - (largest[n] & 0x7f800000);
      per_unit[n] = std::bit_cast<float>(inverse_power) * (1 << (23 + kGuardBits));
      sums[n] = static_cast<int32_t>(d[n] * per_unit[n]);
    }
    for (int i = 0; i < kTerms; ++i) {
      for (int n = 0; n < 8; ++n) sums[n] += static_cast<int32_t>(terms[i][n] * per_unit[n]);
    }
    for (int n = 0; n < 8; ++n) d[n] = towards_zero(sums[n] / static_cast<double>(per_unit[n]));
    return;
  }
  for (int n = 0; n < 8; ++n) {  // zeros, infinities, NaN
    double sum = d[n];
    for (int i = 0; i < kTerms; ++i) sum += terms[i][n];
    d[n] = towards_zero(sum);
  }
}

}  // namespace hypenet::emu
