#include "choices.h"
#include "dispatch.h"
#include "hype_attention.h"
#include "hype_attention_decode.cuh"
#include "kernels.h"
#include "launch.h"

namespace hypenet::cuda {
namespace {

using namespace attention;
using namespace attention::decode;

bool whole_pieces(const View& x) {
  const int64_t strides = x.batch | x.token | x.head;
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && strides % kPiece == 0;
}

template <class Element>
Status launch_combine(const DecodeParams& params, Stream stream) {
  const HypeAttentionDecodeParams& p = params.p;
  return launch(KERNEL(attention::decode::hype_attention_decode_combine_kernel, Element), p.B * p.T * p.H,
                kCombineThreads, sizeof(CombineSmem), stream, params);
}

template <class C>
Status launch_decode(DecodeParams params, const Device& device, Stream stream) {
  const HypeAttentionDecodeParams& p = params.p;
  const int64_t most_units = p.B * p.num_segments * p.HK * params.row_blocks;
  params.num_blocks = choose_decode_blocks(most_units, C::kBlocksPerProcessor, device);
  if (const Status status = launch(KERNEL(attention::decode::hype_attention_decode_split_kernel, C),
                                   params.num_blocks, C::kThreads, sizeof(Smem<C>), stream, params)) {
    return status;
  }
  return launch_combine<typename C::Element>(params, stream);
}

}  // namespace

Status hype_attention_decode(const HypeAttentionDecodeParams& p, Stream stream) {
  const int64_t group = p.HK == 0 ? 0 : p.H / p.HK;
  if (p.T * group > kMaxTokens || p.capacity > kMaxTokens)
    return "more tokens or keys than are built for CUDA";
  DecodeParams params{};
  params.p = p;
  params.logit_scale = logit_scale(p.scale, p.logit_scale_base);
  params.group = static_cast<int>(group);
  params.row_blocks = static_cast<int>((p.T * group + kRows - 1) / kRows);
  params.aligned_caches = p.D % kPiece == 0 && whole_pieces(p.k_cache) && whole_pieces(p.v_cache);
  params.aligned = params.aligned_caches && whole_pieces(p.k) && whole_pieces(p.v);
  Device device;
  if (const Status status = find_device(stream.device, device); status != nullptr) return status;
  return dispatch_half_dtype(p.dtype, [&]<class Element>() -> Status {
    if (p.D <= 64) return launch_decode<Config<Element, 64>>(params, device, stream);
    if (p.D <= 128 && fits(sizeof(Smem<Config<Element, 128>>), device)) {
      return launch_decode<Config<Element, 128>>(params, device, stream);
    }
    if (p.D <= 128) return launch_decode<Config<Element, 128, 2>>(params, device, stream);
    if (p.D <= kDecodeMaxDim) return launch_decode<Config<Element, 256>>(params, device, stream);
    return "D is larger than what is built for CUDA";
  });
}

}  // namespace hypenet::cuda
