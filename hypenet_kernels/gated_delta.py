"""The gated delta rule, for every value head, from S_0 = initial_state or 0:

S_t = e^{g_t} (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        state [K, V]
o_t = scale S_t^T q_t                                                  value head j reads key head j // (HV / H)

Source: Gated Delta Networks (arXiv 2412.06464), equation 10; chunk form: see csrc/cpu/gated_delta_chunk_fwd.cpp.
"""

from typing import Any

from torch import Tensor

from hypenet_kernels import _fla, _recurrence
from hypenet_kernels._fla import Gates, Options, Result
from hypenet_kernels._recurrence import Inputs, Rule, StepInputs

CHUNK_SIZES = (16, 32, 64)  # that fla takes
_CHUNK = Rule("chunk_gated_delta_rule", "gated_delta_chunk_fwd", True, False, False)
_RECURRENT = Rule("fused_recurrent_gated_delta_rule", "gated_delta_recurrent_fwd", True, True, True)


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: None = None,
    *,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    split_sequence: bool = False,
    state_indices: Tensor | None = None,
    checkpoint_every: int | None = None,
    **legacy: Any,
) -> Result:
    """Compute the gated delta rule over whole sequences, in chunks.

    Arguments and their order are flash-linear-attention's (0.6). Differentiable once in q, k, v, g, beta, A_log,
    dt_bias and initial_state, through o and final_state.

    Args:
        q, k: [B, T, H, K], any strides; float64, float32, bfloat16 or float16, on CUDA bfloat16 or float16 and K up to
            256. Where the types of q, k and v differ, all are promoted.
        v: [B, T, HV, V], with HV a multiple of H.
        g: [B, T, HV], natural log of the decay, <= 0. Below -50 it counts as -50 and gets no gradient, so that -inf (a
            reset) is legal. Any float type, as beta and initial_state: they are computed in the accumulation type,
            float64 for float64, else float32.
        beta: [B, T, HV], in [0, 2] where |k| = 1.
        scale: default K ** -0.5.
        initial_state: [N, HV, K, V], any strides; N = B, or the number of packed sequences. Default: zeros.
        output_final_state: whether to return the state after the last token.
        use_qk_l2norm_in_kernel: divide q and k by sqrt(sum of squares + 1e-6) first. Where that sum overflows float32
            (|k| above 1.8e19) the vector becomes 0, as in fla.
        use_beta_sigmoid_in_kernel: beta is a logit, for sigmoid(beta), or 2 sigmoid(beta) with allow_neg_eigval.
        state_v_first: states are [N, HV, V, K]. The returned one is a view that costs nothing to pass back.
        cu_seqlens: [N + 1] int32 or int64, bounds of sequences packed along T (then B = 1). It may end before T: o is 0
            from there on.
        cu_seqlens_cpu, chunk_indices: hints of fla's that are not needed here; ignored.
        use_gate_in_kernel: the log decay is -exp(A_log) softplus(g + dt_bias), g being what a layer projects.
        A_log, dt_bias: [HV]; ignored without use_gate_in_kernel. dt_bias: default 0.
        split_sequence: on CUDA, cut long sequences of few heads into segments that run in parallel, for 2.25 times the
            work: use it when B * HV is far below the number of SMs. How many segments follows from shapes alone;
            results differ in rounding. Where it cannot pay, and on the CPU, it changes nothing.
        state_indices: [N] int32 or int64: initial_state is a pool [slots, HV, K, V] of which sequence n reads and
            updates slot state_indices[n] in place. Slots may be any stride apart; a negative index skips the sequence
            (its o is 0). final_state is then the pool. No gradient.
        checkpoint_every: a multiple of 64: also return the state after every so many tokens. No gradient.
        **legacy: chunk_size (16, 32 or 64; it changes no result), head_first=False, transpose_state_layout.

    Returns:
        (o, final_state): o [B, T, HV, V] in q's dtype; final_state [N, HV, K, V] in the accumulation type, or None.
        With checkpoint_every also checkpoints [B, T // checkpoint_every, HV, K, V]: entry i is the state after
        (i + 1) * checkpoint_every tokens. Those of a packed sequence begin at entry cu_seqlens[n] // checkpoint_every.

    Raises:
        TypeError: dtype, or an unknown argument.
        ValueError: shape, device, layout or range.
        NotImplementedError: a device, dtype or option that is not built.

    Example:
        >>> import torch
        >>> q, k = (torch.nn.functional.normalize(torch.randn(1, 100, 2, 64), dim=-1) for _ in range(2))
        >>> v, g, beta = torch.randn(1, 100, 4, 64), -torch.rand(1, 100, 4), torch.rand(1, 100, 4)
        >>> o, state = chunk_gated_delta_rule(q, k, v, g, beta, output_final_state=True)
        >>> o.shape, state.shape
        (torch.Size([1, 100, 4, 64]), torch.Size([1, 4, 64, 64]))
    """
    op = _CHUNK.op
    if legacy:
        state_v_first = _fla.legacy(op, legacy, state_v_first, CHUNK_SIZES)
    if cp_context is not None:
        _fla.refuse(op, cp_context=cp_context)
    gates = None
    if use_gate_in_kernel or use_beta_sigmoid_in_kernel or allow_neg_eigval:
        gates = Gates(use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    every = 0 if checkpoint_every is None else _fla.check_interval(op, checkpoint_every)
    x = Inputs(q, k, v, g, beta, initial_state, cu_seqlens, scale, 0, every, state_indices)
    options = Options(output_final_state, state_v_first, use_qk_l2norm_in_kernel, split_sequence, gates)
    return _fla.run(_CHUNK, _chunk, x, options)


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: None = None,
    gv: None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    state_indices: Tensor | None = None,
    checkpoint_every: int | None = None,
    **legacy: Any,
) -> Result:
    """Compute the gated delta rule token by token, for short sequences: `chunk_gated_delta_rule` in everything else.

    The gradient goes through the chunk form. On CUDA, up to 16 tokens without cu_seqlens and without a gradient go one
    by one, in float32 any number of them; all else is the chunk form.

    Args:
        g: None for no decay.
        beta: None for 1.
        gk, gv: fla's decays per channel, which are not built.

    Returns:
        As `chunk_gated_delta_rule`; o in v's dtype.
    """
    op = _RECURRENT.op
    if legacy:
        state_v_first = _fla.legacy(op, legacy, state_v_first, CHUNK_SIZES)
    if gk is not None or gv is not None:
        _fla.refuse(op, gk=gk, gv=gv)
    gates = None
    if use_gate_in_kernel or use_beta_sigmoid_in_kernel or allow_neg_eigval:
        gates = Gates(use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    every = 0 if checkpoint_every is None else _fla.check_interval(op, checkpoint_every)
    x = Inputs(q, k, v, g, beta, initial_state, cu_seqlens, scale, 0, every, state_indices)
    options = Options(output_final_state, state_v_first, use_qk_l2norm_in_kernel, False, gates)
    return _fla.run(_RECURRENT, _recurrent, x, options)


def gated_delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    state_indices: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    output_states: bool = False,
) -> Any:
    """Compute T tokens (usually one) of every sequence in decoding, and update `state` in place.

    Allocates nothing but o. No gradient.

    Args:
        q, k: [B, T, H, K]; v: [B, T, HV, V]; g, beta: [B, T, HV]. Types, scale and flags as in
            `chunk_gated_delta_rule`; on CUDA float32 too. g and beta that share q's dtype are read as they are.
        state: [B, HV, K, V] in the accumulation type. With state_indices a pool of any number of slots, any stride
            apart, each slot contiguous.
        state_indices: [B] int32 or int64: sequence b's state is state[state_indices[b]]. A negative index skips b: its
            o is 0.
        output_states: leave `state` as it is and return the state after each token, for `commit_states` to choose from
            once it is known how many draft tokens were accepted.

    Returns:
        o [B, T, HV, V]; with output_states (o, states [B, T, HV, K, V]).

    Raises:
        As `chunk_gated_delta_rule`; a slot that does not exist is a ValueError on the CPU, and gives o = NaN on CUDA.

    Example:
        >>> import torch
        >>> state = torch.zeros(1, 4, 64, 64)
        >>> q, k, v, g = torch.ones(1, 1, 2, 64), torch.ones(1, 1, 2, 64), torch.ones(1, 1, 4, 64), torch.zeros(1, 1, 4)
        >>> gated_delta_step(q, k, v, g, torch.ones(1, 1, 4), state, use_qk_l2norm_in_kernel=True).shape
        torch.Size([1, 1, 4, 64])
    """
    gates = None
    if use_gate_in_kernel or use_beta_sigmoid_in_kernel or allow_neg_eigval:
        gates = Gates(use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    x = StepInputs(q, k, v, g, beta, state, state_indices, A_log, dt_bias, scale, use_qk_l2norm_in_kernel, 0.0)
    return _fla.step("gated_delta_step", _draft if output_states else _step, x, gates)


chunk_gdn = chunk_gated_delta_rule
fused_recurrent_gdn = fused_recurrent_gated_delta_rule

_backward = _recurrence.define_backward(_CHUNK.op)
_chunk = _recurrence.define_sequence_op(_CHUNK, _backward)
_recurrent = _recurrence.define_sequence_op(_RECURRENT, _backward)
_step, _draft = _recurrence.define_step("gated_delta_step")
