"""The conversion of a Qwen3 Transformer into a HypeNet: transfer, align, select, distil, fine-tune, scale, evaluate."""
