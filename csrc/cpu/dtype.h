// The element types of the CPU kernels, and the dispatcher from a run-time DType to them.
#pragma once

#include <bit>
#include <cstdint>

#include "../params.h"

namespace hypenet::cpu {

// Storage only: arithmetic happens in float.
struct bfloat16 {
  uint16_t bits;

  bfloat16() = default;
  explicit bfloat16(float x) {
    const uint32_t u = std::bit_cast<uint32_t>(x);
    // round to nearest even; a NaN keeps its quiet bit instead of overflowing into infinity
    bits = (x != x) ? static_cast<uint16_t>((u >> 16) | 0x40u)
                    : static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
  explicit operator float() const { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};

// IEEE binary16, for storage only as well. The conversions are branch-free, so that loops over them
// vectorize.
struct float16 {
  uint16_t bits;

  float16() = default;
  explicit float16(float x) {
    const uint32_t u = std::bit_cast<uint32_t>(x);
    const int32_t size = u & 0x7fffffff;
    // Round to nearest even: subnormal results to a multiple of 2^-24, the last bit of 0.5; normal ones by
    // the 13 bits that are dropped.
    const int32_t subnormal =
        std::bit_cast<int32_t>(std::bit_cast<float>(size) + 0.5f) - std::bit_cast<int32_t>(0.5f);
    const int32_t normal = (size - (kBias << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
    int32_t half = size < 0x38800000 ? subnormal : normal;
    half = size < 0x477ff000 ? half : 0x7c00;   // 65520 is halfway to 2^16: infinity
    half = size <= 0x7f800000 ? half : 0x7e00;  // NaN
    bits = static_cast<uint16_t>(half | ((u >> 16) & 0x8000u));
  }
  explicit operator float() const {
    const int32_t size = bits & 0x7fff;
    const int32_t subnormal = std::bit_cast<int32_t>(static_cast<float>(size) * 0x1p-24f);
    const int32_t normal = (size << 13) + ((size < 0x7c00 ? kBias : 2 * kBias) << 23);
    const uint32_t sign = bits & 0x8000u;
    return std::bit_cast<float>((size < 0x400 ? subnormal : normal) | (sign << 16));
  }

 private:
  static constexpr int32_t kBias = 112;  // difference of the exponents' biases
};

template <class Element>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class Element>
using acc_t = typename Accumulator<Element>::type;

// Calls run.operator()<Element>() with the element type of `dtype`.
template <class Run>
Status dispatch_dtype(DType dtype, Run&& run) {
  switch (dtype) {
    case DType::kFloat64:
      return run.template operator()<double>();
    case DType::kFloat32:
      return run.template operator()<float>();
    case DType::kBFloat16:
      return run.template operator()<bfloat16>();
    case DType::kFloat16:
      return run.template operator()<float16>();
    default:
      return "dtype is unknown";
  }
}

inline int64_t index_at(const Indices& x, int64_t i) {
  return x.is_int32 ? static_cast<const int32_t*>(x.data)[i] : static_cast<const int64_t*>(x.data)[i];
}

}  // namespace hypenet::cpu
