"""Lightning attention, on the simple GLA kernels: B batch, T tokens, C hidden size, H heads."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import nn

from hypenet.cache_layers import Recurrence
from hypenet.configuration_hypenet import LIGHTNING, HypeNetConfig
from hypenet.context import MixerContext
from hypenet.mixers.decay import full_precision, widen
from hypenet.mixers.mixer import HypeNetGatedRMSNorm, Mixer, cast_once
from hypenet_kernels import chunk_simple_gla, simple_gla_step


class LightningAttention(Mixer):
    """Lightning attention: a linear recurrence with one fixed decay per head.

        S_t = gamma_h S_{t-1} + k_t v_t^T ;  o_t = scale S_t^T q_t ;  y_t = (RMSNorm(o_t) * sigmoid(x_t Wz)) Wo

    gamma_h = exp(-slope_h) with the ALiBi slopes, q and k have rotary embedding, and the norm runs over all heads
    together. Source: arXiv 2601.22156, section 3.

    Args:
        config: The model's configuration.
        layer_idx: Index of the layer.

    Attributes:
        log_decay: ln gamma_h, float32 [H] in every precision of the model. It is saved with the weights; a state
            without it, such as that of a published checkpoint, means the ALiBi slopes.
    """

    mixer_type = LIGHTNING
    log_decay: torch.Tensor

    def __init__(self, config: HypeNetConfig, layer_idx: int) -> None:
        super().__init__(
            config,
            layer_idx,
            use_qk_norm=config.lightning_use_qk_norm,
            use_rope=config.lightning_use_rope,
        )
        width = self.num_heads * self.head_dim
        self.scale = {"1/sqrt(d)": self.head_dim**-0.5, "1/d": 1 / self.head_dim, "1": 1.0}[config.lightning_scale]
        self.register_buffer("log_decay", alibi_log_decay(self.num_heads))
        use_norm = config.lightning_use_output_norm
        self.o_norm = HypeNetGatedRMSNorm(width, config.rms_norm_eps, "sigmoid") if use_norm else None
        gated, bias = config.lightning_use_output_gate, config.attention_bias
        self.z_proj = nn.Linear(config.hidden_size, width, bias=bias) if gated else None

    def forward(self, x_BTC: torch.Tensor, context: MixerContext) -> torch.Tensor:
        """Mix x [B, T, C] along T and return [B, T, C]; with a cache, also update this layer's state."""
        x_BTC = cast_once(x_BTC)
        q, k, v = self.qkv(x_BTC, context)
        k, v = self.unshare(k, v)
        chunk = partial(chunk_simple_gla, g_gamma=self.log_decay, scale=self.scale)
        o = context.recur(self.layer_idx, Recurrence((q, k, v), chunk, self.step))
        y, gate = o.flatten(-2), None if self.z_proj is None else self.z_proj(x_BTC)
        if self.o_norm is not None:
            y = self.o_norm(y, gate)
        elif gate is not None:
            y = y * gate.sigmoid()
        return self.o_proj(y)

    def step(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **state: Any) -> torch.Tensor:
        """Run a decode step of any number of sequences: `simple_gla_step`, with this layer's decay and scale."""
        o: torch.Tensor = simple_gla_step(q, k, v, self.log_decay.expand(k.shape[:3]), scale=self.scale, **state)
        return o

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        before = self.log_decay
        super()._apply(fn, recurse)
        if self.log_decay.is_meta:
            return self
        # `to_empty` leaves memory without values: take them from before, or from the definition if there were none.
        values = alibi_log_decay(self.num_heads) if before.is_meta else before
        self.log_decay = full_precision(lambda x: x.to(self.log_decay))(values)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}log_decay" not in state_dict:
            with torch.device(self.log_decay.device):
                state_dict[f"{prefix}log_decay"] = alibi_log_decay(self.num_heads)
        widen(state_dict, f"{prefix}log_decay")
        super()._load_from_state_dict(state_dict, prefix, *args)


def alibi_log_decay(heads: int) -> torch.Tensor:
    """Return ln gamma_h = -2^(-8h/H) for h = 1..H, float32 [H], from the ALiBi slopes.

    If H is not a power of two, take the values of the next lower power of two, then every second value of the next
    higher one, as ALiBi does. Source: arXiv 2108.12409; arXiv 2601.22156, section 3.
    """
    power = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    slopes += [2 ** (-8 * h / (2 * power)) for h in range(1, 2 * power + 1, 2)][: heads - power]
    return -torch.tensor(slopes, dtype=torch.float32)
