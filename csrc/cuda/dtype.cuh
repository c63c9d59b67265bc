// The one dispatcher from a run-time DType to the element types of the device.
#pragma once

#include <utility>

#include "../params.h"
#include "arch/sm80.cuh"

namespace hypenet::cuda {

using arch::from_float;
using arch::to_float;

// Calls run.template operator()<Element>() for the element type of `dtype`.
template <class Run>
Status dispatch_dtype(DType dtype, Run&& run) {
  switch (dtype) {
    case DType::kFloat32:
      return run.template operator()<float>();
    case DType::kBFloat16:
      return run.template operator()<arch::bf16>();
    case DType::kFloat16:
      return run.template operator()<arch::fp16>();
    default:
      return "dtype is not built for CUDA";
  }
}

// The same for kernels that multiply on tensor cores.
template <class Run>
Status dispatch_half_dtype(DType dtype, Run&& run) {
  switch (dtype) {
    case DType::kBFloat16:
      return run.template operator()<arch::bf16>();
    case DType::kFloat16:
      return run.template operator()<arch::fp16>();
    default:
      return "dtype is not built for CUDA";
  }
}

}  // namespace hypenet::cuda
