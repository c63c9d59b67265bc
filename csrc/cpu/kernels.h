// The CPU kernels. Each returns when it is done, on params.num_threads threads; results do not depend on
// their number.
#pragma once

#include "../params.h"

namespace hypenet::cpu {

Status gated_delta_chunk_fwd(const GatedDeltaFwdParams& params);
Status gated_delta_chunk_bwd(const GatedDeltaBwdParams& params);
Status gated_delta_recurrent_fwd(const GatedDeltaFwdParams& params);
Status gated_delta_step(const GatedDeltaStepParams& params);
Status commit_states(const CommitStatesParams& params);
Status hype_attention_fwd(const HypeAttentionFwdParams& params);
Status hype_attention_bwd(const HypeAttentionBwdParams& params);
Status hype_attention_decode(const HypeAttentionDecodeParams& params);
Status causal_conv1d_fwd(const CausalConv1dFwdParams& params);
Status causal_conv1d_bwd(const CausalConv1dBwdParams& params);
Status causal_conv1d_update(const CausalConv1dUpdateParams& params);
Status rms_norm_rope_fwd(const RmsNormRopeFwdParams& params);
Status rms_norm_rope_bwd(const RmsNormRopeBwdParams& params);
Status rms_norm_gated_fwd(const RmsNormGatedFwdParams& params);
Status rms_norm_gated_bwd(const RmsNormGatedBwdParams& params);
Status add_rms_norm_fwd(const AddRmsNormFwdParams& params);
Status add_rms_norm_bwd(const AddRmsNormBwdParams& params);
Status swiglu_fwd(const SwigluFwdParams& params);
Status swiglu_bwd(const SwigluBwdParams& params);

}  // namespace hypenet::cpu
