"""Bits per byte of a causal language model on documents, at a given context length and by position in the context."""

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halo.evaluation.needle import start_token, token_stream
from halo.losses import token_losses

FIRST_EDGE = 256
CHECKED_TOKENS = 8


@torch.no_grad()
def bits_per_byte(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str] | np.ndarray,
    length: int,
    num_tokens: int = 65536,
    batch_size: int = 1,
) -> dict[str, Any]:
    """Measure the negative log-likelihood in bits per UTF-8 byte, in windows of `length` tokens.

    `num_tokens // length` windows, at least one, are spread evenly over the text. Each starts with a start-of-text
    token, so all its tokens are scored, and none of them sees text before the window.

    Args:
        model: A causal language model whose logits are its output embeddings applied to its last hidden states.
        tokenizer: Its tokenizer.
        documents: Texts, or one token stream as `token_stream` returns it.
        length: Tokens per window.
        num_tokens: Tokens of all windows together.
        batch_size: Windows per forward pass.

    Returns:
        bits_per_byte; stderr over windows; num_bytes; num_windows; window_bits, the bits of each window; and
        by_position, a list of the same (start, stop, bits_per_byte, stderr) for the tokens at positions start to
        stop - 1 of the windows. The positions double: 0 to 255, 256 to 511, 512 to 1023, ... A model that does not
        extrapolate gets worse from one to the next.

    Raises:
        ValueError: If the text has fewer than `length` tokens.
        NotImplementedError: If the model computes its logits in another way.
    """
    stream = documents if isinstance(documents, np.ndarray) else token_stream(tokenizer, documents)
    if len(stream) < length:
        raise ValueError(f"bits_per_byte: length {length} needs as many tokens of text, got {len(stream)}")
    bos = start_token(tokenizer)
    num_windows = max(1, min(num_tokens, len(stream)) // length)
    starts = np.linspace(0, len(stream) - length, num_windows).astype(int)
    windows = np.stack([stream[start : start + length] for start in starts]).astype(np.int64)
    edges = position_edges(length)
    num_bytes = np.array([_bytes_between(tokenizer, window, edges) for window in windows])

    was_training = model.training
    model.eval()
    _check_head(model, torch.from_numpy(windows[:1, :CHECKED_TOKENS]).to(model.device))
    parts = []
    for first in range(0, num_windows, batch_size):
        targets_BT = torch.from_numpy(windows[first : first + batch_size]).to(model.device)
        inputs_BT = torch.cat([torch.full_like(targets_BT[:, :1], bos), targets_BT[:, :-1]], dim=1)
        hidden_BTD = model.base_model(input_ids=inputs_BT, use_cache=False).last_hidden_state
        nats_BT = token_losses(hidden_BTD, model.get_output_embeddings().weight, targets_BT).double()
        parts.append(torch.stack([nats_BT[:, a:b].sum(1) for a, b in pairwise(edges)], 1).cpu())
    model.train(was_training)

    bits = torch.cat(parts).numpy() / math.log(2)  # [windows, ranges of positions]
    value, stderr = ratio_and_error(bits.sum(1), num_bytes.sum(1))
    ranges = zip(pairwise(edges), bits.T, num_bytes.T, strict=True)
    return {
        "bits_per_byte": value,
        "stderr": stderr,
        "num_bytes": int(num_bytes.sum()),
        "num_windows": num_windows,
        "window_bits": bits.sum(1).tolist(),
        "by_position": [
            dict(zip(("start", "stop", "bits_per_byte", "stderr"), (a, b, *ratio_and_error(part, size)), strict=True))
            for (a, b), part, size in ranges
        ],
    }


def position_edges(length: int) -> list[int]:
    """Return where the ranges of positions begin, and `length`: 0, 256, 512, 1024, ..."""
    edges, edge = [0], FIRST_EDGE
    while edge < length:
        edges.append(edge)
        edge *= 2
    return [*edges, length]


def ratio_and_error(values: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """Return sum(values) / sum(sizes) over samples and its standard error, NaN for a single one or no size."""
    total = sizes.sum()
    if not total:
        return math.nan, math.nan
    ratio, count = values.sum() / total, len(values)
    if count == 1:
        return float(ratio), math.nan
    residual = values - ratio * sizes
    return float(ratio), float(math.sqrt(count / (count - 1) * np.square(residual).sum()) / total)


def _bytes_between(tokenizer: PreTrainedTokenizerBase, window: np.ndarray, edges: list[int]) -> list[int]:
    """Return the bytes of text between edges.

    A character that an edge splits may count as up to 2 bytes too many before the edge, and as many too few after it.
    """
    sizes = [0, *(_num_bytes(tokenizer, window[:edge]) for edge in edges[1:])]
    return [after - before for before, after in pairwise(sizes)]


def _num_bytes(tokenizer: PreTrainedTokenizerBase, window: np.ndarray) -> int:
    text = tokenizer.decode(window.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return len(str(text).encode())


def _check_head(model: PreTrainedModel, ids: Tensor) -> None:
    """Check that the logits are those of the output embeddings' weight, without a bias, a scale or a cap."""
    head = model.get_output_embeddings()
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model(input_ids=ids, use_cache=False).logits.float()
    expected = (hidden.float() @ head.weight.float().T).float()
    tolerance = 0.02 * float(expected.abs().max()) + 1e-6
    if logits.shape != expected.shape or not torch.allclose(logits, expected, rtol=0.02, atol=tolerance):
        raise NotImplementedError(
            f"bits_per_byte: the logits must be the output embeddings times the hidden states, got a "
            f"{type(model).__name__} that computes others"
        )
