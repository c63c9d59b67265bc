#include "dispatch.h"
#include "gated_delta_step.cuh"
#include "kernels.h"
#include "launch.h"

namespace hypenet::cuda {
namespace {

using namespace gated_delta::step;

template <class C, class Element>
Status launch_step(const GatedDeltaStepParams& params, Stream stream) {
  const int64_t num_tiles = (params.V + C::kColumns - 1) / C::kColumns;
  return launch(KERNEL(gated_delta::step::gated_delta_step_kernel, C, Element),
                params.B * params.HV * num_tiles, C::kThreads, sizeof(Smem<C>), stream, params);
}

}  // namespace

Status gated_delta_step(const GatedDeltaStepParams& params, Stream stream) {
  if (params.T == 0) return nullptr;
  const int64_t K = params.K;
  const bool square = K == params.V && whole_vectors(params);
  return dispatch_dtype(params.dtype, [&]<class Element>() -> Status {
    if (square && K == 64) return launch_step<Config<64, State::kSquare>, Element>(params, stream);
    if (square && K == 128) return launch_step<Config<128, State::kSquare>, Element>(params, stream);
    if (K <= 64) return launch_step<Config<64, State::kAny>, Element>(params, stream);
    if (K <= 128) return launch_step<Config<128, State::kAny>, Element>(params, stream);
    static_assert(Config<256, State::kAny>::kKeyDim == kStepMaxKeyDim);
    if (K <= kStepMaxKeyDim) return launch_step<Config<256, State::kAny>, Element>(params, stream);
    return "K is larger than what is built for CUDA";
  });
}

}  // namespace hypenet::cuda
