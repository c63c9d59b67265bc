// The two floating-point types of 16 bits, as every compiler of the kernels sees them: nvcc, NVRTC, and the host's.
#pragma once

#include <cstdint>

namespace hypenet::cuda::arch {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

}  // namespace hypenet::cuda::arch
