// The CUDA kernels. Each enqueues its work on `stream` of the current device and returns at once; none waits.
#pragma once

#include "../params.h"

struct CUstream_st;

namespace hypenet::cuda {

using Stream = CUstream_st*;

// The largest K of gated_delta_step.
constexpr int64_t kStepMaxKeyDim = 256;

// The head dimensions of hype_attention_fwd and hype_attention_bwd.
constexpr int64_t kAttentionHeadDims[] = {64, 128, 256};

Status gated_delta_chunk_fwd(const GatedDeltaFwdParams& params, Stream stream);
Status gated_delta_chunk_bwd(const GatedDeltaBwdParams& params, Stream stream);
Status gated_delta_step(const GatedDeltaStepParams& params, Stream stream);
Status commit_states(const CommitStatesParams& params, Stream stream);

Status hype_attention_fwd(const HypeAttentionFwdParams& params, Stream stream);
Status hype_attention_bwd(const HypeAttentionBwdParams& params, Stream stream);

// hype_attention_decode: the largest D; the least length of a segment of keys, and the most segments of a
// sequence.
constexpr int kDecodeMaxDim = 256, kDecodeSegment = 256, kDecodeMaxSegments = 256;

Status hype_attention_decode(const HypeAttentionDecodeParams& params, Stream stream);

Status causal_conv1d_fwd(const CausalConv1dFwdParams& params, Stream stream);
Status causal_conv1d_bwd(const CausalConv1dBwdParams& params, Stream stream);
Status causal_conv1d_update(const CausalConv1dUpdateParams& params, Stream stream);

}  // namespace hypenet::cuda
