// Everything that the native code can run. A function takes a dict of the fields of its params struct
// (params.h), that of a CUDA kernel a stream too. One file, two kinds of module: HYPENET_CUDA says which.
#include "bind.h"
#include "cpu/kernels.h"
#include "cuda/kernels.h"
#if HYPENET_EMULATED
#include "emu/module.h"
#endif

namespace hypenet {
namespace {

void bind_all(py::module_& m) {
#define GATED_DELTA_FIELDS(P)                                                                         \
  FIELD(P, dtype), FIELD(P, delta), FIELD(P, num_threads), FIELD(P, B), FIELD(P, T), FIELD(P, H),     \
      FIELD(P, HV), FIELD(P, K), FIELD(P, V), FIELD(P, scale), FIELD(P, q), FIELD(P, k), FIELD(P, v), \
      FIELD(P, g), FIELD(P, beta)
#define SEGMENT_FIELDS(P)                                                                           \
  FIELD(P, segment_chunks), FIELD(P, num_segments), FIELD(P, segment_offsets), FIELD(P, transfers), \
      FIELD(P, segment_states)
#define HYPE_FIELDS(P)                                                                                      \
  FIELD(P, dtype), FIELD(P, num_threads), FIELD(P, B), FIELD(P, T), FIELD(P, H), FIELD(P, HK), FIELD(P, D), \
      FIELD(P, scale), FIELD(P, logit_scale_base), FIELD(P, q), FIELD(P, k), FIELD(P, v), FIELD(P, gate)

  using Step = GatedDeltaStepParams;
  const std::vector<Field<Step>> step = {GATED_DELTA_FIELDS(Step),    FIELD(Step, use_qk_l2norm),
                                         FIELD(Step, gates_in_dtype), FIELD(Step, beta_limit),
                                         FIELD(Step, A_log),          FIELD(Step, dt_bias),
                                         FIELD(Step, num_slots),      FIELD(Step, state_indices),
                                         FIELD(Step, state),          FIELD(Step, o)};

  using Decode = HypeAttentionDecodeParams;
  const std::vector<Field<Decode>> decode = {HYPE_FIELDS(Decode),
                                             FIELD(Decode, capacity),
                                             FIELD(Decode, num_segments),
                                             FIELD(Decode, cache_seqlens),
                                             FIELD(Decode, k_cache),
                                             FIELD(Decode, v_cache),
                                             FIELD(Decode, o),
                                             FIELD(Decode, partial_o),
                                             FIELD(Decode, partial_softmax)};

  using Fwd = GatedDeltaFwdParams;
  std::vector<Field<Fwd>> fwd = {GATED_DELTA_FIELDS(Fwd),   FIELD(Fwd, N), FIELD(Fwd, cu_seqlens),
                                 FIELD(Fwd, initial_state), FIELD(Fwd, o), FIELD(Fwd, final_state)};

  using Bwd = GatedDeltaBwdParams;
  std::vector<Field<Bwd>> bwd = {GATED_DELTA_FIELDS(Bwd), FIELD(Bwd, N),
                                 FIELD(Bwd, cu_seqlens),  FIELD(Bwd, initial_state),
                                 FIELD(Bwd, do_),         FIELD(Bwd, dfinal_state),
                                 FIELD(Bwd, dq),          FIELD(Bwd, dk),
                                 FIELD(Bwd, dv),          FIELD(Bwd, dg),
                                 FIELD(Bwd, dbeta),       FIELD(Bwd, dinitial_state)};

  using HypeFwd = HypeAttentionFwdParams;
  const std::vector<Field<HypeFwd>> hype_fwd = {
      HYPE_FIELDS(HypeFwd),       FIELD(HypeFwd, S), FIELD(HypeFwd, N),         FIELD(HypeFwd, query_offset),
      FIELD(HypeFwd, cu_seqlens), FIELD(HypeFwd, o), FIELD(HypeFwd, o_ungated), FIELD(HypeFwd, lse)};

  using HypeBwd = HypeAttentionBwdParams;
  const std::vector<Field<HypeBwd>> hype_bwd = {
      HYPE_FIELDS(HypeBwd),         FIELD(HypeBwd, S),          FIELD(HypeBwd, N),
      FIELD(HypeBwd, query_offset), FIELD(HypeBwd, cu_seqlens), FIELD(HypeBwd, o_ungated),
      FIELD(HypeBwd, lse),          FIELD(HypeBwd, do_),        FIELD(HypeBwd, dq),
      FIELD(HypeBwd, dk),           FIELD(HypeBwd, dv),         FIELD(HypeBwd, dgate),
      FIELD(HypeBwd, do_ungated),   FIELD(HypeBwd, row_terms)};

#if HYPENET_CUDA
  fwd.insert(fwd.end(), {FIELD(Fwd, num_chunks), FIELD(Fwd, G), FIELD(Fwd, L), FIELD(Fwd, h),
                         FIELD(Fwd, chunk_offsets), SEGMENT_FIELDS(Fwd), FIELD(Fwd, P)});
  def_kernel<Fwd>(m, "gated_delta_chunk_fwd", cuda::gated_delta_chunk_fwd, fwd);
  py::list head_dims;
  for (const int64_t D : cuda::kAttentionHeadDims) head_dims.append(D);
  m.attr("ATTENTION_HEAD_DIMS") = py::tuple(head_dims);
  def_kernel<HypeFwd>(m, "hype_attention_fwd", cuda::hype_attention_fwd, hype_fwd);
  def_kernel<HypeBwd>(m, "hype_attention_bwd", cuda::hype_attention_bwd, hype_bwd);
  m.attr("STEP_MAX_KEY_DIM") = cuda::kStepMaxKeyDim;
  def_kernel<Step>(m, "gated_delta_step", cuda::gated_delta_step, step);

  m.attr("DECODE_MAX_DIM") = cuda::kDecodeMaxDim;
  m.attr("DECODE_SEGMENT") = cuda::kDecodeSegment;
  m.attr("DECODE_MAX_SEGMENTS") = cuda::kDecodeMaxSegments;
  def_kernel<Decode>(m, "hype_attention_decode", cuda::hype_attention_decode, decode);
  bwd.insert(bwd.end(),
             {FIELD(Bwd, num_chunks), FIELD(Bwd, G), FIELD(Bwd, L), FIELD(Bwd, h), FIELD(Bwd, chunk_offsets),
              SEGMENT_FIELDS(Bwd), FIELD(Bwd, dstates), FIELD(Bwd, dB_low)});
  def_kernel<Bwd>(m, "gated_delta_chunk_bwd", cuda::gated_delta_chunk_bwd, bwd);
#else
  def_kernel<Step>(m, "gated_delta_step", cpu::gated_delta_step, step);

  def_kernel<Fwd>(m, "gated_delta_chunk_fwd", cpu::gated_delta_chunk_fwd, fwd);
  def_kernel<Fwd>(m, "gated_delta_recurrent_fwd", cpu::gated_delta_recurrent_fwd, fwd);

  def_kernel<Bwd>(m, "gated_delta_chunk_bwd", cpu::gated_delta_chunk_bwd, bwd);

  def_kernel<HypeFwd>(m, "hype_attention_fwd", cpu::hype_attention_fwd, hype_fwd);
  def_kernel<HypeBwd>(m, "hype_attention_bwd", cpu::hype_attention_bwd, hype_bwd);

  def_kernel<Decode>(m, "hype_attention_decode", cpu::hype_attention_decode, decode);
#endif
}

}  // namespace
}  // namespace hypenet

// This object is linked into every module of its kind; each is entered by its own name.
#if HYPENET_EMULATED
PYBIND11_MODULE(_emulated, m) {
  hypenet::bind_all(m);
  hypenet::emu::bind_machine(m);
}
#elif HYPENET_CUDA
PYBIND11_MODULE(_cuda, m) { hypenet::bind_all(m); }
#else
PYBIND11_MODULE(_cpu_baseline, m) { hypenet::bind_all(m); }
PYBIND11_MODULE(_cpu_v3, m) { hypenet::bind_all(m); }
PYBIND11_MODULE(_cpu_v4, m) { hypenet::bind_all(m); }
PYBIND11_MODULE(_cpu_v4_bf16, m) { hypenet::bind_all(m); }
#endif
