// Shared by the launchers of the attention kernels.
#pragma once

#include <cmath>

#include "hype_attention.cuh"

namespace hypenet::cuda::attention {

// base = 0: s_t = 1.
inline LogitScale logit_scale(double scale, double base) {
  return {static_cast<float>(scale * static_cast<double>(kLog2E)),
          base == 0 ? 0.0f : static_cast<float>(1 / base),
          base == 0 ? 0.0f : static_cast<float>(1 / std::log2(base))};
}

// Tiles of kRows rows over all sequences, numbered as find_tile does.
template <int kRows, class Params>
int64_t num_slots(const Params& p, int64_t rows) {
  return p.cu_seqlens == nullptr ? p.B * ((rows + kRows - 1) / kRows) : rows / kRows + p.N + 1;
}

}  // namespace hypenet::cuda::attention
