"""`halo eval --model`: measure any causal language model, without a conversion around it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import hypenet  # noqa: F401  registers the model type
from halo import files, teachers
from halo.compute import Compute
from halo.data import SPLITS, Corpus, DataSettings
from halo.demo.corpus import documents
from halo.evaluation.harness import Harness, own_tasks
from halo.evaluation.needle import (
    NUM_NEEDLES,
    NUM_QUERIES,
    NeedleTask,
    mean_and_error,
    recall_per_episode,
    token_stream,
)
from halo.evaluation.perplexity import bits_per_byte
from halo.evaluation.ruler import NUM_DIGITS, RulerTask, generated_recall
from halo.settings import HaloError

SEED = 3


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        model: A directory, or another name of a teacher.
        tasks: "recall", "bits", RULER's "s1", "s2", "s3", "multikey", "multikey2", "multikey3", and tasks of
            lm-evaluation-harness.
        lengths: Tokens of context, for our own tasks.
        haystack: A file, a directory or a dataset with the text for needles and bits per byte; None for the part of the
            standard library that the demo does not train on.
        samples: Prompts or episodes per task and length.
        text_tokens: Tokens of text for bits per byte, per length.
        digits: Digits of a number in RULER's tasks.
        batch_tokens: Tokens per forward pass, but at least one sample.
        limit: Samples per task of lm-evaluation-harness; None for all.
        num_fewshot: Examples in their prompts; None for the task's own number.
        device: "auto", "cpu" or "cuda".
        dtype: "auto", "float32" or "bfloat16".
    """

    model: str
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    haystack: str | None = None
    samples: int = 50
    text_tokens: int = 65_536
    digits: int = NUM_DIGITS
    batch_tokens: int = 8192
    limit: int | None = None
    num_fewshot: int | None = None
    device: str = "auto"
    dtype: str = "auto"


def evaluate_model(request: Request, out: Path | None = None) -> Iterator[dict[str, Any]]:
    """Measure a model and yield a row for each task, length and metric, which are also written to `out`.

    A row has task, length (None for tasks that have their own), metric, value, error (one standard error, or None) and
    samples. Bits per byte have a row for all positions, and one for each range of positions.

    Raises:
        HaloError: If the model or the text cannot be loaded, or a length is too short for a task.
    """
    model, tokenizer, folder = _load(request)
    ours = [name for name in request.tasks if name in own_tasks()]
    theirs = [name for name in request.tasks if name not in own_tasks()]
    harness = Harness(theirs, folder, list(request.lengths)) if theirs else None
    stream = _text(request, tokenizer) if ours else np.zeros(0, np.int32)
    rows: list[dict[str, Any]] = []
    measured = [_own_rows(model, tokenizer, stream, request, ours)]
    if harness is not None:
        measured.append(_harness_rows(model, tokenizer, harness, request))
    for group in measured:
        for row in group:
            rows.append(row)
            if out is not None:
                files.write_json(out, {"model": request.model, "rows": rows})
            yield row


def _own_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stream: np.ndarray, request: Request, tasks: list[str]
) -> Iterator[dict[str, Any]]:
    needles = NeedleTask(tokenizer, stream) if "recall" in tasks else None
    prompts = {
        name: RulerTask(name, tokenizer, stream, request.digits) for name in tasks if name not in ("recall", "bits")
    }
    least = [needles.min_length(NUM_NEEDLES, NUM_QUERIES)] if needles else []
    least += [task.min_length() for task in prompts.values()]
    if least and min(request.lengths) < max(least):
        raise HaloError(f"eval: lengths must be at least {max(least)} with this tokenizer, got {min(request.lengths)}")
    if "bits" in tasks and max(request.lengths) > len(stream):
        raise HaloError(f"eval: lengths must be at most the {len(stream)} tokens of text, got {max(request.lengths)}")
    for length in request.lengths:
        batch = max(1, request.batch_tokens // length)
        for name in tasks:
            if name == "bits":
                bits = bits_per_byte(model, tokenizer, stream, length, request.text_tokens, batch)
                windows = bits["num_windows"]
                yield _row("bits", length, "bits per byte", bits["bits_per_byte"], bits["stderr"], windows)
                for part in bits["by_position"]:
                    metric = f"bits per byte at {part['start']} to {part['stop'] - 1}"
                    yield _row("bits", length, metric, part["bits_per_byte"], part["stderr"], windows)
                continue
            if needles is not None and name == "recall":
                scores = recall_per_episode(model, needles, length, request.samples, SEED, batch_size=batch)
            else:
                scores = generated_recall(model, prompts[name], length, request.samples, SEED, batch_size=batch)
            yield _row(name, length, "recall", *mean_and_error(scores), request.samples)


def _harness_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, harness: Harness, request: Request
) -> Iterator[dict[str, Any]]:
    batch = max(1, request.batch_tokens // max(request.lengths))
    yield from harness.rows(model, tokenizer, batch, request.limit, request.num_fewshot)


def _row(task: str, length: int, metric: str, value: float, error: float, samples: int) -> dict[str, Any]:
    known = None if np.isnan(error) else float(error)
    return {"task": task, "length": length, "metric": metric, "value": value, "error": known, "samples": samples}


def _load(request: Request) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    place = teachers.locate(request.model)
    dtype = request.dtype if request.dtype == "auto" else getattr(torch, request.dtype)
    device = Compute.start(request.device, "fp32").device
    try:
        tokenizer = AutoTokenizer.from_pretrained(place.folder, **place.options)
        model = AutoModelForCausalLM.from_pretrained(place.folder, dtype=dtype, **place.options)
    except Exception as error:  # of the file system, of safetensors, of a configuration that does not fit
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise HaloError(f"eval: the model must be loadable, got {request.model} ({reason})") from None
    model.to(device)  # type: ignore[arg-type]  # transformers wraps Module.to without its types
    return model.eval(), tokenizer, place.folder


def _text(request: Request, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Return all text as one token stream."""
    if request.haystack is None:
        return token_stream(tokenizer, documents("heldout"))
    corpus = Corpus(DataSettings(source=request.haystack), tokenizer)
    return np.concatenate([corpus.stream(split) for split in SPLITS])
