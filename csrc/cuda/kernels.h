// The CUDA kernels. Each enqueues its work on `stream` of the current device and returns at once; none waits.
#pragma once

#include "../params.h"

struct CUstream_st;

namespace hypenet::cuda {

using Stream = CUstream_st*;

// The largest K of gated_delta_step.
constexpr int64_t kStepMaxKeyDim = 256;

Status gated_delta_step(const GatedDeltaStepParams& params, Stream stream);

}  // namespace hypenet::cuda
