#include "choices.h"
#include "dispatch.h"
#include "hype_attention.h"
#include "hype_attention_bwd.cuh"
#include "kernels.h"
#include "launch.h"

namespace hypenet::cuda {
namespace {

using namespace attention;
using namespace attention::bwd;

template <class Shape, class Element>
Status launch_prepare(const Params& p, const LogitScale& logits, Stream stream) {
  const int64_t num_blocks = (p.B * p.T * p.H + Shape::kPrepareRows - 1) / Shape::kPrepareRows;
  return launch(KERNEL(attention::bwd::hype_attention_bwd_prepare_kernel, Shape, Element), num_blocks,
                Shape::kPrepareThreads, 0, stream, Arguments{p, logits, 0});
}

template <class Shape, class Element>
Status launch_backward(const Params& p, Stream stream) {
  constexpr size_t kBytes = sizeof(Smem<Element, Shape>);
  const LogitScale logits = logit_scale(p.scale, p.logit_scale_base);
  const int64_t key_slots = num_slots<Shape::kRows>(p, p.S), query_slots = num_slots<Shape::kRows>(p, p.T);
  // The first pass has no tiles, and is the same for all of a head dimension.
  Status status = launch_prepare<attention::bwd::Shape<Shape::D>, Element>(p, logits, stream);
  if (status != nullptr) return status;
  const auto launch_keys = [&]<Gradient kGradient>() {
    using C = KeysConfig<Shape, Element, kGradient>;
    return launch(KERNEL(attention::bwd::hype_attention_bwd_keys_kernel, C), key_slots * p.HK,
                  Shape::kThreads, kBytes, stream, Arguments{p, logits, static_cast<unsigned>(key_slots)});
  };
  if constexpr (Shape::kApart) {
    status = launch_keys.template operator()<Gradient::kValues>();
    if (status == nullptr) status = launch_keys.template operator()<Gradient::kKeys>();
  } else {
    status = launch_keys.template operator()<Gradient::kKeysAndValues>();
  }
  if (status != nullptr) return status;
  return launch(KERNEL(attention::bwd::hype_attention_bwd_queries_kernel, Shape, Element), query_slots * p.H,
                Shape::kThreads, kBytes, stream, Arguments{p, logits, static_cast<unsigned>(query_slots)});
}

}  // namespace

Status hype_attention_bwd(const HypeAttentionBwdParams& params, Stream stream) {
  if (params.T == 0) return nullptr;
  if (params.S > kMaxTokens) return "S is larger than what is built for CUDA";
  Device device;
  if (const Status status = find_device(stream.device, device); status != nullptr) return status;
  return dispatch_half_dtype(params.dtype, [&]<class Element>() -> Status {
    return dispatch_head_dim(params.D, [&]<int D>() -> Status {
      if constexpr (D == 128) {
        if (!fits(sizeof(Smem<Element, Shape<D>>), device)) {
          return launch_backward<Shape<D, 32>, Element>(params, stream);
        }
      }
      return launch_backward<Shape<D>, Element>(params, stream);
    });
  });
}

}  // namespace hypenet::cuda
