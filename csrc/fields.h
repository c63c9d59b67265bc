// The fields of every params struct (params.h), under the names that Python gives them.
#pragma once

#include "bind.h"

namespace hypenet {

// FIELD(q) is a field of `Params`; OPTIONAL(q) is one that may be left out, and is then 0: only some device needs it.
#define FIELD(member) field<Params, &Params::member>(#member)
#define OPTIONAL(member) field<Params, &Params::member>(#member, true)

template <class Params>
Fields<Params> gated_delta_operands() {
  return {FIELD(dtype), FIELD(delta), FIELD(num_threads), FIELD(B), FIELD(T), FIELD(H), FIELD(HV),  FIELD(K),
          FIELD(V),     FIELD(scale), FIELD(q),           FIELD(k), FIELD(v), FIELD(g), FIELD(beta)};
}

template <class Params>
Fields<Params> hype_attention_operands() {
  return {FIELD(dtype), FIELD(num_threads),      FIELD(B), FIELD(T), FIELD(H), FIELD(HK),  FIELD(D),
          FIELD(scale), FIELD(logit_scale_base), FIELD(q), FIELD(k), FIELD(v), FIELD(gate)};
}

template <>
inline Fields<GatedDeltaFwdParams> fields_of() {
  using Params = GatedDeltaFwdParams;
  return gated_delta_operands<Params>() +
         Fields<Params>{FIELD(N), FIELD(cu_seqlens), FIELD(initial_state), FIELD(o), FIELD(final_state),
                        // pool of states, checkpoints
                        OPTIONAL(state_indices), OPTIONAL(num_slots), OPTIONAL(slot_stride),
                        OPTIONAL(checkpoint_every), OPTIONAL(checkpoints),
                        // chunks, segments and workspace on CUDA
                        OPTIONAL(num_chunks), OPTIONAL(G), OPTIONAL(L), OPTIONAL(h), OPTIONAL(segment_chunks),
                        OPTIONAL(num_segments), OPTIONAL(transfers), OPTIONAL(segment_states),
                        OPTIONAL(chunk_offsets), OPTIONAL(segment_offsets), OPTIONAL(P)};
}

template <>
inline Fields<GatedDeltaBwdParams> fields_of() {
  using Params = GatedDeltaBwdParams;
  return gated_delta_operands<Params>() +
         Fields<Params>{FIELD(N), FIELD(cu_seqlens), FIELD(initial_state), FIELD(do_), FIELD(dfinal_state),
                        FIELD(dq), FIELD(dk), FIELD(dv), FIELD(dg), FIELD(dbeta), FIELD(dinitial_state),
                        // saved by the forward, and workspace, on CUDA
                        OPTIONAL(num_chunks), OPTIONAL(chunk_offsets), OPTIONAL(G), OPTIONAL(L), OPTIONAL(h),
                        OPTIONAL(segment_chunks), OPTIONAL(num_segments), OPTIONAL(segment_offsets),
                        OPTIONAL(transfers), OPTIONAL(segment_states), OPTIONAL(dstates), OPTIONAL(dB_low)};
}

template <>
inline Fields<GatedDeltaStepParams> fields_of() {
  using Params = GatedDeltaStepParams;
  return gated_delta_operands<Params>() +
         Fields<Params>{FIELD(use_qk_l2norm),  FIELD(gates_in_dtype), FIELD(beta_limit),
                        FIELD(A_log),          FIELD(dt_bias),        FIELD(num_slots),
                        FIELD(state_indices),  FIELD(state),          FIELD(o),
                        OPTIONAL(slot_stride), OPTIONAL(states)};
}

template <>
inline Fields<CommitStatesParams> fields_of() {
  using Params = CommitStatesParams;
  return {FIELD(dtype),
          FIELD(num_threads),
          FIELD(B),
          FIELD(T),
          FIELD(HV),
          FIELD(K),
          FIELD(V),
          FIELD(num_slots),
          OPTIONAL(slot_stride),
          FIELD(state_indices),
          FIELD(num_accepted),
          FIELD(states),
          FIELD(state)};
}

template <>
inline Fields<HypeAttentionFwdParams> fields_of() {
  using Params = HypeAttentionFwdParams;
  return hype_attention_operands<Params>() +
         Fields<Params>{
             FIELD(S), FIELD(N),         FIELD(query_offset), FIELD(cu_seqlens), FIELD(query_offsets),
             FIELD(o), FIELD(o_ungated), FIELD(lse)};
}

template <>
inline Fields<HypeAttentionBwdParams> fields_of() {
  using Params = HypeAttentionBwdParams;
  return hype_attention_operands<Params>() +
         Fields<Params>{FIELD(S), FIELD(N), FIELD(query_offset), FIELD(cu_seqlens), FIELD(o_ungated),
                        FIELD(lse), FIELD(do_), FIELD(dq), FIELD(dk), FIELD(dv), FIELD(dgate),
                        // workspace on CUDA
                        OPTIONAL(do_ungated), OPTIONAL(row_terms)};
}

template <>
inline Fields<HypeAttentionDecodeParams> fields_of() {
  using Params = HypeAttentionDecodeParams;
  return hype_attention_operands<Params>() +
         Fields<Params>{FIELD(capacity), FIELD(cache_seqlens), FIELD(k_cache), FIELD(v_cache), FIELD(o),
                        // split over the keys, on CUDA
                        OPTIONAL(num_segments), OPTIONAL(partial_o), OPTIONAL(partial_softmax)};
}

template <class Params>
Fields<Params> causal_conv1d_operands() {
  return {FIELD(dtype),       FIELD(weight_dtype),
          FIELD(bias_dtype),  FIELD(silu),
          FIELD(num_threads), FIELD(B),
          FIELD(T),           FIELD(C),
          FIELD(W),           FIELD(x),
          FIELD(weight),      FIELD(bias)};
}

template <class Params>
Fields<Params> causal_conv1d_sequences() {
  return causal_conv1d_operands<Params>() +
         Fields<Params>{FIELD(seq_idx), FIELD(N), FIELD(cu_seqlens), FIELD(initial_states)};
}

template <>
inline Fields<CausalConv1dFwdParams> fields_of() {
  using Params = CausalConv1dFwdParams;
  return causal_conv1d_sequences<Params>() + Fields<Params>{FIELD(y)};
}

template <>
inline Fields<CausalConv1dBwdParams> fields_of() {
  using Params = CausalConv1dBwdParams;
  return causal_conv1d_sequences<Params>() +
         Fields<Params>{FIELD(dy),      FIELD(num_blocks),      FIELD(dx),
                        FIELD(dweight), FIELD(dinitial_states), FIELD(partials)};
}

template <>
inline Fields<CausalConv1dUpdateParams> fields_of() {
  using Params = CausalConv1dUpdateParams;
  return causal_conv1d_operands<Params>() +
         Fields<Params>{FIELD(L),          FIELD(num_slots), FIELD(cache_seqlens), FIELD(state_indices),
                        FIELD(conv_state), FIELD(y)};
}

template <class Params>
Fields<Params> rms_norm_operands() {
  return {FIELD(dtype), FIELD(weight_dtype), FIELD(num_threads), FIELD(rows),
          FIELD(D),     FIELD(eps),          FIELD(weight)};
}

// Of the backward; they come last.
template <class Params>
Fields<Params> rms_norm_sums() {
  return {OPTIONAL(num_blocks), OPTIONAL(dweight), OPTIONAL(partials)};
}

template <class Params>
Fields<Params> rms_norm_rope_operands() {
  return rms_norm_operands<Params>() +
         Fields<Params>{FIELD(T),   FIELD(H),  FIELD(x), FIELD(angle_dtype), FIELD(shared_angles),
                        FIELD(cos), FIELD(sin)};
}

template <>
inline Fields<RmsNormRopeFwdParams> fields_of() {
  using Params = RmsNormRopeFwdParams;
  return rms_norm_rope_operands<Params>() + Fields<Params>{FIELD(y)};
}

template <>
inline Fields<RmsNormRopeBwdParams> fields_of() {
  using Params = RmsNormRopeBwdParams;
  return rms_norm_rope_operands<Params>() + Fields<Params>{FIELD(dy), FIELD(dx)} + rms_norm_sums<Params>();
}

template <>
inline Fields<RmsNormGatedFwdParams> fields_of() {
  using Params = RmsNormGatedFwdParams;
  return rms_norm_operands<Params>() + Fields<Params>{FIELD(silu), FIELD(x), FIELD(g), FIELD(y)};
}

template <>
inline Fields<RmsNormGatedBwdParams> fields_of() {
  using Params = RmsNormGatedBwdParams;
  return rms_norm_operands<Params>() +
         Fields<Params>{FIELD(silu), FIELD(x), FIELD(g), FIELD(dy), FIELD(dx), FIELD(dg)} +
         rms_norm_sums<Params>();
}

template <>
inline Fields<AddRmsNormFwdParams> fields_of() {
  using Params = AddRmsNormFwdParams;
  return rms_norm_operands<Params>() +
         Fields<Params>{FIELD(x_dtype), FIELD(x), FIELD(residual), FIELD(sum), FIELD(y)};
}

template <>
inline Fields<AddRmsNormBwdParams> fields_of() {
  using Params = AddRmsNormBwdParams;
  return rms_norm_operands<Params>() +
         Fields<Params>{FIELD(x_dtype), FIELD(sum), FIELD(dsum), FIELD(dy), FIELD(dresidual), FIELD(dx)} +
         rms_norm_sums<Params>();
}

template <>
inline Fields<SwigluFwdParams> fields_of() {
  using Params = SwigluFwdParams;
  return {FIELD(dtype), FIELD(num_threads), FIELD(size), FIELD(x), FIELD(y), FIELD(z)};
}

template <>
inline Fields<SwigluBwdParams> fields_of() {
  using Params = SwigluBwdParams;
  return {FIELD(dtype), FIELD(num_threads), FIELD(size), FIELD(x), FIELD(y), FIELD(dz), FIELD(dx), FIELD(dy)};
}

}  // namespace hypenet
