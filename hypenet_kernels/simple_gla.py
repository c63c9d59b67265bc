"""Simple gated linear attention, for every value head, from S_0 = initial_state or 0:

S_t = e^{g_t} S_{t-1} + k_t v_t^T        state [K, V]
o_t = scale S_t^T q_t                    value head j reads key head j // (HV / H)

With a decay g_gamma that is constant in t this is Lightning attention and RetNet, with a computed g Mamba2's core.
Source: Lightning Attention-2 (arXiv 2401.04658), RetNet (arXiv 2307.08621), Mamba2 (arXiv 2405.21060); the kernels are
the gated delta rule's without the delta correction, see csrc/cpu/gated_delta_chunk_fwd.cpp.
"""

from typing import Any

import torch
from torch import Tensor

from hypenet_kernels import _checks, _fla, _recurrence
from hypenet_kernels._fla import Gates, Options, Result
from hypenet_kernels._recurrence import Inputs, Rule, StepInputs

CHUNK_SIZES = tuple(2**n for n in range(4, 11))  # that fla takes
_CHUNK = Rule("chunk_simple_gla", "gated_delta_chunk_fwd", False, False, True)
_RECURRENT = Rule("fused_recurrent_simple_gla", "gated_delta_recurrent_fwd", False, True, True)


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    *,
    split_sequence: bool = False,
    state_indices: Tensor | None = None,
    checkpoint_every: int | None = None,
    **legacy: Any,
) -> Result:
    """Compute simple gated linear attention over whole sequences, in chunks.

    Arguments and their order are flash-linear-attention's (0.6). Differentiable once in q, k, v, g, g_gamma and
    initial_state, through o and final_state.

    Args:
        q, k, v, scale, initial_state, output_final_state, state_v_first, cu_seqlens, cu_seqlens_cpu, split_sequence,
            state_indices, checkpoint_every, **legacy: as in `chunk_gated_delta_rule`; chunk_size may be any power of 2.
        g: [B, T, HV], natural log of the decay, <= 0; below -50 it counts as -50 and gets no gradient.
        g_gamma: [HV], the same for every token, in place of g. Default of both: no decay.

    Returns:
        As `chunk_gated_delta_rule`.

    Raises:
        As `chunk_gated_delta_rule`.

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(3, 1, 100, 2, 64)
        >>> o, state = chunk_simple_gla(q, k, v, g_gamma=-torch.tensor([0.5, 0.25]), output_final_state=True)
        >>> o.shape, state.shape
        (torch.Size([1, 100, 2, 64]), torch.Size([1, 2, 64, 64]))
    """
    op = _CHUNK.op
    if legacy:
        state_v_first = _fla.legacy(op, legacy, state_v_first, CHUNK_SIZES)
    every = 0 if checkpoint_every is None else _fla.check_interval(op, checkpoint_every)
    g = _decay(op, q, v, g, g_gamma)
    x = Inputs(q, k, v, g, None, initial_state, cu_seqlens, scale, 0, every, state_indices)
    return _fla.run(_CHUNK, _chunk, x, Options(output_final_state, state_v_first, False, split_sequence))


def fused_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    state_indices: Tensor | None = None,
    checkpoint_every: int | None = None,
    **legacy: Any,
) -> Result:
    """Compute simple gated linear attention token by token, for short sequences: `chunk_simple_gla` in everything else.

    The gradient goes through the chunk form. On CUDA, up to 16 tokens without cu_seqlens and without a gradient go one
    by one, in float32 any number of them; all else is the chunk form.

    Args:
        reverse: go from the last token of every sequence to its first.

    Returns:
        As `chunk_gated_delta_rule`; o in v's dtype.
    """
    op = _RECURRENT.op
    if legacy:
        state_v_first = _fla.legacy(op, legacy, state_v_first, CHUNK_SIZES)
    every = 0 if checkpoint_every is None else _fla.check_interval(op, checkpoint_every)
    g = _decay(op, q, v, g, g_gamma)
    x = Inputs(q, k, v, g, None, initial_state, cu_seqlens, scale, 0, every, state_indices)
    options = Options(output_final_state, state_v_first)
    if not reverse:
        return _fla.run(_RECURRENT, _recurrent, x, options)
    if every or state_indices is not None:
        _checks.fail(NotImplementedError, op, "reverse", "be False with state_indices or checkpoint_every", True)
    return _fla.run_reversed(_RECURRENT, _recurrent, x, options)


def chunk_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> Result:
    """Compute fla's Lightning attention: `chunk_simple_gla` with g_gamma_h = -8 h / H (1 - layer_idx / num_layers)."""
    H = q.shape[2]
    g_gamma = -(8 / H * (1 - layer_idx / num_layers)) * torch.arange(H, dtype=torch.float32, device=q.device)
    options |= {"g_gamma": g_gamma, "scale": scale, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    return chunk_simple_gla(q, k, v, output_final_state=output_final_state, **options)


def chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> Result:
    """Compute RetNet's retention: `chunk_simple_gla` with the decay 1 - 2^(-5 - h) of head h (arXiv 2307.08621)."""
    heads = torch.arange(q.shape[2], dtype=torch.float32, device=q.device)
    options |= {"g_gamma": torch.log1p(-(2.0 ** (-5.0 - heads))), "scale": scale, "initial_state": initial_state}
    return chunk_simple_gla(q, k, v, output_final_state=output_final_state, cu_seqlens=cu_seqlens, **options)


def simple_gla_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    state_indices: Tensor | None = None,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    output_states: bool = False,
) -> Any:
    """Compute T tokens (usually one) of every sequence in decoding, and update `state` in place.

    Args, Returns and Raises: as `gated_delta_step`, without beta.

    Example:
        >>> import torch
        >>> q, state = torch.ones(1, 1, 2, 64), torch.zeros(1, 2, 64, 64)
        >>> simple_gla_step(q, q, q, torch.zeros(1, 1, 2), state).shape
        torch.Size([1, 1, 2, 64])
    """
    gates = Gates(True, A_log, dt_bias) if use_gate_in_kernel else None
    x = StepInputs(q, k, v, g, None, state, state_indices, A_log, dt_bias, scale, False, 0.0)
    return _fla.step("simple_gla_step", _draft if output_states else _step, x, gates)


def _decay(op: str, q: Tensor, v: Tensor, g: Tensor | None, g_gamma: Tensor | None) -> Tensor | None:
    """Return g, or g_gamma for every token."""
    if g_gamma is None:
        return g
    _checks.tensors(op, {"q": q, "v": v, "g_gamma": g_gamma}, {})
    if g is not None:
        _checks.fail(ValueError, op, "g_gamma", "be left out where g is given", list(g_gamma.shape))
    _checks.rank(op, "v", v, "B T HV V")
    _checks.shape(op, "g_gamma", g_gamma, v.shape[2:3])
    gamma: Tensor = _fla.accumulated(op, "g_gamma", g_gamma, q)
    return gamma.expand(v.shape[:3])


_backward = _recurrence.define_backward(_CHUNK.op)
_chunk = _recurrence.define_sequence_op(_CHUNK, _backward)
_recurrent = _recurrence.define_sequence_op(_RECURRENT, _backward)
_step, _draft = _recurrence.define_step("simple_gla_step")
