#include "causal_conv1d.cuh"
#include "dispatch.h"
#include "kernels.h"
#include "launch.h"

namespace hypenet::cuda {
namespace {

using namespace causal_conv1d;

// run.template operator()<Element, W>()
template <class Run>
Status dispatch(DType dtype, int64_t W, Run&& run) {
  return dispatch_dtype(dtype, [&]<class Element>() -> Status {
    switch (W) {
      case 2:
        return run.template operator()<Element, 2>();
      case 3:
        return run.template operator()<Element, 3>();
      case 4:
        return run.template operator()<Element, 4>();
      default:
        return "W must be 2, 3 or 4";
    }
  });
}

// Whether rows of these strides and addresses can be read kVec elements at a time.
template <class Element, int64_t kVec, class... Addresses>
bool whole_vectors(const CausalConv1dOperands& params, const View& rows, const Addresses*... addresses) {
  const auto bits = (reinterpret_cast<uintptr_t>(rows.data) | ... | reinterpret_cast<uintptr_t>(addresses));
  return bits % (kVec * sizeof(Element)) == 0 && params.C % kVec == 0 && rows.batch % kVec == 0 &&
         rows.token % kVec == 0;
}

template <class C, class Params>
int64_t num_blocks(const Params& params) {
  const int64_t width = kThreads * C::kVec;
  return params.B * ((params.T + kConvBlock - 1) / kConvBlock) * ((params.C + width - 1) / width);
}

template <class C>
Status launch_forward(const CausalConv1dFwdParams& params, Stream stream) {
  return launch(KERNEL(causal_conv1d::causal_conv1d_fwd_kernel, C), num_blocks<C>(params), kThreads,
                sizeof(Smem<C::W>), stream, params);
}

template <class C>
Status launch_backward(const CausalConv1dBwdParams& params, Stream stream) {
  return launch(KERNEL(causal_conv1d::causal_conv1d_bwd_kernel, C), num_blocks<C>(params), kThreads,
                sizeof(Smem<C::W>), stream, params);
}

template <class C>
Status launch_update(const CausalConv1dUpdateParams& params, Stream stream) {
  const int64_t blocks = (params.B * params.C + kThreads - 1) / kThreads;
  return launch(KERNEL(causal_conv1d::causal_conv1d_update_kernel, C), blocks, kThreads, 0, stream, params);
}

}  // namespace

Status causal_conv1d_fwd(const CausalConv1dFwdParams& params, Stream stream) {
  return dispatch(params.dtype, params.W, [&]<class Element, int W>() {
    constexpr int kVec = 16 / sizeof(Element);
    return whole_vectors<Element, kVec>(params, params.x, params.y, params.initial_states)
               ? launch_forward<Config<Element, W, kVec>>(params, stream)
               : launch_forward<Config<Element, W, 1>>(params, stream);
  });
}

Status causal_conv1d_bwd(const CausalConv1dBwdParams& params, Stream stream) {
  if (params.num_blocks != params.B * ((params.T + kConvBlock - 1) / kConvBlock)) {
    return "partials must have a row for every block of tokens";
  }
  const Status status = dispatch(params.dtype, params.W, [&]<class Element, int W>() {
    constexpr int kVec = 4;
    const bool whole = whole_vectors<Element, kVec>(params, params.x, params.dx, params.initial_states,
                                                    params.dinitial_states) &&
                       whole_vectors<Element, kVec>(params, params.dy);
    return whole ? launch_backward<Config<Element, W, kVec>>(params, stream)
                 : launch_backward<Config<Element, W, 1>>(params, stream);
  });
  if (status != nullptr) return status;
  const int64_t columns = (params.W + 1) * params.C;
  return launch(KERNEL(causal_conv1d::causal_conv1d_sum_kernel), (columns + kThreads - 1) / kThreads,
                kThreads, 0, stream, params);
}

Status causal_conv1d_update(const CausalConv1dUpdateParams& params, Stream stream) {
  return dispatch(params.dtype, params.W, [&]<class Element, int W>() {
    return launch_update<Config<Element, W, 1>>(params, stream);
  });
}

}  // namespace hypenet::cuda
