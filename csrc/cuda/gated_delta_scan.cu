#include "choices.h"
#include "dispatch.h"
#include "gated_delta.h"
#include "gated_delta_scan.cuh"
#include "launch.h"

namespace hypenet::cuda {
namespace {

using namespace gated_delta::scan;
using gated_delta::Rule;

template <class C>
Status launch_scan(const GatedDeltaFwdParams& params, Stream stream) {
  const int64_t num_tiles = params.V / (C::kWarps * kColumns);
  return launch(KERNEL(gated_delta::scan::gated_delta_scan_kernel, C),
                params.num_segments * params.HV * num_tiles, C::kThreads, sizeof(ScanSmem<C>), stream,
                params);
}

template <class Element, int K, Rule kRule>
Status choose_and_launch(const GatedDeltaFwdParams& params, const Device& device, Stream stream) {
  constexpr int kWideWarps = 8, kNarrowWarps = 4, kSlimWarps = 2;
  using Wide = Config<Element, K, kRule, Pass::kOutput, kWideWarps>;
  using Narrow = Config<Element, K, kRule, Pass::kOutput, kNarrowWarps>;
  const int64_t warps = params.num_segments * params.HV * (params.V / kColumns);
  const ScanBlock block = choose_scan(warps, params.V % (kWideWarps * kColumns) == 0, sizeof(ScanSmem<Wide>),
                                      sizeof(ScanSmem<Narrow>), device);
  if (block == ScanBlock::kWide) return launch_scan<Wide>(params, stream);
  if constexpr (K <= 128) {  // of K = 256 two warps would spill registers
    if (block == ScanBlock::kSlim) {
      return launch_scan<Config<Element, K, kRule, Pass::kOutput, kSlimWarps>>(params, stream);
    }
  }
  if constexpr (K == 128 && kRule == Rule::kDelta) {  // the only one that fits nowhere else in 99 KB
    if (block == ScanBlock::kSingle) {
      return launch_scan<Config<Element, K, kRule, Pass::kOutput, kNarrowWarps, 1>>(params, stream);
    }
  }
  return launch_scan<Narrow>(params, stream);
}

}  // namespace

Status gated_delta_scan(const GatedDeltaFwdParams& params, Stream stream) {
  if (params.V % 64 != 0) return "V must be a multiple of 64";
  Device device;
  if (const Status status = find_device(stream.device, device); status != nullptr) return status;
  return dispatch_half_dtype(params.dtype, [&]<class Element>() {
    return dispatch_key_dim(params.K, [&]<int K>() {
      return params.delta ? choose_and_launch<Element, K, Rule::kDelta>(params, device, stream)
                          : choose_and_launch<Element, K, Rule::kGla>(params, device, stream);
    });
  });
}

Status gated_delta_chunk_fwd(const GatedDeltaFwdParams& params, Stream stream) {
  if (const Status status = gated_delta_map(params, stream); status != nullptr) return status;
  const GatedDeltaFwdParams legal = with_legal_bounds(params);
  if (const Status status = gated_delta_fill(legal, stream); status != nullptr) return status;
  for (const auto run : {gated_delta_prepare, gated_delta_segments, gated_delta_scan}) {
    if (const Status status = run(legal, stream); status != nullptr) return status;
  }
  return nullptr;
}

}  // namespace hypenet::cuda
