// Element types on the CPU, and the one dispatcher from a run-time DType to them.
#pragma once

#include <bit>
#include <cstdint>
#include <utility>

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

// Calls run.template operator()<Element>() for the element type of `dtype`.
template <class Run>
Status dispatch_dtype(DType dtype, Run&& run) {
  switch (dtype) {
    case DType::kFloat64:
      return run.template operator()<double>();
    case DType::kFloat32:
      return run.template operator()<float>();
    case DType::kBFloat16:
      return run.template operator()<bfloat16>();
    default:
      return "dtype is not built for the CPU";
  }
}

inline int64_t index_at(const Indices& x, int64_t i) {
  return x.is_int32 ? static_cast<const int32_t*>(x.data)[i] : static_cast<const int64_t*>(x.data)[i];
}

}  // namespace hypenet::cpu
