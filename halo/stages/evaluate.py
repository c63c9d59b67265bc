"""Measurement of recall and bits per byte at multiples of the training length."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from pydantic import Field, PositiveInt
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halo import files
from halo.data import Corpus
from halo.evaluation.needle import recall
from halo.evaluation.perplexity import bits_per_byte
from halo.job import Job
from halo.journal import Journal
from halo.progress import StageProgress
from halo.settings import Settings

TOKENS_PER_FORWARD = 8192
MIN_SAMPLES = 2

# (name in the table, model, attn_logits_scaling to measure it with)
Labelled = tuple[str, PreTrainedModel, str | float | None]


class EvalSettings(Settings):
    """How to measure recall and bits per byte at multiples of the training length."""

    length: PositiveInt = Field(512, description="the training length, multiple 1")
    multiples: list[PositiveInt] = Field([1, 2, 4, 8, 16], min_length=1, description="lengths to measure at")
    recall_samples: PositiveInt = Field(100, description="episodes per length")
    recall_tokens: PositiveInt | None = Field(None, description="cap on the tokens of all episodes at one length")
    text_tokens: PositiveInt = Field(65_536, description="held-out tokens per length")


def run(job: Job) -> None:
    """Measure the teacher and the finished model."""
    student = job.load_finished()
    chosen = student.config.attn_logits_scaling
    labelled: list[Labelled] = [("teacher", job.teacher, None), ("converted", student, chosen)]
    if chosen is not None:
        labelled.append(("converted, no scale", student, None))
    settings = job.config.eval
    with job.compute.autocast():
        rows = evaluate(labelled, job.corpus, settings, job.journal("eval"))
    if job.compute.main:
        record = {"training_length": settings.length, "rows": rows}
        files.write_json(job.directory("eval") / files.RESULTS, record)


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
    stream = corpus.stream("judge")
    parts = {}
    for label, model, scaling in labelled:
        for multiple in settings.multiples:
            measure = partial(_measure, model, label, scaling, multiple, corpus.tokenizer, stream, settings)
            parts[f"{label}, {multiple}"] = measure
    with StageProgress("eval", len(parts), journal.compute is None or journal.compute.main) as progress:
        return list(journal.measure(parts, progress.update).values())


def _measure(
    model: PreTrainedModel,
    label: str,
    scaling: str | float | None,
    multiple: int,
    tokenizer: PreTrainedTokenizerBase,
    stream: np.ndarray,
    settings: EvalSettings,
) -> dict[str, Any]:
    model.config.attn_logits_scaling = scaling
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
