"""HALO: converts a Qwen3 Transformer into a HypeNet by transfer, align, select, distill, finetune, scale and eval."""

from halo.extras import version

__version__ = version()
