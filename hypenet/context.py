"""What a mixer is told about its input besides the hidden states: positions, packing, and the cache.

B batch, T tokens, D head dimension. Padding never reaches a layer: a padded batch is packed as [1, total, hidden] and
`cu_seqlens` once, before the first layer, and scattered back after the last.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from hypenet.cache import HypeNetCache

# A cached call of at most this many tokens a sequence runs on the in-place decode kernels.
MAX_STEP_TOKENS = 8


@dataclass
class MixerContext:
    """The second argument of every mixer.

    To run a mixer on its own (one layer trained against a teacher's), only `position_embeddings` is needed, and
    `cu_seqlens` if the documents are packed.

    Attributes:
        position_embeddings: cos and sin, each [B or 1, T, D], as `Qwen3RotaryEmbedding` returns them; None for mixers
            that use no rotary embedding.
        cu_seqlens: int32 [N + 1]; the input is [1, total, hidden] and sequence n is tokens cu_seqlens[n] to
            cu_seqlens[n + 1]. None: B sequences of T tokens.
        cache: Read for what came before and updated; None for none.
        past: Tokens of input that the cache had seen, 0 without one.
        step: The in-place decode kernels run: a few new tokens for each of B sequences that are in the cache.
        keep: bool [B, T], with `step`: False where a token is padding and must leave no trace. None: all are real.
        slots: With `cu_seqlens` and a cache: for each of the `total` tokens, its sequence and its place in the cache.
        spans: With `cu_seqlens` and a cache that is not empty: (start, stop, length before) of each sequence.
        longest: With a cache: the largest number of new tokens of a sequence.
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
        """The recurrent state that layer `layer_idx` starts from, [sequences, H, K, V] or None."""
        return None if self.cache is None else self.cache.state(layer_idx)

    def store_state(self, layer_idx: int, state: torch.Tensor | None) -> None:
        """Keeps the recurrent state after the last token, if there is a cache."""
        if self.cache is not None:
            assert state is not None
            self.cache.store_state(layer_idx, state)


class Packing:
    """The real tokens of a padded [B, T] batch, and the way to [1, total] and back.

    Args:
        mask_BT (bool [B, T]): True where a token is real; at most one device synchronisation.
    """

    def __init__(self, mask_BT: torch.Tensor) -> None:
        self.shape = mask_BT.shape
        self.rows, self.columns = mask_BT.nonzero(as_tuple=True)
        self.counts = mask_BT.sum(dim=1, dtype=torch.int32)
        self.cu_seqlens = F.pad(self.counts.cumsum(0, dtype=torch.int32), (1, 0))
        self.order = (mask_BT.cumsum(dim=1) - 1)[self.rows, self.columns]

    def pack(self, x_BTX: torch.Tensor) -> torch.Tensor:
        """[B or 1, T, ...] -> [1, total, ...]"""
        x_BTX = x_BTX.expand(self.shape[0], *x_BTX.shape[1:])
        return x_BTX[self.rows, self.columns][None]

    def unpack(self, x_1NX: torch.Tensor) -> torch.Tensor:
        """[1, total, ...] -> [B, T, ...], zero where there is padding."""
        x_BTX = x_1NX.new_zeros(*self.shape, *x_1NX.shape[2:])
        return x_BTX.index_put((self.rows, self.columns), x_1NX[0])


def new_token_mask(attention_mask: torch.Tensor | None, batch: int, tokens: int, past: int) -> torch.Tensor | None:
    """bool [batch, tokens] for the new tokens of a two-dimensional mask over all tokens (or the new ones), or None."""
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
    """cu_seqlens int32 [N + 1] of a batch [B, T] read row after row, if positions restart within a row; else None."""
    starts_BT = torch.ones_like(position_ids, dtype=torch.bool)
    starts_BT[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not starts_BT[:, 1:].any():
        return None
    return F.pad(starts_BT.flatten().nonzero()[:, 0], (0, 1), value=starts_BT.numel()).int()


def packed_positions(cu_seqlens: torch.Tensor, total: int) -> torch.Tensor:
    """[1, total]: each token's place in its own document."""
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens.diff().long()
    return (torch.arange(total, device=cu_seqlens.device) - starts.repeat_interleave(lengths, output_size=total))[None]
