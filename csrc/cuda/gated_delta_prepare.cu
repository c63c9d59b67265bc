#include "dispatch.h"
#include "gated_delta.h"
#include "gated_delta_prepare.cuh"
#include "launch.h"

namespace hypenet::cuda {
namespace {

using namespace gated_delta::prepare;

template <class C>
Status launch_prepare(const GatedDeltaFwdParams& params, Stream stream) {
  return launch(KERNEL(gated_delta::prepare::gated_delta_prepare_kernel, C), params.num_chunks * params.H,
                kThreads, sizeof(Smem<typename C::Element, C::K>), stream, params);
}

}  // namespace

Status gated_delta_map(const GatedDeltaFwdParams& params, Stream stream) {
  if (params.cu_seqlens == nullptr) return nullptr;
  const int num_maps = params.segment_chunks == 0 ? 1 : 2;
  return launch(KERNEL(gated_delta::prepare::gated_delta_map_kernel), num_maps, kMapThreads, sizeof(MapSmem),
                stream, params);
}

Status gated_delta_prepare(const GatedDeltaFwdParams& params, Stream stream) {
  if (!params.delta) {
    constexpr int kWarps = kThreads / arch::kWarpSize;
    return launch(KERNEL(gated_delta::prepare::gated_delta_decays_kernel),
                  (params.num_chunks * params.HV + kWarps - 1) / kWarps, kThreads, 0, stream, params);
  }
  return dispatch_half_dtype(params.dtype, [&]<class Element>() {
    return dispatch_key_dim(params.K,
                            [&]<int K>() { return launch_prepare<Config<Element, K>>(params, stream); });
  });
}

}  // namespace hypenet::cuda
