"""The definition of every op: one loop over t each, in plain PyTorch, in the dtype of its inputs.

Slow and obviously right. The native kernels are tested against these functions in float64. Only the norms and
swiglu are also what runs on CUDA without Triton.
Names, argument order and layouts are those of the public ops: q, k [B, T, H, K]; v [B, T, HV, V]; g, beta [B, T, HV];
state [N, HV, K, V]; value head j reads key head j // (HV / H).
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor


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
    cu_seqlens: Tensor | None = None,
    *,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    **serving: Any,
) -> Any:
    """S_t = e^{g_t} (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T ;  o_t = scale S_t^T q_t.

    serving: state_indices and checkpoint_every, as in `_recurrence`.
    """
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)
    if use_gate_in_kernel and A_log is not None:
        g = log_decay(g, A_log, 0.0 if dt_bias is None else dt_bias)
    if use_beta_sigmoid_in_kernel:
        beta = (2 if allow_neg_eigval else 1) * beta.sigmoid()
    return _recurrence(q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens, **serving)


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **serving: Any,
) -> Any:
    """S_t = e^{g_t} S_{t-1} + k_t v_t^T ;  o_t = scale S_t^T q_t. `g_gamma` [HV] is a `g` constant in t.

    serving: state_indices and checkpoint_every, as in `_recurrence`.
    """
    if g is None:
        g = v.new_zeros(v.shape[:3]) if g_gamma is None else g_gamma.expand(v.shape[:3])
    return _recurrence(q, k, v, g, None, scale, initial_state, output_final_state, cu_seqlens, **serving)


def commit_states(state: Tensor, states: Tensor, num_accepted: Tensor, state_indices: Tensor | None = None) -> None:
    """Slot of sequence b := states[b, num_accepted[b] - 1], in place; unchanged where num_accepted[b] = 0.

    states [B, T, HV, K, V]: the state after each of T draft tokens, as the recurrence returns it for
    checkpoint_every = 1. state [slots, HV, K, V]; the slot is state_indices[b] (negative: none), else b.
    """
    slots = range(len(states)) if state_indices is None else state_indices.tolist()
    for b, (slot, accepted) in enumerate(zip(slots, num_accepted.tolist(), strict=True)):
        if slot >= 0 and accepted > 0:
            state[slot] = states[b, accepted - 1]


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (y, final_states): y_t = act(bias + sum_w weight_w x_{t-W+1+w}), x before a sequence its initial state.

    x, y [B, C, T]; weight [C, W]; bias [C]; states [N, C, W - 1].
    """
    (B, C, T), W = x.shape, weight.shape[1]
    spans = [(0, T)] if cu_seqlens is None else list(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False))
    state = x.new_zeros(B * len(spans), C, W - 1) if initial_states is None else initial_states
    outputs, final_states = [], []
    for n, (start, stop) in enumerate(spans):
        own = state if cu_seqlens is None else state[n : n + 1]
        inputs = torch.cat([own, x[:, :, start:stop]], dim=2)
        for t in range(stop - start):
            z = (inputs[:, :, t : t + W] * weight).sum(-1) + (0 if bias is None else bias)
            outputs.append(z if activation is None else z * z.sigmoid())
        final_states.append(inputs[:, :, stop - start :])
    outputs += [x.new_zeros(B, C)] * (T - len(outputs))
    y = torch.stack(outputs, dim=2) if outputs else torch.zeros_like(x)
    return y, torch.cat(final_states) if final_states else state


def hype_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    logit_scale_base: float | None = None,
    gate: Tensor | None = None,
    scale: float | None = None,
    query_offset: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """o_t = sum_{i <= t} softmax_i(s_t scale q_t . k_i) v_i, times sigmoid(gate_t); s_t = ln(t + a) / ln(a).

    q, gate [B, T, H, D]; k, v [B, S, HK, D] with S = query_offset + T; t counts from the start of the keys. cu_seqlens
    may end before T: the rest of o is zero. With a tensor as query_offset, k and v are caches [N, capacity, HK, D].
    """
    if cu_seqlens is not None:
        bounds, parts = cu_seqlens.tolist(), []
        for n, (i, j) in enumerate(itertools.pairwise(bounds)):
            offset, keys, values = 0, k[:, i:j], v[:, i:j]
            if isinstance(query_offset, Tensor):
                offset = int(query_offset[n])
                keys, values = (x[n : n + 1, : offset + j - i] for x in (k, v))
            options: dict[str, Any] = {"logit_scale_base": logit_scale_base, "scale": scale, "query_offset": offset}
            own_gate = None if gate is None else gate[:, i:j]
            parts.append(hype_attention(q[:, i:j], keys, values, gate=own_gate, **options))
        return torch.cat([*parts, torch.zeros_like(q[:, bounds[-1] :])], dim=1)
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outputs = []
    for i in range(q.shape[1]):
        t = query_offset + i
        s_t = 1.0 if logit_scale_base is None else math.log(t + logit_scale_base) / math.log(logit_scale_base)
        logits = torch.einsum("bhd,bshd->bhs", q[:, i] * (s_t * scale), k[:, : t + 1])
        outputs.append(torch.einsum("bhs,bshd->bhd", logits.softmax(-1), v[:, : t + 1]))
    o = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(q)
    return o if gate is None else o * gate.sigmoid()


