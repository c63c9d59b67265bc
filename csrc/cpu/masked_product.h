// Products of attention's weights with rows of which some are masked: their weight is zero, yet zero times NaN or
// infinity is NaN. So rows that are not finite are left out of the product, and added where they are seen.
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
  vec<Acc> zero[kChains] = {};  // or NaN
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

// product(x), x [packed(rows), D] being the factors of a sum over rows, for finite rows. For each of the others
// add_row(r) has to add the products with what sees it. `copy` has x's size.
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
