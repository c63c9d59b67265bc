"""Kernels for hybrid linear-attention language models, as PyTorch ops."""

from hypenet_kernels._installation import __version__, report, show_config
from hypenet_kernels.activation import swiglu
from hypenet_kernels.attention import hype_attention, hype_attention_decode
from hypenet_kernels.convolution import causal_conv1d_fn, causal_conv1d_update
from hypenet_kernels.gated_delta import (
    chunk_gated_delta_rule,
    chunk_gdn,
    fused_recurrent_gated_delta_rule,
    fused_recurrent_gdn,
    gated_delta_step,
)
from hypenet_kernels.normalization import add_rms_norm, rms_norm_gated, rms_norm_rope
from hypenet_kernels.simple_gla import (
    chunk_lightning_attn,
    chunk_retention,
    chunk_simple_gla,
    fused_recurrent_simple_gla,
    simple_gla_step,
)
from hypenet_kernels.states import commit_states

__all__ = [
    "__version__",
    "add_rms_norm",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "chunk_gated_delta_rule",
    "chunk_gdn",
    "chunk_lightning_attn",
    "chunk_retention",
    "chunk_simple_gla",
    "commit_states",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gdn",
    "fused_recurrent_simple_gla",
    "gated_delta_step",
    "hype_attention",
    "hype_attention_decode",
    "report",
    "rms_norm_gated",
    "rms_norm_rope",
    "show_config",
    "simple_gla_step",
    "swiglu",
]
