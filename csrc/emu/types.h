// Built-ins of a CUDA compiler that a C++ compiler lacks: function attributes, vectors, 16-bit floats.
#pragma once

#include <math.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "../cuda/arch/float16.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

namespace hypenet::emu {

// Flushes subnormal numbers to zero.
inline float flushed(float x) {
  return std::abs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}

using cuda::arch::bf16;
using cuda::arch::fp16;

inline float widen(bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

// Shifts the bits into place and scales by the difference of the exponent biases: exact, also for subnormals.
inline float widen(fp16 x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  uint32_t bits = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  if (magnitude >= 0x7c00u << 13) bits |= 0x7f800000;  // infinity, NaN
  return std::bit_cast<float>(bits | static_cast<uint32_t>(x.bits & 0x8000) << 16);
}

// Rounded to nearest even; every NaN becomes 0x7fff, as on the device.
template <class Element>
Element narrow(float x);

template <>
inline bf16 narrow(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  return {x != x ? uint16_t{0x7fff} : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
inline fp16 narrow(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t rounded;
  if (magnitude > 0x7f800000) return {0x7fff};
  if (magnitude >= 0x477ff000) {  // 65520 and above
    rounded = 0x7c00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: adding 1/2 leaves multiples of 2^-24, rounded
    rounded = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  } else {
    rounded = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  return {static_cast<uint16_t>(rounded | sign)};
}

}  // namespace hypenet::emu
