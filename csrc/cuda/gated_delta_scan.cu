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

}  // namespace

// Eight warps share their tiles and so need half the traffic of four; worth it where most processors have
// such a block.
Status gated_delta_scan(const GatedDeltaFwdParams& params, Stream stream) {
  constexpr int kWide = 8, kNarrow = 4;
  if (params.V % (kNarrow * kColumns) != 0) return "V must be a multiple of 64";
  Device device;
  if (const Status status = find_device(stream.device, device); status != nullptr) return status;
  const int64_t wide_blocks = params.num_segments * params.HV * (params.V / (kWide * kColumns));
  const bool wide = params.V % (kWide * kColumns) == 0 && 4 * wide_blocks >= 3 * device.num_processors;
  return dispatch_half_dtype(params.dtype, [&]<class Element>() {
    return dispatch_key_dim(params.K, [&]<int K>() {
      if (params.delta) {
        return wide ? launch_scan<Config<Element, K, Rule::kDelta, Pass::kOutput, kWide>>(params, stream)
                    : launch_scan<Config<Element, K, Rule::kDelta, Pass::kOutput, kNarrow>>(params, stream);
      }
      return wide ? launch_scan<Config<Element, K, Rule::kGla, Pass::kOutput, kWide>>(params, stream)
                  : launch_scan<Config<Element, K, Rule::kGla, Pass::kOutput, kNarrow>>(params, stream);
    });
  });
}

Status gated_delta_chunk_fwd(const GatedDeltaFwdParams& params, Stream stream) {
  if (const Status status = gated_delta_fill(params, stream); status != nullptr) return status;
  for (const auto run : {gated_delta_map, gated_delta_prepare, gated_delta_segments, gated_delta_scan}) {
    if (const Status status = run(params, stream); status != nullptr) return status;
  }
  return nullptr;
}

}  // namespace hypenet::cuda
