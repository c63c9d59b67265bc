"""The conversion of a Transformer into a hybrid linear-attention model."""
