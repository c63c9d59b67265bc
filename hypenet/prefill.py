"""Reading a long input in pieces, with a cache: at no time are there activations of more than one piece."""

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from hypenet.packing import read_mask
from hypenet.plan import documents_of


def prefill(
    model: nn.Module,
    chunk: int,
    tokens_to_keep: int | torch.Tensor,
    inputs: dict[str, torch.Tensor | None],
    options: dict[str, Any],
) -> BaseModelOutputWithPast:
    """Run a HypeNetModel on pieces of its input, each of which continues the cache of those before it.

    Args:
        model: The model.
        chunk: Tokens of each sequence in a piece.
        tokens_to_keep: How many of the last hidden states to return. 0, or indices: all.
        inputs: Arguments [B, T, ...] of the model's forward, or None; they are cut along T.
        options: Its other arguments; the mask, which may cover the cached tokens too, is cut here.

    Returns:
        The output of the last piece, with the kept hidden states [B, kept, C].

    Raises:
        ValueError: If `chunk` is not positive, or the options do not go together with it.
    """
    if chunk < 1:
        raise ValueError(f"HypeNetForCausalLM: prefill_chunk must be at least 1, got {chunk}")
    for name in ("cu_seqlens", "cu_seq_lens_q", "output_hidden_states"):
        if options.get(name) is not None and options[name] is not False:
            raise ValueError(f"HypeNetForCausalLM: prefill_chunk must come without {name}")
    if options.get("use_cache") is False or model.training:
        raise ValueError("HypeNetForCausalLM: prefill_chunk must come with a cache and in evaluation mode")
    given = {name: x for name, x in inputs.items() if x is not None}
    if ("input_ids" in given) == ("inputs_embeds" in given):
        raise ValueError("HypeNetModel: exactly one of input_ids and inputs_embeds must be given")
    B, T = next(x for name, x in given.items() if name != "position_ids").shape[:2]
    keep = tokens_to_keep if isinstance(tokens_to_keep, int) and tokens_to_keep > 0 else T
    cache = options.get("cache") if options.get("past_key_values") is None else options["past_key_values"]
    past = 0 if cache is None else cache.get_seq_length()
    mask, numbers = read_mask(options.pop("attention_mask", None), B, T, past)
    if documents_of(mask, given.get("position_ids"), numbers, (B, T)) is not None:  # pieces would not see them all
        raise ValueError("HypeNetForCausalLM: prefill_chunk must come with one document in every row, got several")
    kept: list[torch.Tensor] = []
    outputs = BaseModelOutputWithPast()
    with torch.no_grad():
        for start in range(0, max(T, 1), chunk):
            stop = min(start + chunk, T)
            piece = {name: x[:, start:stop] for name, x in given.items()}
            seen = None if mask is None else mask[:, start:stop]
            outputs = model(**piece, attention_mask=seen, return_dict=True, **(options | {"use_cache": True}))
            options |= {name: outputs[name] for name in ("past_key_values", "cache") if outputs.get(name) is not None}
            last = outputs.last_hidden_state
            kept.append(last[:, max(T - keep - start, 0) :])
    outputs.last_hidden_state = torch.cat(kept, dim=1)
    return outputs
