"""Simple gated linear attention, for every value head, from S_0 = initial_state or 0:

S_t = e^{g_t} S_{t-1} + k_t v_t^T        state [K, V]
o_t = scale S_t^T q_t                    value head j reads key head j // (HV / H)

With a decay g_gamma that is constant in t this is Lightning attention and RetNet, with a computed g Mamba2's core.
Source: Lightning Attention-2 (arXiv 2401.04658), Mamba2 (arXiv 2405.21060); the kernels are the gated delta rule's
without the delta correction, see csrc/cpu/gated_delta_chunk_fwd.cpp.
"""

import torch

from hypenet_kernels import _checks, _recurrence


def chunk_simple_gla(
    q,
    k,
    v,
    g=None,
    g_gamma=None,
    scale=None,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
    split_sequence=False,
    **other_arguments,
):
    """Simple gated linear attention over whole sequences, chunk by chunk.

    q, k: [B, T, H, K]; v: [B, T, HV, V] with HV a multiple of H; all of one dtype (float64, float32, bfloat16; on CUDA
    bfloat16 or float16, and K <= 128), any strides. The natural log of the decay, <= 0, is g: [B, T, HV], or g_gamma:
    [HV], the same for all tokens, or absent: no decay. Below -50 it counts as -50 and gets no gradient, so -inf (a
    reset) is legal. g, g_gamma, initial_state: any float dtype, computed in the accumulation type (float64 for float64,
    else float32). scale: default K ** -0.5.
    initial_state: [N, HV, K, V]. cu_seqlens: [N + 1] int32 or int64, the bounds of sequences packed along T (then
    B = 1; else N = B).
    split_sequence: on CUDA, lets long sequences of few heads use the whole device. They are cut into segments that are
    gone through at the same time, for 2.25 times the work; into how many follows from shapes alone. Results then differ
    in rounding. Where it cannot pay, and on the CPU, it changes nothing.
    fla's further arguments are accepted where they ask for nothing that is not done here.

    Returns (o [B, T, HV, V] in q's dtype, final_state [N, HV, K, V] in the accumulation type or None).
    Differentiable once in q, k, v, g, g_gamma and initial_state, through o and final_state.
    Raises TypeError (dtype, unknown argument), ValueError (shape, device, range), NotImplementedError (device, dtype or
    option that is not built).
    """
    op = "chunk_simple_gla"
    _recurrence.check_other_arguments(op, other_arguments)
    options = scale, initial_state, output_final_state, cu_seqlens, split_sequence
    return _sequences(op, _chunk, q, k, v, g, g_gamma, *options)


def fused_recurrent_simple_gla(
    q,
    k,
    v,
    g=None,
    g_gamma=None,
    scale=None,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
    **other_arguments,
):
    """Simple gated linear attention token by token, for short sequences: `chunk_simple_gla` in everything else.

    The gradient goes through the chunk form. On CUDA, up to 16 tokens without cu_seqlens and without a gradient go one
    by one, in float32 any number of them; all else is the chunk form.
    """
    op = "fused_recurrent_simple_gla"
    _recurrence.check_other_arguments(op, other_arguments)
    return _sequences(op, _recurrent, q, k, v, g, g_gamma, scale, initial_state, output_final_state, cu_seqlens)


def simple_gla_step(
    q, k, v, g, state, *, scale=None, state_indices=None, use_gate_in_kernel=False, A_log=None, dt_bias=None
):
    """T tokens (usually one) of every sequence in decoding; `state` is updated in place.

    q, k: [B, T, H, K]; v: [B, T, HV, V]; g: [B, T, HV]; dtypes, scale and errors as in `chunk_simple_gla`.
    state: [B, HV, K, V], contiguous, in the accumulation type. With state_indices ([B], int32 or int64) it is a pool of
    any number of slots, and sequence b's is state[state_indices[b]]; where the index is negative, b is skipped and
    its o is 0.
    use_gate_in_kernel: the log decay is -exp(A_log) softplus(g + dt_bias); A_log: [HV], dt_bias: [HV] or None for 0.
    It is computed in the accumulation type; a g in q's dtype is read as it is.
    Returns o: [B, T, HV, V]. No gradient; allocates nothing else.
    """
    op = "simple_gla_step"
    required = {"q": q, "k": k, "v": v, "g": g, "state": state}
    optional = {"state_indices": state_indices, "A_log": A_log, "dt_bias": dt_bias}
    _recurrence.check_tensors(op, required, optional)
    _checks.no_grad(op, required, optional)
    g, _, A_log, dt_bias = _recurrence.step_gates(op, q, g, None, use_gate_in_kernel, A_log, dt_bias)
    return _step(q, k, v, g, state, state_indices, A_log, dt_bias, _recurrence.default_scale(q, scale))


