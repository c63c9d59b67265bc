"""Measurement of recall and bits per byte at multiples of the training length."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halo.config import EvalSettings
from halo.data import Corpus
from halo.evaluation.needle import recall, token_stream
from halo.evaluation.perplexity import bits_per_byte
from halo.journal import Journal
from halo.progress import StageProgress

TOKENS_PER_FORWARD = 8192
MIN_SAMPLES = 2

# (name in the table, model, attn_logits_scaling to measure it with)
Labelled = tuple[str, PreTrainedModel, str | float | None]


def evaluate(
    labelled: list[Labelled],
    corpus: Corpus,
    settings: EvalSettings,
    journal: Journal,
) -> list[dict[str, Any]]:
    """Measure recall and bits per byte of models on held-out text.

    Args:
        labelled: Name, model, and the `attn_logits_scaling` to measure it with.
        corpus: Provides tokenizer and held-out text.
        settings: Lengths and amounts.
        journal: Keeps finished rows.

    Returns:
        A row per model and length, with standard errors; bits_per_byte is None if the held-out text is too short.
    """
    stream = token_stream(corpus.tokenizer, corpus.held_out_texts())
    rows = []
    with StageProgress("eval", len(labelled) * len(settings.multiples)) as progress:
        for label, model, scaling in labelled:
            model.config.attn_logits_scaling = scaling
            for multiple in settings.multiples:
                measure = partial(_measure, model, label, multiple, corpus.tokenizer, stream, settings)
                rows.append(journal.once(f"{label}, {multiple}", measure))
                length = settings.length * multiple
                progress.update(len(rows), f"{label}, {length} tokens: recall {rows[-1]['recall']:.2f}")
    return rows


def _measure(
    model: PreTrainedModel,
    label: str,
    multiple: int,
    tokenizer: PreTrainedTokenizerBase,
    stream: np.ndarray,
    settings: EvalSettings,
) -> dict[str, Any]:
    length = settings.length * multiple
    batch = max(1, TOKENS_PER_FORWARD // length)
    samples = settings.recall_samples
    if settings.recall_tokens is not None:
        samples = min(samples, max(MIN_SAMPLES, settings.recall_tokens // length))
    needles = recall(model, tokenizer, length, samples, haystack=stream, batch_size=batch)
    text: Mapping[str, float | None] = {"bits_per_byte": None, "stderr": None}
    if len(stream) >= length:
        text = bits_per_byte(model, tokenizer, stream, length, settings.text_tokens, batch_size=batch)
    return {
        "model": label,
        "multiple": multiple,
        "length": length,
        "recall": needles["recall"],
        "recall_error": needles["stderr"],
        "episodes": samples,
        "bits_per_byte": text["bits_per_byte"],
        "bits_per_byte_error": text["stderr"],
    }
