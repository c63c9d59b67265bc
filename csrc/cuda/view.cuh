// How kernels read what params.h describes.
#pragma once

#include "../params.h"
#include "arch/sm80.cuh"

namespace hypenet::cuda {

__device__ __forceinline__ int64_t index_at(const Indices& x, int64_t i) {
  return x.is_int32 ? static_cast<const int32_t*>(x.data)[i] : static_cast<const int64_t*>(x.data)[i];
}

}  // namespace hypenet::cuda
