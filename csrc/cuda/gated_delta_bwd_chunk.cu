#include "dispatch.h"
#include "gated_delta.h"
#include "gated_delta_bwd_chunk.cuh"
#include "launch.h"

namespace hypenet::cuda {
namespace {

using namespace gated_delta::bwd::chunk;
using gated_delta::Rule;

template <class Element, int K, Rule kRule, int kPart = 0>
Status launch_chunks(const GatedDeltaBwdParams& params, Stream stream) {
  using C = Smem<Element, K, kRule, kPart>;
  const Status status = launch(KERNEL(gated_delta::bwd::chunk::gated_delta_bwd_chunk_kernel, C),
                               params.num_chunks * params.H, kThreads, sizeof(C), stream, params);
  if constexpr (!C::kLastPart) {
    if (status == nullptr) return launch_chunks<Element, K, kRule, kPart + 1>(params, stream);
  }
  return status;
}

}  // namespace

Status gated_delta_bwd_chunk(const GatedDeltaBwdParams& params, Stream stream) {
  return dispatch_half_dtype(params.dtype, [&]<class Element>() -> Status {
    return dispatch_key_dim(params.K, [&]<int K>() -> Status {
      return params.delta ? launch_chunks<Element, K, Rule::kDelta>(params, stream)
                          : launch_chunks<Element, K, Rule::kGla>(params, stream);
    });
  });
}

}  // namespace hypenet::cuda
