"""Bits per byte of a causal language model on documents, at a given context length."""

import math
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halo.evaluation.needle import token_stream

HEAD_ROWS = 1024


@torch.no_grad()
def bits_per_byte(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str] | np.ndarray,
    length: int,
    num_tokens: int = 65536,
    batch_size: int = 1,
) -> dict[str, float]:
    """Measure the negative log-likelihood in bits per UTF-8 byte, in windows of `length` tokens.

    `num_tokens // length` windows, at least one, are spread evenly over the text. Each starts with a start-of-text
    token, so all its tokens are scored, and none of them sees text before the window.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        documents: Texts, or one token stream as `token_stream` returns it.
        length: Tokens per window.
        num_tokens: Tokens of all windows together.
        batch_size: Windows per forward pass.

    Returns:
        bits_per_byte; stderr over windows; num_bytes; num_windows.

    Raises:
        ValueError: If the text has fewer than `length` tokens.
    """
    stream = documents if isinstance(documents, np.ndarray) else token_stream(tokenizer, documents)
    bos = int(stream[0])
    num_windows = max(1, min(num_tokens, len(stream)) // length)
    if len(stream) < length:
        raise ValueError(f"bits_per_byte: length {length} needs as many tokens of text, got {len(stream)}")
    starts = np.linspace(0, len(stream) - length, num_windows).astype(int)
    windows = np.stack([stream[start : start + length] for start in starts]).astype(np.int64)
    num_bytes = np.array([_num_bytes(tokenizer, window) for window in windows])

    was_training = model.training
    model.eval()
    window_bits: list[float] = []
    for first in range(0, num_windows, batch_size):
        targets_BT = torch.from_numpy(windows[first : first + batch_size]).to(model.device)
        inputs_BT = torch.cat([torch.full_like(targets_BT[:, :1], bos), targets_BT[:, :-1]], dim=1)
        window_bits += (_nll(model, inputs_BT, targets_BT) / math.log(2)).tolist()
    model.train(was_training)

    bits = np.array(window_bits)
    value = bits.sum() / num_bytes.sum()
    residual = bits - value * num_bytes
    stderr = float("nan")
    if num_windows > 1:
        stderr = math.sqrt(num_windows / (num_windows - 1) * np.square(residual).sum()) / num_bytes.sum()
    return {
        "bits_per_byte": float(value),
        "stderr": float(stderr),
        "num_bytes": int(num_bytes.sum()),
        "num_windows": num_windows,
    }


def _nll(model: PreTrainedModel, inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """Return the nats of each row, with logits in pieces, because those of a long window do not fit in memory."""
    hidden_BTC = model.base_model(input_ids=inputs_BT, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    total = torch.zeros(len(inputs_BT), dtype=torch.float64)
    for first in range(0, inputs_BT.shape[1], HEAD_ROWS):
        rows = slice(first, first + HEAD_ROWS)
        logits_BTV = head(hidden_BTC[:, rows]).float()
        nll_BT = F.cross_entropy(logits_BTV.transpose(1, 2), targets_BT[:, rows], reduction="none")
        total += nll_BT.double().sum(1).cpu()
    return total


def _num_bytes(tokenizer: PreTrainedTokenizerBase, window: np.ndarray) -> int:
    text = tokenizer.decode(window.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return len(str(text).encode())
