"""The gated delta rule, for every value head, from S_0 = initial_state or 0:

S_t = e^{g_t} (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        state [K, V]
o_t = scale S_t^T q_t                                                  value head j reads key head j // (HV / H)

Source: Gated Delta Networks (arXiv 2412.06464), equation 10; chunk form: see csrc/cpu/gated_delta_chunk_fwd.cpp.
"""

import torch

from hypenet_kernels import _checks, _recurrence


def chunk_gated_delta_rule(
    q,
    k,
    v,
    g,
    beta,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    cu_seqlens=None,
    split_sequence=False,
    **other_arguments,
):
    """The gated delta rule over whole sequences, chunk by chunk.

    q, k: [B, T, H, K]; v: [B, T, HV, V] with HV a multiple of H; all of one dtype (float64, float32, bfloat16; on CUDA
    bfloat16 or float16, and K <= 128), any strides. g: [B, T, HV], natural log of the decay, <= 0; below -50 it counts
    as -50 and gets no gradient, so -inf (a reset) is legal. beta: [B, T, HV], in [0, 2] where |k| = 1. g, beta,
    initial_state: any float dtype, computed in the accumulation type (float64 for float64, else float32). scale:
    default K ** -0.5. initial_state: [N, HV, K, V].
    use_qk_l2norm_in_kernel: q and k are divided by sqrt(sum of squares + 1e-6) first. cu_seqlens: [N + 1] int32 or
    int64, the bounds of sequences packed along T (then B = 1; else N = B).
    split_sequence: on CUDA, lets long sequences of few heads use the whole device. They are cut into segments that are
    gone through at the same time, for 2.25 times the work; into how many follows from shapes alone. Results then differ
    in rounding. Where it cannot pay, and on the CPU, it changes nothing.
    fla's and transformers' further arguments are accepted where they ask for nothing that is not done here.

    Returns (o [B, T, HV, V] in q's dtype, final_state [N, HV, K, V] in the accumulation type or None).
    Differentiable once in q, k, v, g, beta and initial_state, through o and final_state.
    Raises TypeError (dtype, unknown argument), ValueError (shape, device, range), NotImplementedError (device, dtype or
    option that is not built).
    """
    op = "chunk_gated_delta_rule"
    _recurrence.check_other_arguments(op, other_arguments)
    return _recurrence.run(
        op,
        _chunk,
        q,
        k,
        v,
        {"g": g, "beta": beta},
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        cu_seqlens,
        split_sequence,
    )


def fused_recurrent_gated_delta_rule(
    q,
    k,
    v,
    g=None,
    beta=None,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    cu_seqlens=None,
    **other_arguments,
):
    """The gated delta rule token by token, for short sequences: `chunk_gated_delta_rule` in everything else.

    g: None for no decay; beta: None for 1. The gradient goes through the chunk form. On CUDA, up to 16 tokens without
    cu_seqlens and without a gradient go one by one, in float32 any number of them; all else is the chunk form.
    """
    op = "fused_recurrent_gated_delta_rule"
    _recurrence.check_other_arguments(op, other_arguments)
    return _recurrence.run(
        op,
        _recurrent,
        q,
        k,
        v,
        {"g": g, "beta": beta},
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        cu_seqlens,
        defaults={"g": 0.0, "beta": 1.0},
    )


def gated_delta_step(
    q,
    k,
    v,
    g,
    beta,
    state,
    *,
    scale=None,
    state_indices=None,
    use_qk_l2norm_in_kernel=False,
    use_gate_in_kernel=False,
    A_log=None,
    dt_bias=None,
    use_beta_sigmoid_in_kernel=False,
    allow_neg_eigval=False,
):
    """T tokens (usually one) of every sequence in decoding; `state` is updated in place.

    q, k: [B, T, H, K]; v: [B, T, HV, V]; g, beta: [B, T, HV]; dtypes, scale and errors as in `chunk_gated_delta_rule`.
    state: [B, HV, K, V], contiguous, in the accumulation type. With state_indices ([B], int32 or int64) it is a pool of
    any number of slots, and sequence b's is state[state_indices[b]]; where the index is negative, b is skipped and
    its o is 0.
    use_gate_in_kernel: the log decay is -exp(A_log) softplus(g + dt_bias), g being what a layer projects (fla's a);
    A_log: [HV], dt_bias: [HV] or None for 0. use_beta_sigmoid_in_kernel: beta is a logit, for sigmoid(beta), or
    2 sigmoid(beta) with allow_neg_eigval. Both are computed in the accumulation type; g and beta that share q's dtype
    are read as they are.
    Returns o: [B, T, HV, V]. No gradient; allocates nothing else.
    """
    op = "gated_delta_step"
    required = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "state": state}
    optional = {"state_indices": state_indices, "A_log": A_log, "dt_bias": dt_bias}
    _recurrence.check_tensors(op, required, optional)
    _checks.no_grad(op, required, optional)
    if allow_neg_eigval and not use_beta_sigmoid_in_kernel:
        _checks.fail(ValueError, op, "allow_neg_eigval", "be False without use_beta_sigmoid_in_kernel", True)
    beta_limit = (2.0 if allow_neg_eigval else 1.0) if use_beta_sigmoid_in_kernel else 0.0
    g, beta, A_log, dt_bias = _recurrence.step_gates(op, q, g, beta, use_gate_in_kernel, A_log, dt_bias)
    scale = _recurrence.default_scale(q, scale)
    return _step(q, k, v, g, beta, state, state_indices, A_log, dt_bias, scale, use_qk_l2norm_in_kernel, beta_limit)


