"""Kernels for hybrid linear-attention language models, as PyTorch ops."""

from hypenet_kernels.hype_attention import hype_attention, hype_attention_decode

__all__ = ["hype_attention", "hype_attention_decode"]
