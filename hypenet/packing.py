"""The one row of tokens that the layers run on where a batch has padding or packed documents.

B sequences, T tokens each, `total` tokens in the row. Padding never reaches a layer: the real tokens are put one
sequence after another into [1, total] with `cu_seqlens`, before the first layer, and back after the last one.
"""

from typing import Self

import torch
from torch.nn import functional as F


class Packing:
    """Puts the tokens of a [B, T] batch into one row [1, total], and back.

    Args:
        mask_BT (bool [B, T]): True for real tokens.
        index (int64 [total]): Where each token of the row is in the flattened batch; None for all tokens in order.
        cu_seqlens (int32 [N + 1]): Where the sequences of the row begin: those of the batch, or its documents.
        order (int64 [total]): The position of each token in its sequence.
    """

    def __init__(
        self, mask_BT: torch.Tensor, index: torch.Tensor | None, cu_seqlens: torch.Tensor, order: torch.Tensor
    ) -> None:
        self.mask_BT, self.index, self.cu_seqlens, self.order = mask_BT, index, cu_seqlens, order

    @classmethod
    def of_rows(cls, mask_BT: torch.Tensor) -> Self:
        """Pack the real tokens of each row into one sequence. On CUDA, counting them synchronises with the device."""
        index = mask_BT.flatten().nonzero()[:, 0]
        return cls(mask_BT, index, _offsets(mask_BT), _order(mask_BT)[index])

    @classmethod
    def of_rows_and_padding(cls, mask_BT: torch.Tensor) -> Self:
        """Pack the rows as `of_rows`, and all padding after the last sequence: no shape depends on the mask.

        This is for tracing. The real tokens have the same results, since no sequence sees another token. In the order
        of its row, padding comes after the real tokens.
        """
        index = mask_BT.logical_not().flatten().to(torch.uint8).argsort(stable=True)
        return cls(mask_BT, index, _offsets(mask_BT), _order(mask_BT)[index])

    @classmethod
    def of_documents(cls, mask_BT: torch.Tensor | None, starts_BT: torch.Tensor) -> Self:
        """Pack the documents that begin at the True entries of starts [B, T], which are real tokens."""
        if mask_BT is None:
            mask_BT, index, starts = torch.ones_like(starts_BT), None, starts_BT.flatten()
        else:
            index = mask_BT.flatten().nonzero()[:, 0]
            starts = starts_BT.flatten()[index]
        cu_seqlens = F.pad(starts.nonzero()[:, 0], (0, 1), value=len(starts)).int()
        return cls(mask_BT, index, cu_seqlens, packed_positions(cu_seqlens, len(starts))[0])

    @property
    def rows(self) -> torch.Tensor:
        """The row of the batch that each token comes from, int64 [total]."""
        index = torch.arange(self.mask_BT.numel(), device=self.mask_BT.device) if self.index is None else self.index
        return index // self.mask_BT.shape[1]

    @property
    def counts(self) -> torch.Tensor:
        """The number of real tokens in each row of the batch, int32 [B]."""
        return self.mask_BT.sum(dim=1, dtype=torch.int32)

    def pack(self, x_BTX: torch.Tensor) -> torch.Tensor:
        """Pack [B or 1, T, ...] into [1, total, ...]."""
        x = x_BTX.expand(self.mask_BT.shape[0], *x_BTX.shape[1:]).flatten(0, 1)
        return (x if self.index is None else x[self.index])[None]

    def unpack(self, x_1NX: torch.Tensor) -> torch.Tensor:
        """Unpack [1, total, ...] into [B, T, ...], with zeros for padding."""
        if self.index is None:
            return x_1NX.view(*self.mask_BT.shape, *x_1NX.shape[2:])
        real = self.mask_BT.flatten()[self.index]
        x = x_1NX[0].masked_fill(~real.view(-1, *[1] * (x_1NX.dim() - 2)), 0)
        return x.new_zeros(self.mask_BT.numel(), *x.shape[1:]).index_put((self.index,), x).unflatten(0, self.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """B and T."""
        return self.mask_BT.shape[0], self.mask_BT.shape[1]


def read_mask(
    attention_mask: torch.Tensor | None, batch: int, tokens: int, past: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return which of the new tokens are real, and the numbers of their documents.

    Args:
        attention_mask: [batch, tokens] or [batch, past + tokens]: 0 for padding, 1 for real tokens, or a positive
            integer that is the same for all tokens of a document. None if all are real.
        batch: Sequences in the batch.
        tokens: New tokens per sequence.
        past: Input positions that the cache has seen.

    Returns:
        (bool [batch, tokens], or None if all tokens are known to be real; the numbers [batch, tokens], or None if the
        mask has none above 1).

    Raises:
        ValueError: If the mask has another shape or other values. While a model is traced, values can only be checked
            when the trace runs, and the message is that of an assertion; for the same reason the mask of a single
            token that continues a cache is not checked.
    """
    if attention_mask is None:
        return None, None
    shape = tuple(attention_mask.shape)
    if shape not in ((batch, tokens), (batch, past + tokens)):
        raise _mask_error(f"have shape {[batch, past + tokens]} (1 for real tokens)", list(shape))
    if attention_mask.numel() == 0 or tokens == 0:
        return None, None
    new = attention_mask[:, -tokens:]
    mask = new.bool()
    if past > 0 and tokens == 1:
        return mask, None
    if tracing():
        if attention_mask.dtype.is_floating_point:
            raise _mask_error("be bool or integer where the model is compiled or exported", attention_mask.dtype)
        rule = "HypeNetModel: attention_mask must hold only 0 and 1 where the model is compiled or exported"
        torch._assert_async(((attention_mask == 0) | (attention_mask == 1)).all(), rule)
        return mask, None
    if attention_mask.dtype == torch.bool:
        return (None if bool(mask.all()) else mask), None
    low, high = attention_mask.aminmax()
    whole = (attention_mask == attention_mask.round()).all()
    # One transfer, since each of them synchronises with the device.
    low, high, whole, real = torch.stack([x.double() for x in (low, high, whole, mask.all())]).tolist()
    if not low >= 0 or not whole:
        got = "fractions" if not whole and low >= 0 else "negative numbers, as of a mask that is added to logits"
        raise _mask_error("hold 1 for real tokens and 0 for padding", got)
    if high == 0 and attention_mask.dtype.is_floating_point:
        raise _mask_error("hold 1 for real tokens", "floating-point zeros only, as of a mask that is added to logits")
    return (None if real else mask), (new if high > 1 else None)


@torch.compiler.disable(
    reason="HypeNetModel: position_ids must come with cu_seqlens under fullgraph=True, "
    "since where they restart is not known while the model is traced"
)
def find_documents(
    mask_BT: torch.Tensor | None, position_ids: torch.Tensor | None, numbers_BT: torch.Tensor | None
) -> Packing | None:
    """Look for several documents in a row: positions that do not go on, or another number in the mask.

    Positions go on if they count the tokens, or the real ones. What they are at padding does not matter.

    Args:
        mask_BT: bool [B, T], False for padding; None if there is none.
        position_ids: [B, T], or None.
        numbers_BT: The number of each token's document, [B, T]; None if there are none.

    Returns:
        The documents' packing, or None if every row is one document.
    """
    given = [x for x in (position_ids, numbers_BT) if x is not None]
    columns = torch.arange(given[0].shape[1], device=given[0].device).expand(given[0].shape)
    seen = columns if mask_BT is None else torch.where(mask_BT, columns, -1).cummax(dim=1).values
    before = F.pad(seen[:, :-1], (1, 0), value=-1)  # the column of the last real token before this one
    source = before.clamp(min=0)
    starts_BT = torch.zeros_like(columns, dtype=torch.bool)
    if position_ids is not None:
        step = position_ids - position_ids.gather(1, source)
        starts_BT |= (step != 1) & (step != columns - before)
    if numbers_BT is not None:
        starts_BT |= numbers_BT != numbers_BT.gather(1, source)
    starts_BT &= before >= 0
    if mask_BT is not None:
        starts_BT &= mask_BT
    if not starts_BT.any():
        return None
    starts_BT |= (before < 0) if mask_BT is None else (before < 0) & mask_BT
    return Packing.of_documents(mask_BT, starts_BT)


def packed_positions(cu_seqlens: torch.Tensor, total: int) -> torch.Tensor:
    """Return the position [1, total] of each token in its own document, for cu_seqlens int32 [N + 1].

    The bounds may end before `total`; the tokens after them are counted from 0 too.
    """
    bounds = cu_seqlens.long()
    columns = torch.arange(total, device=bounds.device)
    return (columns - bounds[torch.searchsorted(bounds[1:].contiguous(), columns, right=True)])[None]


def tracing() -> bool:
    """Return whether a graph of the model is being made, in which no decision can depend on a tensor's values."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _offsets(mask_BT: torch.Tensor) -> torch.Tensor:
    """Return where the real tokens of each row begin in the packed row, int32 [B + 1]."""
    return F.pad(mask_BT.sum(dim=1).cumsum(0, dtype=torch.int32), (1, 0))


def _order(mask_BT: torch.Tensor) -> torch.Tensor:
    """Return the position of each token among the real ones of its row, with padding behind them, int64 [B T]."""
    behind = mask_BT.sum(dim=1, keepdim=True) + mask_BT.logical_not().cumsum(dim=1)
    return torch.where(mask_BT, mask_BT.cumsum(dim=1), behind).flatten() - 1


def _mask_error(rule: str, got: object) -> ValueError:
    return ValueError(f"HypeNetModel: attention_mask must {rule}, got {got}")