def _chunk_cpu(q, k, v, g, beta, initial_state, cu_seqlens, scale, segment_chunks, save):
    kernel, op = "gated_delta_chunk_fwd", "chunk_gated_delta_rule"
    return _recurrence.forward_cpu(kernel, op, q, k, v, g, beta, initial_state, cu_seqlens, scale, save)


def _chunk_cuda(q, k, v, g, beta, initial_state, cu_seqlens, scale, segment_chunks, save):
    op = "chunk_gated_delta_rule"
    return _recurrence.forward_cuda(op, q, k, v, g, beta, initial_state, cu_seqlens, scale, segment_chunks, save)


def _chunk_fake(q, k, v, g, beta, initial_state, cu_seqlens, scale, segment_chunks, save):
    return _recurrence.forward_fake(
        "chunk_gated_delta_rule", q, k, v, g, beta, initial_state, cu_seqlens, segment_chunks, save
    )


def _chunk_bwd_cpu(do, dfinal_state, q, k, v, g, beta, initial_state, cu_seqlens, saved, scale, segment_chunks):
    op = "chunk_gated_delta_rule_bwd"
    return _recurrence.backward_cpu(op, do, dfinal_state, q, k, v, g, beta, initial_state, cu_seqlens, scale)


def _chunk_bwd_cuda(do, dfinal_state, q, k, v, g, beta, initial_state, cu_seqlens, saved, scale, segment_chunks):
    op = "chunk_gated_delta_rule_bwd"
    return _recurrence.backward_cuda(
        op, do, dfinal_state, q, k, v, g, beta, initial_state, cu_seqlens, saved, scale, segment_chunks
    )


def _chunk_bwd_fake(do, dfinal_state, q, k, v, g, beta, initial_state, cu_seqlens, saved, scale, segment_chunks):
    op = "chunk_gated_delta_rule_bwd"
    return _recurrence.backward_fake(op, do, dfinal_state, q, k, v, g, beta, initial_state, cu_seqlens)


def _recurrent_cpu(q, k, v, g, beta, initial_state, cu_seqlens, scale, segment_chunks, save):
    kernel, op = "gated_delta_recurrent_fwd", "fused_recurrent_gated_delta_rule"
    return _recurrence.forward_cpu(kernel, op, q, k, v, g, beta, initial_state, cu_seqlens, scale, save)


def _recurrent_cuda(q, k, v, g, beta, initial_state, cu_seqlens, scale, segment_chunks, save):
    op = "fused_recurrent_gated_delta_rule"
    return _recurrence.recurrent_cuda(op, q, k, v, g, beta, initial_state, cu_seqlens, scale, segment_chunks, save)


def _recurrent_fake(q, k, v, g, beta, initial_state, cu_seqlens, scale, segment_chunks, save):
    op = "fused_recurrent_gated_delta_rule"
    return _recurrence.forward_fake(op, q, k, v, g, beta, initial_state, cu_seqlens, segment_chunks, save)


def _step_run(*args):
    return _recurrence.step("gated_delta_step", *args)


def _step_fake(q, k, v, g, beta, state, state_indices, A_log, dt_bias, *_):
    return _recurrence.step_fake("gated_delta_step", q, k, v, g, beta, state, state_indices, A_log, dt_bias)


def _backward(ctx, do, dfinal_state, *_):
    return _recurrence.backward(ctx, _chunk_bwd, do, dfinal_state)


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? initial_state, Tensor? cu_seqlens"
_GRADIENTS = "Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dbeta, Tensor dinitial_state"
_STEP = (
    "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor(a!) state, Tensor? state_indices, Tensor? A_log, "
    "Tensor? dt_bias, float scale, bool use_qk_l2norm, float beta_limit"
)
_library = torch.library.Library("hypenet", "FRAGMENT")
_chunk = _recurrence.register_forward(
    _library, "chunk_gated_delta_rule", _INPUTS, _chunk_fake, _chunk_cpu, _chunk_cuda, _backward
)
_recurrent = _recurrence.register_forward(
    _library, "fused_recurrent_gated_delta_rule", _INPUTS, _recurrent_fake, _recurrent_cpu, _recurrent_cuda, _backward
)
_chunk_bwd = _recurrence.register_backward(
    _library, "chunk_gated_delta_rule", _INPUTS, _GRADIENTS, _chunk_bwd_fake, _chunk_bwd_cpu, _chunk_bwd_cuda
)
_recurrence.register(_library, f"gated_delta_step({_STEP}) -> Tensor", _step_fake, _step_run, _step_run)
_step = torch.ops.hypenet.gated_delta_step.default
