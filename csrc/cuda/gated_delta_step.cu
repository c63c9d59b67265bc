#include "dispatch.h"
#include "gated_delta_step.cuh"
#include "kernels.h"
#include "launch.h"

namespace hypenet::cuda {
namespace {

using namespace gated_delta::step;

template <class Shape, class Element>
Status launch_step(const GatedDeltaStepParams& params, Stream stream) {
  const int64_t num_tiles = (params.V + Shape::kColumns - 1) / Shape::kColumns;
  return launch(KERNEL(gated_delta::step::gated_delta_step_kernel, Shape, Element),
                params.B * params.HV * num_tiles, Shape::kThreads, sizeof(Smem<Shape>), stream, params);
}

}  // namespace

Status gated_delta_step(const GatedDeltaStepParams& params, Stream stream) {
  if (params.T == 0) return nullptr;
  const int64_t K = params.K;
  const bool square = K == params.V && whole_vectors(params);
  return dispatch_dtype(params.dtype, [&]<class Element>() -> Status {
    if (square && K == 64) return launch_step<Shape<64, State::kSquare>, Element>(params, stream);
    if (square && K == 128) return launch_step<Shape<128, State::kSquare>, Element>(params, stream);
    if (K <= 64) return launch_step<Shape<64, State::kAny>, Element>(params, stream);
    if (K <= 128) return launch_step<Shape<128, State::kAny>, Element>(params, stream);
    static_assert(Shape<256, State::kAny>::kKeyDim == kStepMaxKeyDim);
    if (K <= kStepMaxKeyDim) return launch_step<Shape<256, State::kAny>, Element>(params, stream);
    return "K is larger than what is built for CUDA";
  });
}

}  // namespace hypenet::cuda
