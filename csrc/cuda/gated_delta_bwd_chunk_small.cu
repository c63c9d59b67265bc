#include "dispatch.h"
#include "gated_delta.h"
#include "gated_delta_bwd_chunk_small.cuh"
#include "launch.h"

namespace hypenet::cuda {
namespace {

using namespace gated_delta::bwd::chunk;
using gated_delta::Rule;

template <class C>
Status launch_chunks(const GatedDeltaBwdParams& params, Stream stream) {
  return launch(KERNEL(gated_delta::bwd::chunk::gated_delta_bwd_chunk_small_kernel, C),
                params.num_chunks * params.H, kThreads, sizeof(C), stream, params);
}

template <class Element, int K>
Status launch_chunks(const GatedDeltaBwdParams& params, Stream stream) {
  return params.delta ? launch_chunks<SmallSmem<Element, K, Rule::kDelta>>(params, stream)
                      : launch_chunks<SmallSmem<Element, K, Rule::kGla>>(params, stream);
}

}  // namespace

Status gated_delta_bwd_chunk_small(const GatedDeltaBwdParams& params, Stream stream) {
  return dispatch_half_dtype(params.dtype, [&]<class Element>() -> Status {
    if (params.K == 64) return launch_chunks<Element, 64>(params, stream);
    if (params.K == 128) return launch_chunks<Element, 128>(params, stream);
    return "K must be 64 or 128";
  });
}

}  // namespace hypenet::cuda
