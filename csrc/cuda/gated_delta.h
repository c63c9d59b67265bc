// Launches of the chunk kernels of the gated delta rule, in the order of their calls.
#pragma once

#include "kernels.h"

namespace hypenet::cuda {

// Params that read the bounds which gated_delta_map clamped to [0, T], not the caller's.
template <class Params>
Params with_legal_bounds(Params params) {
  if (params.cu_seqlens != nullptr) params.cu_seqlens = params.chunk_offsets + params.N + 1;
  return params;
}

// forward; segments and the chain over them only where sequences are split
Status gated_delta_map(const GatedDeltaFwdParams& params, Stream stream);
Status gated_delta_fill(const GatedDeltaFwdParams& params, Stream stream);
Status gated_delta_prepare(const GatedDeltaFwdParams& params, Stream stream);
Status gated_delta_segments(const GatedDeltaFwdParams& params, Stream stream);
Status gated_delta_scan(const GatedDeltaFwdParams& params, Stream stream);

// backward
Status gated_delta_fill(const GatedDeltaBwdParams& params, Stream stream);
Status gated_delta_bwd_scan(const GatedDeltaBwdParams& params, Stream stream);
Status gated_delta_bwd_chunk(const GatedDeltaBwdParams& params, Stream stream);
Status gated_delta_bwd_chunk_small(const GatedDeltaBwdParams& params, Stream stream);  // K 64, 128 in 99 KB

// Chains the state gradients over the segments of split sequences, from those of each segment alone (segment_states)
// and the transfers of the forward.
Status gated_delta_chain(const GatedDeltaBwdParams& params, Stream stream);

}  // namespace hypenet::cuda
