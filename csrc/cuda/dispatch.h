// From what a call's params say at run time to the template arguments of kernels.
#pragma once

#include "../params.h"
#include "arch/float16.h"
#include "limits.h"

namespace hypenet::cuda {

// Calls run.template operator()<Element>() for the element type of `dtype`, one that tensor cores multiply.
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

// The same for kernels that take float32 too.
template <class Run>
Status dispatch_dtype(DType dtype, Run&& run) {
  return dtype == DType::kFloat32 ? run.template operator()<float>() : dispatch_half_dtype(dtype, run);
}

// Calls run.template operator()<K>() for a K of the chunk kernels.
template <class Run>
Status dispatch_key_dim(int64_t K, Run&& run) {
  switch (K) {
    case 64:
      return run.template operator()<64>();
    case 128:
      return run.template operator()<128>();
    case 256:
      return run.template operator()<256>();
    default:
      return "K must be 64, 128 or 256";
  }
}

// Calls run.template operator()<D>() for a head dimension of the attention kernels.
template <class Run>
Status dispatch_head_dim(int64_t D, Run&& run) {
  if (D == kAttentionHeadDims[0]) return run.template operator()<kAttentionHeadDims[0]>();
  if (D == kAttentionHeadDims[1]) return run.template operator()<kAttentionHeadDims[1]>();
  if (D == kAttentionHeadDims[2]) return run.template operator()<kAttentionHeadDims[2]>();
  static_assert(sizeof kAttentionHeadDims == 3 * sizeof(int64_t));
  return "D is not built for CUDA";
}

}  // namespace hypenet::cuda
