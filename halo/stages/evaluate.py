"""Measurement of recall, retrieval and bits per byte at multiples of the training length, on text of its own.

Leaves results.json. Nothing here was seen by a stage that chooses: text, episodes and seed are those of "judge".
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import numpy as np
from pydantic import Field, PositiveInt
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halo import files, models
from halo.data import Corpus
from halo.evaluation.needle import NeedleTask, mean_and_error, recall_per_episode
from halo.evaluation.perplexity import bits_per_byte
from halo.evaluation.ruler import NUM_DIGITS, RulerTask, generated_recall
from halo.job import Job
from halo.journal import Journal
from halo.progress import StageProgress
from halo.settings import HOW, Settings

SPLIT = "judge"
SEED = 2  # with the corpus' seed, that of all samples; other stages use other ones
MIN_SAMPLES = 2

# (name in the table, model, attn_logits_scaling to measure it with)
Labelled = tuple[str, PreTrainedModel, str | float | None]


class EvalSettings(Settings):
    """How to measure recall, retrieval and bits per byte at multiples of the training length."""

    length: PositiveInt = Field(512, description="the training length, multiple 1")
    multiples: list[PositiveInt] = Field([1, 2, 4, 8, 16], min_length=1, description="lengths to measure at")
    recall_samples: PositiveInt = Field(100, description="episodes per length")
    recall_tokens: PositiveInt | None = Field(None, description="cap on the tokens of all episodes at one length")
    text_tokens: PositiveInt = Field(65_536, description="held-out tokens per length")
    tasks: list[Literal["s1", "s2", "s3", "multikey", "multikey2", "multikey3"]] = Field(
        [], description="RULER's needle tasks, answered by free generation"
    )
    task_samples: PositiveInt = Field(50, description="prompts per task and length; recall_tokens caps them too")
    task_digits: int = Field(NUM_DIGITS, ge=1, le=15, description="digits of a number in these tasks")
    batch_tokens: PositiveInt = Field(
        8192, json_schema_extra=HOW, description="tokens per forward pass, but at least one sample"
    )

    def longest(self) -> int:
        """Return the greatest length, in tokens."""
        return self.length * max(self.multiples)


def run(job: Job) -> None:
    """Measure the teacher and the finished model."""
    student = job.measured_student("scale")
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
        models.raise_context_length(job.out / files.MODEL, settings.longest())


def shortfalls(settings: EvalSettings, corpus: Corpus) -> Iterator[str]:
    """Yield a line for everything that this measurement needs and the text or the lengths do not give."""
    length = settings.length * min(settings.multiples)
    needles = [("recall", corpus.task(SPLIT).min_length())]
    needles += [(task.name, task.min_length()) for task in _ruler_tasks(settings, corpus, corpus.stream(SPLIT))]
    for name, least in needles:
        if length < least:
            yield f"eval.length: must be at least {least} for {name} with this tokenizer, got {length}"


def evaluate(
    labelled: list[Labelled],
    corpus: Corpus,
    settings: EvalSettings,
    journal: Journal,
) -> list[dict[str, Any]]:
    """Measure models on the text that was kept for this.

    Args:
        labelled: Name, model, and the `attn_logits_scaling` to measure it with.
        corpus: Provides tokenizer, text and needle task.
        settings: Lengths and amounts.
        journal: Keeps finished parts.

    Returns:
        A row per model and length, with standard errors (None for a single sample), `episode_recall` of each episode
        and `window_bits` of each window of text, which are the same for all models. `bits_per_byte`, `window_bits` and
        `by_position` are None if the text is too short; `tasks` holds recall, recall_error and samples of each of
        settings.tasks.

    Raises:
        TooShort: If the needles do not fit into a length.
    """
    stream, needles = corpus.stream(SPLIT), corpus.task(SPLIT)
    seed = (corpus.seed, SEED)
    tasks = list(_ruler_tasks(settings, corpus, stream))
    parts: dict[str, Callable[[], Any]] = {}
    for label, model, scaling in labelled:
        for multiple in settings.multiples:
            key, length = f"{label}, {multiple}", settings.length * multiple
            measure = partial(_measure, model, needles, corpus.tokenizer, stream, settings, length, seed)
            parts[key] = partial(_with_scaling, model, scaling, measure)
            for task in tasks:
                generate = partial(_generate, model, task, settings, length, seed)
                parts[f"{key}, {task.name}"] = partial(_with_scaling, model, scaling, generate)
    with StageProgress("eval", len(parts), journal.compute is None or journal.compute.main) as progress:
        values = journal.measure(parts, progress.update)
    return [
        {"model": label, "multiple": multiple, "length": settings.length * multiple}
        | values[f"{label}, {multiple}"]
        | {"tasks": {task.name: values[f"{label}, {multiple}, {task.name}"] for task in tasks}}
        for label, _, _ in labelled
        for multiple in settings.multiples
    ]


def _measure(
    model: PreTrainedModel,
    task: NeedleTask,
    tokenizer: PreTrainedTokenizerBase,
    stream: np.ndarray,
    settings: EvalSettings,
    length: int,
    seed: tuple[int, int],
) -> dict[str, Any]:
    batch, samples = _amounts(settings, settings.recall_samples, length)
    per_episode = recall_per_episode(model, task, length, samples, seed, batch_size=batch)
    recall, recall_error = mean_and_error(per_episode)
    bits: dict[str, Any] = dict.fromkeys(("bits_per_byte", "stderr", "by_position", "window_bits"))
    if len(stream) >= length:
        bits = bits_per_byte(model, tokenizer, stream, length, settings.text_tokens, batch_size=batch)
    return {
        "recall": recall,
        "recall_error": _number(recall_error),
        "episodes": samples,
        "episode_recall": per_episode.tolist(),
        "bits_per_byte": bits["bits_per_byte"],
        "bits_per_byte_error": _number(bits["stderr"]),
        "window_bits": bits["window_bits"],
        "by_position": bits["by_position"]
        and [{name: _number(value) for name, value in part.items()} for part in bits["by_position"]],
    }


def _generate(
    model: PreTrainedModel, task: RulerTask, settings: EvalSettings, length: int, seed: tuple[int, int]
) -> dict[str, Any]:
    batch, samples = _amounts(settings, settings.task_samples, length)
    recall, error = mean_and_error(generated_recall(model, task, length, samples, seed, batch_size=batch))
    return {"recall": recall, "recall_error": _number(error), "samples": samples}


def _with_scaling(
    model: PreTrainedModel, scaling: str | float | None, measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    model.config.attn_logits_scaling = scaling
    return measure()


def _ruler_tasks(settings: EvalSettings, corpus: Corpus, stream: np.ndarray) -> Iterator[RulerTask]:
    return (RulerTask(name, corpus.tokenizer, stream, settings.task_digits) for name in settings.tasks)


def _amounts(settings: EvalSettings, samples: int, length: int) -> tuple[int, int]:
    """Return the samples per forward pass, and in all."""
    if settings.recall_tokens is not None:
        samples = min(samples, max(MIN_SAMPLES, settings.recall_tokens // length))
    return max(1, settings.batch_tokens // length), samples


def _number(value: float | None) -> float | None:
    """Return None in place of NaN, which JSON does not have."""
    return None if value is None or math.isnan(value) else value
