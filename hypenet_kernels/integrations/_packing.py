"""Keep documents that are packed into one row apart in transformers' models.

A caller names the documents of a row by `cu_seq_lens_q` (their bounds), by `seq_idx` (the document of every token) or
by `position_ids` alone, which restart at every document: the three forms of `DataCollatorWithFlattening`. transformers
hands position_ids to its attention masks but not to its recurrent layers, so that the model's forward is the one place
where all forms are known. There they are reduced to one: every layer below receives `cu_seq_lens_q`, `seq_idx` and
`position_ids` that agree.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]
Arguments = dict[str, Any]
CACHES = ("past_key_values", "cache", "cache_params")  # names of a cache in transformers' models


def bounds(shape: Shape, cu_seqlens: Tensor | None, seq_idx: Tensor | None) -> Tensor | None:
    """Return the bounds of the documents of a [B, T] batch, counted over its B * T tokens, or None for no packing.

    Args:
        shape: (B, T).
        cu_seqlens: [N + 1] integers, or None.
        seq_idx: [B, T] integers, used where cu_seqlens is None, or None.
    """
    if cu_seqlens is None and seq_idx is not None:
        return _bounds_of_starts(_changes(seq_idx.expand(shape)))
    return cu_seqlens


def document_of_token(shape: Shape, cu_seqlens: Tensor) -> Tensor:
    """Return the index of every token's document, [B, T] int32; tokens behind the last bound count as one more."""
    tokens = torch.arange(shape[0] * shape[1], device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].long(), tokens, right=True).to(torch.int32).reshape(shape)


def keep_documents_apart(
    forward: Callable[..., Any],
    finish: Callable[[Any, Arguments], Arguments] | None = None,
) -> Callable[..., Any]:
    """Return `forward` of a model that hands every form of packing to its layers.

    A cache is not made for packed rows, as a cache has one state a row; asking for one raises.

    Args:
        forward: The method of a transformers model that builds the attention masks.
        finish: Function of the model and its arguments, called for packed rows, that returns more arguments; for models
            where naming the documents does not suffice.
    Raises:
        ValueError: packed rows with a cache or an attention mask, or in a model that cannot keep them apart.
    """
    names = tuple(inspect.signature(forward).parameters)[1:]

    @functools.wraps(forward)
    def packed_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) > len(names):
            return forward(self, *args, **kwargs)  # which raises
        arguments = dict(zip(names, args, strict=False)) | kwargs
        packed = packed_arguments(type(self).__name__, arguments)
        if packed and "position_ids" not in names:
            del packed["position_ids"]
        arguments |= packed
        if packed and finish is not None:
            arguments |= finish(self, arguments)
        return forward(self, **arguments)

    return packed_forward


def pass_documents_on(forward: Callable[..., Any], backbone: str) -> Callable[..., Any]:
    """Return `forward` of a language model that hands packing to its backbone, where transformers' own drops it.

    Args:
        forward: Method of the language model.
        backbone: Name of the attribute that holds the model whose forward `keep_documents_apart` wraps.
    """

    @functools.wraps(forward)
    def passing_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        names = "cu_seq_lens_q", "seq_idx", "position_ids"
        given = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        if not given:
            return forward(self, *args, **kwargs)

        def add(module: nn.Module, inputs: Any, keywords: Arguments) -> tuple[Any, Arguments]:
            return inputs, keywords | given

        hook = getattr(self, backbone).register_forward_pre_hook(add, with_kwargs=True)
        try:
            return forward(self, *args, **kwargs)
        finally:
            hook.remove()

    return passing_forward


def packed_arguments(name: str, arguments: Arguments) -> Arguments:
    """Return the arguments of a model's forward that tell its layers of packed documents; {} where there are none."""
    tokens = arguments.get("input_ids")
    tokens = arguments.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:
        return {}
    shape, mask = tokens.shape[:2], arguments.get("attention_mask")
    cache = next((key for key in CACHES if arguments.get(key) is not None), None)
    cu_seqlens, seq_idx = arguments.get("cu_seq_lens_q"), arguments.get("seq_idx")
    if cu_seqlens is None and seq_idx is None:
        positions = _text_positions(arguments.get("position_ids"))
        if positions is None or mask is not None or cache is not None:
            return {}
        seq_idx = _documents_of_positions(positions.expand(shape))
        if seq_idx is None:
            return {}
    cu_seqlens = bounds(shape, cu_seqlens, seq_idx)
    assert cu_seqlens is not None
    if shape[0] == 1 and cu_seqlens.shape[0] == 2:
        return {}
    if cache is not None or arguments.get("use_cache"):
        rule = f"{cache or CACHES[0]} must be None and use_cache False for packed sequences"
        raise ValueError(f"{name}: {rule}, got a cache")
    if mask is not None:
        raise ValueError(f"{name}: attention_mask must be None for packed sequences, got one")
    if seq_idx is None:
        seq_idx = document_of_token(shape, cu_seqlens)
    packed = {"use_cache": False, "cu_seq_lens_q": cu_seqlens, "seq_idx": seq_idx}
    position_ids = arguments.get("position_ids")
    if position_ids is None:
        tokens = torch.arange(shape[0] * shape[1], device=cu_seqlens.device)
        first = cu_seqlens.long()[document_of_token(shape, cu_seqlens).flatten().long()]
        position_ids = (tokens - first).reshape(shape)
    return packed | {"position_ids": position_ids}


def _text_positions(position_ids: Tensor | None) -> Tensor | None:
    """Return the [B, T] positions in the text; None where a multimodal model was given none."""
    if position_ids is not None and position_ids.ndim == 3:
        return position_ids[0] if position_ids.shape[0] in (1, 4) else None
    return position_ids


@torch.compiler.disable
def _documents_of_positions(positions: Tensor) -> Tensor | None:
    """Return seq_idx, or None where every row is one document, by the rule of transformers' attention masks."""
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[:, 1:] = positions.diff(dim=1) != 1
    return starts.cumsum(1, dtype=torch.int32) - 1 if starts[:, 1:].any() else None


def _changes(seq_idx: Tensor) -> Tensor:
    starts = torch.ones_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx.diff(dim=1) != 0
    return starts


@torch.compiler.disable
def _bounds_of_starts(starts: Tensor) -> Tensor:
    (first,) = starts.flatten().nonzero(as_tuple=True)
    return torch.cat([first, first.new_tensor([starts.numel()])]).to(torch.int32)
