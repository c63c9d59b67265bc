#include "gated_delta.h"
#include "gated_delta_fill.cuh"
#include "launch.h"

namespace hypenet::cuda {
namespace {

template <class Params>
Status launch_fill(const Params& params, Stream stream) {
  using namespace gated_delta::fill;
  return launch(KERNEL(gated_delta::fill::gated_delta_fill_kernel, Params), num_blocks(params), kThreads, 0,
                stream, params);
}

}  // namespace

Status gated_delta_fill(const GatedDeltaFwdParams& params, Stream stream) {
  if (params.cu_seqlens == nullptr && params.state_indices.data == nullptr) return nullptr;
  return launch_fill(params, stream);
}

Status gated_delta_fill(const GatedDeltaBwdParams& params, Stream stream) {
  return params.cu_seqlens == nullptr ? nullptr : launch_fill(params, stream);
}

}  // namespace hypenet::cuda
