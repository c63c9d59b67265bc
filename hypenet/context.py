"""What a mixer receives in addition to the hidden states: positions, packing, and the cache.

B batch, T tokens, D head dimension.
"""

from dataclasses import dataclass

import torch

from hypenet.cache import HypeNetCache

# A call with a cache and at most this many tokens per sequence runs on the in-place decode kernels.
MAX_STEP_TOKENS = 8


@dataclass
class MixerContext:
    """The second argument of every mixer.

    To run a mixer on its own, for example to train it against one layer of a teacher, set `position_embeddings`, and
    `cu_seqlens` if documents are packed; the other fields belong to the model.

    Attributes:
        position_embeddings: cos and sin, each [B or 1, T, D], as `Qwen3RotaryEmbedding` returns them; None for mixers
            without rotary embedding.
        cu_seqlens: int32 [N + 1]; the input is [1, total, hidden] and sequence n is tokens cu_seqlens[n] to
            cu_seqlens[n + 1]. None: B sequences of T tokens.
        cache: Holds the earlier tokens; every mixer reads and updates its layer. None: no cache.
        past: Input positions that the cache has seen, 0 without a cache.
        step: Whether to use the in-place decode kernels: each of the B sequences continues with a few new tokens.
        keep: bool [B, T], only with `step`: False where a token is padding and must change nothing. None: no padding.
        slots: With `cu_seqlens` and a cache: the sequence of each of the `total` tokens, and its position there.
        spans: With `cu_seqlens` and a cache that is not empty: (start, stop, cached length) of each sequence.
        longest: With a cache: the largest number of new tokens of a sequence.

    Example:
        >>> import torch
        >>> from hypenet import HypeNetConfig, LightningAttention, MixerContext
        >>> config = HypeNetConfig(hidden_size=32, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        ...                        lightning_use_rope=False)
        >>> mixer = LightningAttention(config, layer_idx=1)
        >>> documents = MixerContext(cu_seqlens=torch.tensor([0, 5, 9], dtype=torch.int32))
        >>> mixer(torch.randn(1, 9, 32), documents).shape
        torch.Size([1, 9, 32])
    """

    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None
    cu_seqlens: torch.Tensor | None = None
    cache: HypeNetCache | None = None
    past: int = 0
    step: bool = False
    keep: torch.Tensor | None = None
    slots: tuple[torch.Tensor, torch.Tensor] | None = None
    spans: list[tuple[int, int, int]] | None = None
    longest: int = 0

    def state(self, layer_idx: int) -> torch.Tensor | None:
        """Return the state [sequences, H, K, V] that recurrent layer `layer_idx` starts from, or None for zeros."""
        return None if self.cache is None else self.cache.state(layer_idx)

    def store_state(self, layer_idx: int, state: torch.Tensor | None) -> None:
        """Store the state of recurrent layer `layer_idx` after the last token, if there is a cache."""
        if self.cache is not None:
            assert state is not None
            self.cache.store_state(layer_idx, state)
