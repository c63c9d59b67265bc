"""Softmax attention, on the HyPE attention kernels: B batch, T tokens, C hidden size, H heads, D head dimension."""

from typing import Any

import torch
from torch import nn

from hypenet.configuration_hypenet import SOFTMAX, HypeNetConfig
from hypenet.context import MixerContext
from hypenet.mixers.mixer import Mixer, cast_once
from hypenet_kernels import hype_attention, hype_attention_decode


class SoftmaxAttention(Mixer):
    """Softmax attention without position encoding, with the HyPE scale s_t and an output gate.

        o_t = sigmoid(x_t Wz) * sum_{i <= t} softmax_i(s_t q_t . k_i / sqrt(D)) v_i

    With `attn_use_rope` and without `attn_use_output_gate` it is Qwen3's attention, and without `attn_use_qk_norm` too
    Llama's. Source: arXiv 2601.22156, section 3.

    Args:
        config: The model's configuration.
        layer_idx: Index of the layer.
    """

    mixer_type = SOFTMAX

    def __init__(self, config: HypeNetConfig, layer_idx: int) -> None:
        super().__init__(
            config,
            layer_idx,
            use_qk_norm=config.attn_use_qk_norm,
            use_rope=config.attn_use_rope,
        )
        width = self.num_heads * self.head_dim
        self.o_gate = nn.Linear(config.hidden_size, width, bias=False) if config.attn_use_output_gate else None

    def forward(self, x_BTC: torch.Tensor, context: MixerContext) -> torch.Tensor:
        """Mix x [B, T, C] along T and return [B, T, C]; with a cache, also append to this layer's keys and values."""
        x_BTC = cast_once(x_BTC)
        q, k, v = self.qkv(x_BTC, context)
        gate = None if self.o_gate is None else self.o_gate(x_BTC).view_as(q)
        o = self.attend(q, k, v, gate, context)
        return self.o_proj(o.flatten(-2))

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor | None, context: MixerContext
    ) -> torch.Tensor:
        """Attend to the cached and the new tokens, and append k and v to the cache.

        Args:
            q: [B, T, H, D].
            k, v: [B, T, HK, D].
            gate: Output gate before the sigmoid [B, T, H, D], or None.
            context: Packing and cache.

        Returns:
            The output [B, T, H, D].
        """
        options: dict[str, Any] = {
            "scale": self.head_dim**-0.5 * self.config.logit_scale_constant,
            "logit_scale_base": self.config.logit_scale_base,
        }
        if context.cache is None:
            return hype_attention(q, k, v, gate=gate, cu_seqlens=context.cu_seqlens, **options)
        keys, values = context.append(self.layer_idx, k, v)
        lengths = context.cache.lengths
        assert lengths is not None
        if context.step:
            return hype_attention_decode(q, keys, values, lengths, k=k, v=v, gate=gate, **options)
        if context.past == 0:
            return hype_attention(q, k, v, gate=gate, cu_seqlens=context.cu_seqlens, **options)
        if context.cu_seqlens is None:
            start, stop = context.past, context.past + k.shape[1]
            return hype_attention(q, keys[:, :stop], values[:, :stop], gate=gate, query_offset=start, **options)
        return hype_attention(
            q, keys, values, gate=gate, cu_seqlens=context.cu_seqlens, query_offset=lengths, **options
        )

    def init_gate(self, gate_init: str) -> None:
        if self.o_gate is None:
            return
        if gate_init == "random":
            nn.init.normal_(self.o_gate.weight, std=self.config.initializer_range)
        else:  # zero weights give sigmoid(0) = 1/2, which the output projection doubles
            nn.init.zeros_(self.o_gate.weight)
            with torch.no_grad():
                self.o_proj.weight.mul_(2)
