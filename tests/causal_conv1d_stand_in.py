"""causal_conv1d in torch, with the interface of hypenet_kernels' ops."""

import torch
import torch.nn.functional as F


def causal_conv1d_fn(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
    *,
    cu_seqlens=None,
):
    assert initial_states is None and not return_final_states and final_states_out is None
    if cu_seqlens is not None:
        tokens = torch.arange(x.shape[2])
        seq_idx = torch.searchsorted(cu_seqlens[1:].long(), tokens, right=True)[None]
    y = torch.zeros_like(x) if bias is None else bias[:, None].expand_as(x)
    W = weight.shape[1]
    for lag in range(W):
        shifted = F.pad(x, (lag, 0))[:, :, : x.shape[2]]
        if seq_idx is not None:
            same = F.pad(seq_idx, (lag, 0), value=-1)[:, : x.shape[2]] == seq_idx
            shifted = shifted.where(same[:, None], 0.0)
        y = y + weight[:, W - 1 - lag, None] * shifted
    return F.silu(y) if activation else y


def causal_conv1d_update(
    x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None
):
    assert cache_seqlens is None and conv_state_indices is None
    whole = torch.cat([conv_state, x], dim=2)
    conv_state.copy_(whole[:, :, -conv_state.shape[2] :])
    y = F.conv1d(whole, weight[:, None], bias, groups=x.shape[1])[:, :, -x.shape[2] :]
    return F.silu(y) if activation else y