def hype_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    logit_scale_base: float | None = None,
    gate: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The last q.shape[1] tokens of each sequence against its own cache; k and v, if given, are appended in place."""
    T = q.shape[1]
    o = torch.empty_like(q)
    for b, length in enumerate(cache_seqlens.tolist()):
        if k is not None and v is not None:
            k_cache[b, length : length + T], v_cache[b, length : length + T] = k[b], v[b]
            length += T
        o[b] = hype_attention(
            q[b : b + 1],
            k_cache[b : b + 1, :length],
            v_cache[b : b + 1, :length],
            logit_scale_base=logit_scale_base,
            gate=None if gate is None else gate[b : b + 1],
            scale=scale,
            query_offset=length - T,
        )[0]
    return o


def rms_norm_rope(
    x: Tensor, weight: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """n = rms_norm(x) * weight, without weight x; with cos and sin n * cos + rotate_half(n) * sin for each head."""
    n = _widened(x)
    if weight is not None:
        n = _rms_norm(n, weight, eps)
    if cos is not None and sin is not None:
        first, second = n.chunk(2, dim=-1)
        cos, sin = (angle.to(n.dtype)[..., None, :] for angle in (cos, sin))
        n = n * cos + torch.cat((-second, first), dim=-1) * sin
    return n.to(x.dtype)


def rms_norm_gated(x: Tensor, g: Tensor, weight: Tensor, *, eps: float = 1e-6, activation: str = "silu") -> Tensor:
    """rms_norm(x) * weight * activation(g)."""
    gate = _widened(g).sigmoid() if activation == "sigmoid" else torch.nn.functional.silu(_widened(g))
    return (_rms_norm(_widened(x), weight, eps) * gate).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(x + residual, rms_norm(x + residual) * weight)."""
    total = x + residual
    return total, _rms_norm(_widened(total), weight, eps).to(total.dtype)


def swiglu(x: Tensor, y: Tensor) -> Tensor:
    """silu(x) * y."""
    return (torch.nn.functional.silu(_widened(x)) * _widened(y)).to(x.dtype)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


def _widened(x: Tensor) -> Tensor:
    """x in the type of the arithmetic: float64 for float64, else float32."""
    return x if x.dtype == torch.float64 else x.float()


def log_decay(a: Tensor, A_log: Tensor, dt_bias: Tensor | float = 0.0) -> Tensor:
    """Return what use_gate_in_kernel makes of g: -e^A_log softplus(a + dt_bias). a [B, T, HV]; A_log, dt_bias [HV]."""
    return -A_log.exp() * torch.nn.functional.softplus(a + dt_bias)


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum(x^2) + eps) over the last dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def _recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    state_indices: Tensor | None = None,
    checkpoint_every: int | None = None,
) -> Any:
    """Return (o, final_state or None), with checkpoint_every (o, final_state or None, checkpoints).

    cu_seqlens may end before T: the rest of o is zero.
    state_indices [N]: initial_state is a pool [slots, HV, K, V] in which sequence n's state is updated in place at slot
    state_indices[n]; negative: the sequence is skipped and its o is zero. The pool is also final_state.
    checkpoints [B, T // checkpoint_every, HV, K, V]: the state after every checkpoint_every tokens of each sequence;
    sequence n of packed ones begins at row cu_seqlens[n] // checkpoint_every, all other rows are zero.
    """
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    scale = K**-0.5 if scale is None else scale
    q, k = (x.repeat_interleave(HV // H, dim=2) for x in (q, k))
    spans = [(0, T)] if cu_seqlens is None else list(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False))
    N, every = B * len(spans), checkpoint_every or T + 1
    state = q.new_zeros(N, HV, K, V) if initial_state is None else initial_state.to(q.dtype)
    used = torch.ones(N, 1, 1, 1, dtype=torch.bool, device=q.device)
    if state_indices is not None:
        used = (state_indices >= 0).view(N, 1, 1, 1)
        state = torch.where(used, state[state_indices.clamp(min=0).long()], 0)
    outputs, final_states, checkpoints = [], [], q.new_zeros(B, T // every, HV, K, V)
    for n, (start, stop) in enumerate(spans):
        which = slice(None) if cu_seqlens is None else slice(n, n + 1)
        S = state[which]
        for t in range(start, stop):
            S = S * g[:, t, :, None, None].exp()
            write = v[:, t]
            if beta is not None:
                write = beta[:, t, :, None] * (write - torch.einsum("bhk,bhkv->bhv", k[:, t], S))
            S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], write)
            outputs.append(torch.where(used[which, 0], scale * torch.einsum("bhk,bhkv->bhv", q[:, t], S), 0))
            if (t + 1 - start) % every == 0:
                checkpoints[:, start // every + (t + 1 - start) // every - 1] = torch.where(used[which], S.detach(), 0)
        final_states.append(S)
    outputs += [v.new_zeros(B, HV, V)] * (T - len(outputs))
    o = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v)
    final_state = torch.cat(final_states) if final_states else state
    if state_indices is not None and initial_state is not None:
        initial_state[state_indices[used.flatten()].long()] = final_state[used.flatten()].to(initial_state.dtype)
        final_state = initial_state
    results = o, final_state if output_final_state else None
    return results if checkpoint_every is None else (*results, checkpoints)