def _sequences(
    op, operator, q, k, v, g, g_gamma, scale, initial_state, output_final_state, cu_seqlens, split_sequence=False
):
    if g_gamma is not None:
        _recurrence.check_tensors(op, {"q": q, "v": v, "g_gamma": g_gamma}, {})
        if g is not None:
            _checks.fail(ValueError, op, "g_gamma", "be left out where g is given", list(g_gamma.shape))
        _checks.rank(op, "v", v, "B T HV V")
        _checks.shape(op, "g_gamma", g_gamma, v.shape[2:3])
        g = _recurrence.accumulated(op, "g_gamma", g_gamma, q).expand(v.shape[:3])
    return _recurrence.run(
        op,
        operator,
        q,
        k,
        v,
        {"g": g},
        scale,
        initial_state,
        output_final_state,
        False,
        cu_seqlens,
        split_sequence,
        defaults={"g": 0.0},
    )


def _chunk_cpu(q, k, v, g, initial_state, cu_seqlens, scale, segment_chunks, save):
    kernel, op = "gated_delta_chunk_fwd", "chunk_simple_gla"
    return _recurrence.forward_cpu(kernel, op, q, k, v, g, None, initial_state, cu_seqlens, scale, save)


def _chunk_cuda(q, k, v, g, initial_state, cu_seqlens, scale, segment_chunks, save):
    op = "chunk_simple_gla"
    return _recurrence.forward_cuda(op, q, k, v, g, None, initial_state, cu_seqlens, scale, segment_chunks, save)


def _chunk_fake(q, k, v, g, initial_state, cu_seqlens, scale, segment_chunks, save):
    return _recurrence.forward_fake(
        "chunk_simple_gla", q, k, v, g, None, initial_state, cu_seqlens, segment_chunks, save
    )


def _chunk_bwd_cpu(do, dfinal_state, q, k, v, g, initial_state, cu_seqlens, saved, scale, segment_chunks):
    op = "chunk_simple_gla_bwd"
    return _recurrence.backward_cpu(op, do, dfinal_state, q, k, v, g, None, initial_state, cu_seqlens, scale)


def _chunk_bwd_cuda(do, dfinal_state, q, k, v, g, initial_state, cu_seqlens, saved, scale, segment_chunks):
    op = "chunk_simple_gla_bwd"
    return _recurrence.backward_cuda(
        op, do, dfinal_state, q, k, v, g, None, initial_state, cu_seqlens, saved, scale, segment_chunks
    )


def _chunk_bwd_fake(do, dfinal_state, q, k, v, g, initial_state, cu_seqlens, saved, scale, segment_chunks):
    op = "chunk_simple_gla_bwd"
    return _recurrence.backward_fake(op, do, dfinal_state, q, k, v, g, None, initial_state, cu_seqlens)


def _recurrent_cpu(q, k, v, g, initial_state, cu_seqlens, scale, segment_chunks, save):
    kernel, op = "gated_delta_recurrent_fwd", "fused_recurrent_simple_gla"
    return _recurrence.forward_cpu(kernel, op, q, k, v, g, None, initial_state, cu_seqlens, scale, save)


def _recurrent_cuda(q, k, v, g, initial_state, cu_seqlens, scale, segment_chunks, save):
    op = "fused_recurrent_simple_gla"
    return _recurrence.recurrent_cuda(op, q, k, v, g, None, initial_state, cu_seqlens, scale, segment_chunks, save)


def _recurrent_fake(q, k, v, g, initial_state, cu_seqlens, scale, segment_chunks, save):
    op = "fused_recurrent_simple_gla"
    return _recurrence.forward_fake(op, q, k, v, g, None, initial_state, cu_seqlens, segment_chunks, save)


def _step_run(q, k, v, g, *args):
    return _recurrence.step("simple_gla_step", q, k, v, g, None, *args)


def _step_fake(q, k, v, g, state, state_indices, A_log, dt_bias, scale):
    return _recurrence.step_fake("simple_gla_step", q, k, v, g, None, state, state_indices, A_log, dt_bias)


def _backward(ctx, do, dfinal_state, *_):
    return _recurrence.backward(ctx, _chunk_bwd, do, dfinal_state)


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor g, Tensor? initial_state, Tensor? cu_seqlens"
_GRADIENTS = "Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dinitial_state"
_STEP = (
    "Tensor q, Tensor k, Tensor v, Tensor g, Tensor(a!) state, Tensor? state_indices, Tensor? A_log, "
    "Tensor? dt_bias, float scale"
)
_library = torch.library.Library("hypenet", "FRAGMENT")
_chunk = _recurrence.register_forward(
    _library, "chunk_simple_gla", _INPUTS, _chunk_fake, _chunk_cpu, _chunk_cuda, _backward
)
_recurrent = _recurrence.register_forward(
    _library, "fused_recurrent_simple_gla", _INPUTS, _recurrent_fake, _recurrent_cpu, _recurrent_cuda, _backward
)
_chunk_bwd = _recurrence.register_backward(
    _library, "chunk_simple_gla", _INPUTS, _GRADIENTS, _chunk_bwd_fake, _chunk_bwd_cpu, _chunk_bwd_cuda
)
_recurrence.register(_library, f"simple_gla_step({_STEP}) -> Tensor", _step_fake, _step_run, _step_run)
_step = torch.ops.hypenet.simple_gla_step.default
