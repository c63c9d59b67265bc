// Products of attention weights with rows that the causal mask hides from some of them. A masked weight is
// zero, but zero times NaN or infinity is NaN. So rows with such elements are left out of the matrix product
// and added only where they are visible.
#pragma once

#include <algorithm>
#include <cstdint>

#include "convert.h"
#include "pairs.h"
#include "simd.h"

namespace hypenet::cpu::attention {

template <class Acc, class Element>
bool all_finite(const Element* x, int64_t n) {
  constexpr int64_t L = kLanes<Acc>, kChains = 4;
  vec<Acc> zero[kChains] = {};  // NaN once an element is not finite
  int64_t i = 0;
  for (; i + kChains * L <= n; i += kChains * L) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) zero[c] += load_as<Acc>(x + i + c * L) * Acc(0);
  }
  for (; i < n; i += L) {
    const int count = static_cast<int>(std::min(L, n - i));
    zero[0] += (count == L ? load_as<Acc>(x + i) : load_partial_as<Acc>(x + i, count)) * Acc(0);
  }
  return sum<Acc>((zero[0] + zero[1]) + (zero[2] + zero[3])) == 0;
}

// Element (row, column) of factors [packed(rows), ld] of a product that sums over rows.
template <class Factor>
packed_t<Factor>& element(Factor* x, int64_t ld, int64_t row, int64_t column) {
  constexpr int64_t kStep = kPacked<Factor>;
  return reinterpret_cast<packed_t<Factor>*>(x)[(row / kStep * ld + column) * kStep + row % kStep];
}
template <class Factor>
packed_t<Factor> element(const Factor* x, int64_t ld, int64_t row, int64_t column) {
  return element(const_cast<Factor*>(x), ld, row, column);
}

// Calls product(x) for the factors x [packed(rows), D] of a sum over rows if all of them are finite.
// Otherwise calls it for a copy in which the rows that are not are zero, and add_row(r) for each of these,
// which must add its products with the weights that are not masked. `copy` is a buffer of x's size.
template <class Acc, class Factor, class Product, class AddRow>
void product_of_visible(int64_t rows, int64_t D, const Factor* x, Factor* copy, Product&& product,
                        AddRow&& add_row) {
  using Element = packed_t<Factor>;
  const int64_t size = packed<Factor>(rows) * D;
  if (all_finite<Acc>(reinterpret_cast<const Element*>(x), size * kPacked<Factor>)) return product(x);
  std::copy_n(x, size, copy);
  const auto for_each_other = [&](auto&& body) {
    for (int64_t r = 0; r < packed<Factor>(rows) * kPacked<Factor>; ++r) {
      bool finite = true;
      for (int64_t d = 0; d < D; ++d) finite &= static_cast<Acc>(element(x, D, r, d)) * 0 == 0;
      if (!finite) body(r);
    }
  };
  for_each_other([&](int64_t r) {
    for (int64_t d = 0; d < D; ++d) element(copy, D, r, d) = Element(0.0f);
  });
  product(copy);
  for_each_other(add_row);
}

}  // namespace hypenet::cpu::attention
