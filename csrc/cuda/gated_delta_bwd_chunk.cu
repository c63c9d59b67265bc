#include "choices.h"
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

template <class Element, int K, Rule kRule>
Status choose_and_launch(const GatedDeltaBwdParams& params, const Device& device, Stream stream) {
  if constexpr (K <= 128) {
    if (!fits(sizeof(Smem<Element, K, kRule>), device)) return gated_delta_bwd_chunk_small(params, stream);
  }
  return launch_chunks<Element, K, kRule>(params, stream);
}

}  // namespace

Status gated_delta_bwd_chunk(const GatedDeltaBwdParams& params, Stream stream) {
  Device device;
  if (const Status status = find_device(stream.device, device); status != nullptr) return status;
  return dispatch_half_dtype(params.dtype, [&]<class Element>() -> Status {
    return dispatch_key_dim(params.K, [&]<int K>() -> Status {
      return params.delta ? choose_and_launch<Element, K, Rule::kDelta>(params, device, stream)
                          : choose_and_launch<Element, K, Rule::kGla>(params, device, stream);
    });
  });
}

}  // namespace hypenet::cuda
