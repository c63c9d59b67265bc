// The CUDA kernels. Each enqueues its work on a stream and returns at once; none waits.
#pragma once

#include "../params.h"
#include "limits.h"

struct CUstream_st;

namespace hypenet::cuda {

// A stream of a device. The default stream has handle 0 on every device, so that the handle alone does not say where a
// launch goes.
struct Stream {
  int device;
  CUstream_st* handle;
};

Status gated_delta_chunk_fwd(const GatedDeltaFwdParams& params, Stream stream);
Status gated_delta_chunk_bwd(const GatedDeltaBwdParams& params, Stream stream);
Status gated_delta_step(const GatedDeltaStepParams& params, Stream stream);
Status commit_states(const CommitStatesParams& params, Stream stream);

Status hype_attention_fwd(const HypeAttentionFwdParams& params, Stream stream);
Status hype_attention_bwd(const HypeAttentionBwdParams& params, Stream stream);
Status hype_attention_decode(const HypeAttentionDecodeParams& params, Stream stream);

Status causal_conv1d_fwd(const CausalConv1dFwdParams& params, Stream stream);
Status causal_conv1d_bwd(const CausalConv1dBwdParams& params, Stream stream);
Status causal_conv1d_update(const CausalConv1dUpdateParams& params, Stream stream);

}  // namespace hypenet::cuda
