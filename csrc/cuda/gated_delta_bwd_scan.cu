#include "choices.h"
#include "dispatch.h"
#include "gated_delta.h"
#include "gated_delta_bwd_scan.cuh"
#include "launch.h"

namespace hypenet::cuda {
namespace {

using namespace gated_delta::bwd::scan;
using gated_delta::Rule;

template <class C>
Status launch_scan(const GatedDeltaBwdParams& params, Stream stream) {
  const int64_t num_blocks = params.num_segments * params.HV * (params.V / kColumns);
  return launch(KERNEL(gated_delta::bwd::scan::gated_delta_bwd_scan_kernel, C), num_blocks, kThreads,
                sizeof(typename C::Smem), stream, params);
}

template <class Element, int K, Rule kRule, Start kStart>
Status choose_and_launch(const GatedDeltaBwdParams& params, const Device& device, Stream stream) {
  using Double = Config<Element, K, kRule, kStart>;
  if constexpr (K == 128) {  // the only one of which one stage fits 99 KB and two do not
    if (!fits(sizeof(typename Double::Smem), device)) {
      return launch_scan<Config<Element, K, kRule, kStart, 1>>(params, stream);
    }
  }
  return launch_scan<Double>(params, stream);
}

template <Start kStart>
Status launch_scan(const GatedDeltaBwdParams& params, const Device& device, Stream stream) {
  return dispatch_half_dtype(params.dtype, [&]<class Element>() -> Status {
    return dispatch_key_dim(params.K, [&]<int K>() -> Status {
      return params.delta ? choose_and_launch<Element, K, Rule::kDelta, kStart>(params, device, stream)
                          : choose_and_launch<Element, K, Rule::kGla, kStart>(params, device, stream);
    });
  });
}

}  // namespace

Status gated_delta_bwd_scan(const GatedDeltaBwdParams& params, Stream stream) {
  Device device;
  if (const Status status = find_device(stream.device, device); status != nullptr) return status;
  if (params.segment_chunks != 0) {
    if (const Status status = launch_scan<Start::kZero>(params, device, stream); status != nullptr)
      return status;
    if (const Status status = gated_delta_chain(params, stream); status != nullptr) return status;
  }
  return launch_scan<Start::kGiven>(params, device, stream);
}

Status gated_delta_chunk_bwd(const GatedDeltaBwdParams& params, Stream stream) {
  if (params.V % 64 != 0) return "V must be a multiple of 64";
  const GatedDeltaBwdParams legal = with_legal_bounds(params);
  if (const Status status = gated_delta_fill(legal, stream); status != nullptr) return status;
  const Status status = gated_delta_bwd_scan(legal, stream);
  return status == nullptr ? gated_delta_bwd_chunk(legal, stream) : status;
}

}  // namespace hypenet::cuda
