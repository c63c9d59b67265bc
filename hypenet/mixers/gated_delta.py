"""Gated DeltaNet, on the gated delta rule's kernels: B batch, T tokens, C hidden size, H heads."""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hypenet.cache_layers import Recurrence
from hypenet.configuration_hypenet import GDN, HypeNetConfig
from hypenet.context import MixerContext
from hypenet.mixers.decaying import DecayingMixer
from hypenet.mixers.mixer import cast_once
from hypenet_kernels import chunk_gated_delta_rule, gated_delta_step


class GatedDeltaNet(DecayingMixer):
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
        self.a_proj = nn.Linear(config.hidden_size, self.num_heads, bias=False)
        self.b_proj = nn.Linear(config.hidden_size, self.num_heads, bias=False)
        self.add_decay_and_output(config.gdn_use_gate)

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        """Apply SiLU to x if `gdn_activation` says so."""
        return F.silu(x) if self.config.gdn_activation == "silu" else x

    def forward(self, x_BTC: torch.Tensor, context: MixerContext) -> torch.Tensor:
        """Mix x [B, T, C] along T and return [B, T, C]; with a cache, also update this layer's state."""
        x_BTC = cast_once(x_BTC)
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
        chunk, step = partial(chunk_gated_delta_rule, **gates), partial(gated_delta_step, **gates)
        o = context.recur(self.layer_idx, Recurrence((q, k, v, a, b), chunk, step))
        return self.project_output(o, x_BTC)
