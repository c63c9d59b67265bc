"""What a mixer receives in addition to the hidden states: positions, packing, and the cache.

B batch, T tokens, D head dimension. Padding never reaches a layer: a padded batch is packed into [1, total, hidden]
with `cu_seqlens` before the first layer, and unpacked after the last.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

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


class Packing:
    """Packs the real tokens of a padded [B, T] batch into [1, total], and unpacks them again.

    Args:
        mask_BT (bool [B, T]): True for real tokens. On CUDA, counting them synchronises with the device.
    """

    def __init__(self, mask_BT: torch.Tensor) -> None:
        self.shape = mask_BT.shape
        self.rows, self.columns = mask_BT.nonzero(as_tuple=True)
        self.counts = mask_BT.sum(dim=1, dtype=torch.int32)
        self.cu_seqlens = F.pad(self.counts.cumsum(0, dtype=torch.int32), (1, 0))
        self.order = (mask_BT.cumsum(dim=1) - 1)[self.rows, self.columns]

    def pack(self, x_BTX: torch.Tensor) -> torch.Tensor:
        """Pack [B or 1, T, ...] into [1, total, ...]."""
        x_BTX = x_BTX.expand(self.shape[0], *x_BTX.shape[1:])
        return x_BTX[self.rows, self.columns][None]

    def unpack(self, x_1NX: torch.Tensor) -> torch.Tensor:
        """Unpack [1, total, ...] into [B, T, ...], with zeros for padding."""
        x_BTX = x_1NX.new_zeros(*self.shape, *x_1NX.shape[2:])
        return x_BTX.index_put((self.rows, self.columns), x_1NX[0])


def new_token_mask(attention_mask: torch.Tensor | None, batch: int, tokens: int, past: int) -> torch.Tensor | None:
    """Return the part of an attention mask that covers the new tokens.

    Args:
        attention_mask: [batch, tokens] or [batch, past + tokens], nonzero for real tokens; None if all are real.
        batch: Sequences in the batch.
        tokens: New tokens per sequence.
        past: Input positions that the cache has seen.

    Returns:
        bool [batch, tokens], or None if there is no mask or no new token.

    Raises:
        ValueError: If the mask has another shape.
    """
    if attention_mask is None:
        return None
    shape = tuple(attention_mask.shape)
    if shape not in ((batch, tokens), (batch, past + tokens)):
        raise ValueError(
            f"HypeNetModel: attention_mask must have shape {[batch, past + tokens]} (1 for real tokens), "
            f"got {list(shape)}"
        )
    return attention_mask[:, -tokens:].bool() if tokens else None


def document_starts(position_ids: torch.Tensor) -> torch.Tensor | None:
    """Return where documents begin, if positions restart within a row.

    Args:
        position_ids: [B, T].

    Returns:
        int32 [N + 1], offsets into the flattened batch, whose rows also separate documents; None if no row restarts.
    """
    starts_BT = torch.ones_like(position_ids, dtype=torch.bool)
    starts_BT[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not starts_BT[:, 1:].any():
        return None
    return F.pad(starts_BT.flatten().nonzero()[:, 0], (0, 1), value=starts_BT.numel()).int()


def packed_positions(cu_seqlens: torch.Tensor, total: int) -> torch.Tensor:
    """Return the position [1, total] of each token in its own document, for cu_seqlens int32 [N + 1]."""
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens.diff().long()
    return (torch.arange(total, device=cu_seqlens.device) - starts.repeat_interleave(lengths, output_size=total))[None]
