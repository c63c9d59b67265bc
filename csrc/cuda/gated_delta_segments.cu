#include "dispatch.h"
#include "gated_delta.h"
#include "gated_delta_segments.cuh"
#include "launch.h"

namespace hypenet::cuda {
namespace {

using namespace gated_delta::segments;
using gated_delta::Rule;
using gated_delta::scan::Config;
using gated_delta::scan::kColumns;
using gated_delta::scan::Pass;
using gated_delta::scan::ScanSmem;

template <class C>
Status launch_chain(const typename C::Params& params, Stream stream) {
  const int64_t num_blocks = params.N * params.HV * (params.V / kColumns);
  return launch(KERNEL(gated_delta::segments::gated_delta_chain_kernel, C), num_blocks,
                kWarps * arch::kWarpSize, 0, stream, params);
}

template <class Params>
Status chain(const Params& params, Stream stream) {
  return dispatch_key_dim(params.K, [&]<int K>() {
    return params.delta ? launch_chain<Chain<K, Rule::kDelta, Params>>(params, stream)
                        : launch_chain<Chain<K, Rule::kGla, Params>>(params, stream);
  });
}

template <class C>
Status launch_segments(const GatedDeltaFwdParams& params, Stream stream) {
  const int64_t num_tiles = (params.V + (C::kDelta ? C::kKeyDim : 0)) / (C::kWarps * kColumns);
  return launch(KERNEL(gated_delta::segments::gated_delta_segment_kernel, C),
                params.num_segments * params.HV * num_tiles, C::kThreads, sizeof(ScanSmem<C>), stream,
                params);
}

}  // namespace

Status gated_delta_segments(const GatedDeltaFwdParams& params, Stream stream) {
  if (params.segment_chunks == 0) return nullptr;
  if (params.V % (kWarps * kColumns) != 0) return "V must be a multiple of 64";
  const Status status = dispatch_half_dtype(params.dtype, [&]<class Element>() {
    return dispatch_key_dim(params.K, [&]<int K>() {
      return params.delta
                 ? launch_segments<Config<Element, K, Rule::kDelta, Pass::kState, kWarps>>(params, stream)
                 : launch_segments<Config<Element, K, Rule::kGla, Pass::kState, kWarps>>(params, stream);
    });
  });
  return status == nullptr ? chain(params, stream) : status;
}

Status gated_delta_chain(const GatedDeltaBwdParams& params, Stream stream) { return chain(params, stream); }

}  // namespace hypenet::cuda
