#include <algorithm>
#include <cmath>

#include "dispatch.h"
#include "hype_attention.h"
#include "hype_attention_fwd.cuh"
#include "kernels.h"
#include "launch.h"

namespace hypenet::cuda {
namespace {

using namespace attention;
using namespace attention::fwd;

template <class C, class Element>
Status launch_forward(const Params& p, Stream stream) {
  const int64_t slots = num_slots<C::kQueries>(p, p.T);
  const Arguments arguments{p, logit_scale(std::max(std::abs(p.scale), kMinScale), p.logit_scale_base),
                            p.scale < 0, static_cast<unsigned>(slots)};
  return launch(KERNEL(attention::fwd::hype_attention_fwd_kernel, C, Element), slots * p.H, C::kThreads,
                sizeof(Smem<Element, C>), stream, arguments);
}

}  // namespace

Status hype_attention_fwd(const Params& params, Stream stream) {
  if (params.T == 0) return nullptr;
  if (params.S > kMaxTokens) return "S is larger than what is built for CUDA";
  return dispatch_half_dtype(params.dtype, [&]<class Element>() -> Status {
    return dispatch_head_dim(params.D,
                             [&]<int D>() { return launch_forward<Config<D>, Element>(params, stream); });
  });
}

}  // namespace hypenet::cuda
