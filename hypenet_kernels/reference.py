"""What every op means: one loop over t each, in plain PyTorch, in the dtype of its inputs.

Slow and obviously right. The native kernels are tested against these functions in float64; nothing else calls them.
Names, argument order and layouts are those of the public ops: q, k [B, T, H, K]; v [B, T, HV, V]; g, beta [B, T, HV];
state [N, HV, K, V]; value head j reads key head j // (HV / H).
"""

import math

import torch


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
):
    """S_t = e^{g_t} (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T ;  o_t = scale S_t^T q_t."""
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)
    return _recurrence(q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens)


def chunk_simple_gla(
    q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None
):
    """S_t = e^{g_t} S_{t-1} + k_t v_t^T ;  o_t = scale S_t^T q_t. `g_gamma` [HV] is a `g` constant in t."""
    if g is None:
        g = v.new_zeros(v.shape[:3]) if g_gamma is None else g_gamma.expand(v.shape[:3])
    return _recurrence(q, k, v, g, None, scale, initial_state, output_final_state, cu_seqlens)


def hype_attention(q, k, v, *, logit_scale_base=None, gate=None, scale=None, query_offset=0, cu_seqlens=None):
    """o_t = sum_{i <= t} softmax_i(s_t scale q_t . k_i) v_i, times sigmoid(gate_t); s_t = ln(t + a) / ln(a).

    q, gate [B, T, H, D]; k, v [B, S, HK, D] with S = query_offset + T; t counts from the start of the keys.
    """
    if cu_seqlens is not None:
        spans = list(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False))
        options = {"logit_scale_base": logit_scale_base, "scale": scale}
        parts = [
            hype_attention(*(x[:, i:j] for x in (q, k, v)), gate=None if gate is None else gate[:, i:j], **options)
            for i, j in spans
        ]
        return torch.cat(parts, dim=1)
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o = []
    for i in range(q.shape[1]):
        t = query_offset + i
        s_t = 1.0 if logit_scale_base is None else math.log(t + logit_scale_base) / math.log(logit_scale_base)
        logits = torch.einsum("bhd,bshd->bhs", q[:, i] * (s_t * scale), k[:, : t + 1])
        o.append(torch.einsum("bhs,bshd->bhd", logits.softmax(-1), v[:, : t + 1]))
    o = torch.stack(o, dim=1) if o else torch.zeros_like(q)
    return o if gate is None else o * gate.sigmoid()


def hype_attention_decode(
    q, k_cache, v_cache, cache_seqlens, *, k=None, v=None, logit_scale_base=None, gate=None, scale=None
):
    """The last q.shape[1] tokens of each sequence against its own cache; k and v, if given, are appended in place."""
    T = q.shape[1]
    o = torch.empty_like(q)
    for b, length in enumerate(cache_seqlens.tolist()):
        if k is not None:
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


def log_decay(a, A_log, dt_bias=0.0):
    """What use_gate_in_kernel makes of g: -e^A_log softplus(a + dt_bias). a [B, T, HV]; A_log, dt_bias [HV]."""
    return -A_log.exp() * torch.nn.functional.softplus(a + dt_bias)


def l2norm(x, eps=1e-6):
    """x / sqrt(sum(x^2) + eps) over the last dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def _recurrence(q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens):
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    scale = K**-0.5 if scale is None else scale
    q, k = (x.repeat_interleave(HV // H, dim=2) for x in (q, k))
    spans = [(0, T)] if cu_seqlens is None else list(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False))
    N = B * len(spans)
    state = q.new_zeros(N, HV, K, V) if initial_state is None else initial_state.to(q.dtype)
    o, final_states = [], []
    for n, (start, stop) in enumerate(spans):
        S = state if cu_seqlens is None else state[n : n + 1]
        for t in range(start, stop):
            S = S * g[:, t, :, None, None].exp()
            write = v[:, t]
            if beta is not None:
                write = beta[:, t, :, None] * (write - torch.einsum("bhk,bhkv->bhv", k[:, t], S))
            S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], write)
            o.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], S))
        final_states.append(S)
    o = torch.stack(o, dim=1) if o else torch.zeros_like(v)
    return o, torch.cat(final_states) if output_final_state else None
