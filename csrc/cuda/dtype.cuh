// Element types on the device, and the one dispatcher from a run-time DType to them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <utility>

#include "../params.h"

namespace hypenet::cuda {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounds to nearest even.
__device__ __forceinline__ void from_float(float& to, float x) { to = x; }
__device__ __forceinline__ void from_float(__half& to, float x) { to = __float2half_rn(x); }
__device__ __forceinline__ void from_float(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

// Calls run.template operator()<Element>() for the element type of `dtype`.
template <class Run>
Status dispatch_dtype(DType dtype, Run&& run) {
  switch (dtype) {
    case DType::kFloat32:
      return run.template operator()<float>();
    case DType::kBFloat16:
      return run.template operator()<__nv_bfloat16>();
    case DType::kFloat16:
      return run.template operator()<__half>();
    default:
      return "dtype is not built for CUDA";
  }
}

}  // namespace hypenet::cuda
