// The rows of packed outputs that belong to no sequence.
#pragma once

#include <algorithm>
#include <cstdint>

namespace hypenet::cpu {

// Zeros the rows of a packed output [1, T, width] from cu_seqlens[N] on.
template <class Element, class Params>
void zero_tail(const Params& p, void* output, int64_t width) {
  if (p.cu_seqlens == nullptr || output == nullptr) return;
  const int64_t end = p.cu_seqlens[p.N];
  std::fill_n(static_cast<Element*>(output) + end * width, (p.T - end) * width, Element(0.0f));
}

}  // namespace hypenet::cpu
