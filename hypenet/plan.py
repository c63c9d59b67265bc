"""How one call of a HypeNet runs: on the [B, T] batch, as an in-place step, or on a packed row of tokens.

B sequences, T tokens each, C hidden size.
"""

from typing import Self, cast

import torch

from hypenet.cache import HypeNetCache
from hypenet.context import MAX_STEP_TOKENS, MixerContext
from hypenet.packing import Packing, find_documents, packed_positions, read_mask, tracing


class ForwardPlan:
    """The plan of one call.

    The layers run between `pack` and `restore`, with `context`; `finish` comes last.

    Args:
        context: What the mixers receive; the model adds the rotary embedding of `position_ids`.
        position_ids: int64 [B or 1, T], or [1, total] of a packed row.
        shape: B and T.
        packing: How the tokens become one row; None if they stay as they are.
        real_BT: bool [B, T], only in a step: False where the new token is padding.
    """

    def __init__(
        self,
        context: MixerContext,
        position_ids: torch.Tensor,
        shape: tuple[int, int],
        packing: Packing | None = None,
        real_BT: torch.Tensor | None = None,
    ) -> None:
        self.context, self.position_ids, self.shape = context, position_ids, shape
        self.packing, self.real_BT = packing, real_BT

    @classmethod
    def of_documents(cls, x_BTC: torch.Tensor, cu_seqlens: torch.Tensor, position_ids: torch.Tensor | None) -> Self:
        """Return the plan for packed documents x [1, T, C], whose bounds are cu_seqlens int32 [N + 1]."""
        B, T = x_BTC.shape[:2]
        if B != 1:
            raise ValueError(f"HypeNetModel: input_ids must have a batch of 1 with cu_seqlens, got {B}")
        positions = packed_positions(cu_seqlens, T) if position_ids is None else position_ids
        return cls(MixerContext(cu_seqlens=cu_seqlens), positions, (B, T))

    @classmethod
    def of_batch(
        cls,
        x_BTC: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: HypeNetCache | None,
        cache_is_wanted: bool,
    ) -> Self:
        """Return the plan for a batch x [B, T, C].

        Args:
            x_BTC: The embedded tokens.
            attention_mask, position_ids: As for `HypeNetModel.forward`.
            cache: The cache to continue, given or new; None for none.
            cache_is_wanted: Whether the caller gave it or asked for it, so that it cannot be dropped where a row turns
                out to hold several documents.

        Raises:
            ValueError: If the arguments contradict each other, or have the wrong shape or values.
        """
        B, T = x_BTC.shape[:2]
        past = 0 if cache is None else cache.get_seq_length()
        mask, numbers = read_mask(attention_mask, B, T, past)
        documents = documents_of(mask, position_ids, numbers, (B, T))
        if cache_is_wanted and (documents is not None or (numbers is not None and past > 0)):
            raise ValueError(
                f"HypeNetModel: {'position_ids' if numbers is None else 'attention_mask'} must have one document in "
                "every row with a cache (use_cache=True or past_key_values), got several"
            )
        if documents is not None:
            positions = documents.order[None] if position_ids is None else documents.pack(position_ids)
            return cls(MixerContext(cu_seqlens=documents.cu_seqlens), positions, (B, T), documents)
        if cache is not None:
            cache.prepare(B, x_BTC.device)
        context = MixerContext(cache=cache, past=past, longest=T)
        lengths = None if cache is None or past == 0 else cache.lengths
        context.step = past > 0 and 0 < T <= MAX_STEP_TOKENS and (mask is None or T == 1)
        if context.step or (mask is None and not (cache is not None and past > 0 and cache.ragged)):
            if cache is not None:
                cache.check_space(T)
            if mask is not None and _is_worth_reading(mask, cache) and bool(mask.all()):
                mask = None
            if mask is not None:
                context.state_indices = torch.where(mask[:, 0], torch.arange(B, device=mask.device), -1).int()
            return cls(context, _positions(x_BTC, position_ids, mask, lengths), (B, T), real_BT=mask)
        if mask is None:
            mask = x_BTC.new_ones(B, T, dtype=torch.bool)
        packing = Packing.of_rows_and_padding(mask) if tracing() and past == 0 else Packing.of_rows(mask)
        context.cu_seqlens = packing.cu_seqlens
        if cache is not None:
            _plan_packed_cache(context, packing, cast(torch.Tensor, cache.lengths))
            cache.check_space(context.longest)
        if position_ids is not None:
            positions = packing.pack(position_ids)
        else:
            positions = (packing.order if lengths is None else packing.order + lengths[packing.rows])[None]
        return cls(context, positions, (B, T), packing)

    def pack(self, x_BTC: torch.Tensor) -> torch.Tensor:
        """Return the tokens x [B, T, C] as the layers take them, [B, T, C] or [1, total, C]."""
        return x_BTC if self.packing is None else self.packing.pack(x_BTC)

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """Return a layer's output as [B, T, C], with zeros at padding."""
        if self.packing is not None:
            return self.packing.unpack(x)
        if self.real_BT is not None:
            return x * self.real_BT[..., None].to(x.dtype)
        return x.view(*self.shape, x.shape[-1])

    def finish(self) -> None:
        """Count the new tokens in the cache, if there is one."""
        cache, T = self.context.cache, self.shape[1]
        if cache is None:
            return
        if self.real_BT is not None:
            cache.advance(T, self.real_BT[:, 0].to(torch.int32), self.context.longest, padded=True)
        elif self.packing is not None:
            cache.advance(T, self.packing.counts, self.context.longest, padded=True)
        else:
            cache.advance(T, T, self.context.longest, padded=False)


def _is_worth_reading(mask: torch.Tensor, cache: HypeNetCache | None) -> bool:
    """Return whether to look for padding in a step: where it costs no transfer, or where it ends a cache's past."""
    return not tracing() and (not mask.is_cuda or (cache is not None and cache.keeps_past))


def documents_of(
    mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    numbers: torch.Tensor | None,
    shape: tuple[int, int],
) -> Packing | None:
    """Return the packing of documents that share a row, or None if none do."""
    if position_ids is not None and tuple(position_ids.shape) not in (shape, (1, shape[1])):
        raise ValueError(f"HypeNetModel: position_ids must have shape {list(shape)}, got {list(position_ids.shape)}")
    if shape[1] <= 1 or (position_ids is None and numbers is None):
        return None
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        raise ValueError(
            "HypeNetModel: position_ids must come with cu_seqlens in torch.export, since where they restart is "
            "not known while the model is traced"
        )
    return find_documents(mask, None if position_ids is None else position_ids.expand(shape), numbers)


def _positions(
    x_BTC: torch.Tensor,
    position_ids: torch.Tensor | None,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
) -> torch.Tensor:
    """Return the position of every token that is not packed, [B or 1, T]."""
    if position_ids is not None:
        return position_ids
    if mask is None:
        order = torch.arange(x_BTC.shape[1], device=x_BTC.device)[None]
    else:
        order = mask.cumsum(1).sub_(1).clamp_(min=0)
    return order if lengths is None else order + lengths[:, None]


def _plan_packed_cache(context: MixerContext, packing: Packing, lengths: torch.Tensor) -> None:
    """Set where packed tokens are stored in the cache."""
    context.slots = (packing.rows, packing.order + lengths[packing.rows])
    if not tracing():
        context.longest = int(packing.counts.max())
