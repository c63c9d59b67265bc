"""The conversion of a Qwen3 Transformer into a HypeNet: transfer, align, select, distill, finetune, scale, evaluate."""

from hypenet_cli.extras import version

__version__ = version()
