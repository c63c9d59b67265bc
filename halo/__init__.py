"""HALO: converts a Qwen3 Transformer into a HypeNet by transfer, align, select, distill, finetune, scale and eval."""

from hypenet_cli.extras import version

__version__ = version()
