"""Gated DeltaNet, on the gated delta rule's kernels: B batch, T tokens, C hidden size, H heads."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hypenet.configuration_hypenet import GDN, HypeNetConfig
from hypenet.context import MixerContext
from hypenet.mixers.decay import LogDecay, rename_decay
from hypenet.mixers.mixer import HypeNetRMSNorm, Mixer
from hypenet_kernels import chunk_gated_delta_rule, gated_delta_step


class GatedDeltaNet(Mixer):
    """Gated DeltaNet: a linear recurrence with the delta rule and a decay per head and token.

        S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T ;  o_t = scale S_t^T q_t
        y_t = (RMSNorm(o_t) * silu(x_t Wg)) Wo

    q and k have unit length, beta_t = 2 sigmoid(x_t Wb), ln alpha_t = -exp(A_log) softplus(x_t Wa + dt_bias), and the
    norm runs over each head. Source: arXiv 2412.06464; beta > 1 (negative eigenvalues): arXiv 2411.12537.

    Args:
        config: The model's configuration.
        layer_idx: Index of the layer.

    Raises:
        NotImplementedError: If `config.gdn_expand_v` is not 1.
    """

    mixer_type = GDN

    def __init__(self, config: HypeNetConfig, layer_idx: int) -> None:
        if config.gdn_expand_v != 1:
            raise NotImplementedError(f"GatedDeltaNet: gdn_expand_v must be 1, got {config.gdn_expand_v}")
        super().__init__(
            config,
            layer_idx,
            use_qk_norm=config.gdn_use_qk_norm,
            use_rope=config.gdn_use_rope,
        )
        heads, width = self.num_heads, self.num_heads * self.head_dim
        self.a_proj = nn.Linear(config.hidden_size, heads, bias=False)
        self.b_proj = nn.Linear(config.hidden_size, heads, bias=False)
        self.decay_bias = LogDecay(heads)  # transformers' Trainer decays no weight with "bias" in its name
        self.o_norm = HypeNetRMSNorm(self.head_dim, config.rms_norm_eps)
        self.g_proj = nn.Linear(config.hidden_size, width, bias=False) if config.gdn_use_gate else None

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        """Apply SiLU to x if `gdn_activation` says so."""
        return F.silu(x) if self.config.gdn_activation == "silu" else x

    def forward(self, x_BTC: torch.Tensor, context: MixerContext) -> torch.Tensor:
        """Mix x [B, T, C] along T and return [B, T, C]; with a cache, also update this layer's state."""
        q, k, v = self.qkv(x_BTC, context)
        k, v = self.unshare(k, v)
        a, b = self.a_proj(x_BTC), self.b_proj(x_BTC)
        A_log, dt_bias = self.decay_bias().unbind()
        gates: dict[str, Any] = {
            "use_qk_l2norm_in_kernel": True,
            "use_gate_in_kernel": True,
            "A_log": A_log,
            "dt_bias": dt_bias,
            "use_beta_sigmoid_in_kernel": True,
            "allow_neg_eigval": True,
        }
        state = context.state(self.layer_idx)
        if context.step:
            if context.keep is not None:  # softplus and sigmoid of -inf are 0: no decay and no write for padding
                a, b = (x.masked_fill(~context.keep[..., None], -math.inf) for x in (a, b))
            assert state is not None
            o = gated_delta_step(q, k, v, a, b, state, **gates)
        else:
            o, state = chunk_gated_delta_rule(
                q,
                k,
                v,
                a,
                b,
                initial_state=state,
                output_final_state=context.cache is not None,
                cu_seqlens=context.cu_seqlens,
                **gates,
            )
            context.store_state(self.layer_idx, state)
        o = self.o_norm(o)
        if self.g_proj is not None:
            o = o * F.silu(self.g_proj(x_BTC)).view_as(o)
        return self.o_proj(o.flatten(-2))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        rename_decay(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
