"""Mamba2, on the simple GLA kernels: B batch, T tokens, C hidden size, H heads."""

import torch
from torch import nn
from torch.nn import functional as F

from hypenet.cache_layers import Recurrence
from hypenet.configuration_hypenet import MAMBA2, HypeNetConfig
from hypenet.context import MixerContext
from hypenet.mixers.decaying import DecayingMixer
from hypenet.mixers.mixer import cast_once
from hypenet_kernels import chunk_simple_gla, simple_gla_step


class Mamba2(DecayingMixer):
    """Mamba2 with a B and a C for every head: a linear recurrence with a step size and a decay per head and token.

        S_t = exp(g_t) S_{t-1} + dt_t k_t v_t^T ;  o_t = scale S_t^T q_t
        y_t = (RMSNorm(o_t) * silu(x_t Wg)) Wo

    dt_t = softplus(x_t Wdt + dt_bias), g_t = -exp(A_log) dt_t, and the norm runs over each head. In Mamba2's names q is
    C, k is B and v is x. Source: arXiv 2405.21060; the variant that a teacher's heads fit: arXiv 2601.22156.

    It differs from Mamba2 in what no attention layer has or needs: there is no convolution and no skip D, q and k may
    have norms and rotary embedding, o has attention's scale, and the gate follows the norm, as in gated DeltaNet.

    Args:
        config: The model's configuration.
        layer_idx: Index of the layer.
    """

    mixer_type = MAMBA2

    def __init__(self, config: HypeNetConfig, layer_idx: int) -> None:
        super().__init__(
            config,
            layer_idx,
            use_qk_norm=config.mamba2_use_qk_norm,
            use_rope=config.mamba2_use_rope,
        )
        self.dt_proj = nn.Linear(config.hidden_size, self.num_heads, bias=False)
        self.add_decay_and_output(config.mamba2_use_gate, smallest=1.0)

    def forward(self, x_BTC: torch.Tensor, context: MixerContext) -> torch.Tensor:
        """Mix x [B, T, C] along T and return [B, T, C]; with a cache, also update this layer's state."""
        x_BTC = cast_once(x_BTC)
        q, k, v = self.qkv(x_BTC, context)
        k, v = self.unshare(k, v)
        A_log, dt_bias = self.decay_bias().unbind()
        dt_BTH = F.softplus(self.dt_proj(x_BTC).to(dt_bias.dtype) + dt_bias)
        g = -A_log.exp() * dt_BTH
        k = (k * dt_BTH[..., None]).to(k.dtype)
        o = context.recur(self.layer_idx, Recurrence((q, k, v, g), chunk_simple_gla, simple_gla_step))
        return self.project_output(o, x_BTC)
