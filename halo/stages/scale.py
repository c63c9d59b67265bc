"""Choice of the base `a` of s_t = ln(t + a) / ln(a), after training, by the loss on long held-out text.

The text is packed as in training, so that any source has enough of it. Positions beyond the training length count as
much as those within it: the scale matters there, and they would be outweighed wherever the text is not much longer.

Leaves scale.json, and the finished model in <out>/model.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field, PositiveInt, model_validator
from transformers import PreTrainedModel

from halo import files, models
from halo.data import Batch, Corpus
from halo.job import Job
from halo.journal import Journal
from halo.losses import next_token_labels, token_losses
from halo.progress import StageProgress, say, warn
from halo.settings import Settings

MIN_CHUNKS = 2


class ScaleSettings(Settings):
    """How to choose `a` in s_t = ln(t + a) / ln(a): by the loss on long held-out text; null means no scale."""

    grid: list[float | None] = Field(
        [None, 30, 100, 300, 500, 600, 900, 2000], min_length=1, description="bases to try; null: no scale"
    )
    length: PositiveInt = Field(32_768, ge=2, description="tokens per sample")
    documents: PositiveInt = Field(16, description="number of samples")
    needle_ratio: float = Field(0.0, ge=0, le=1, description="share of the samples that are recall episodes")

    @model_validator(mode="after")
    def _bases_above_one(self) -> Self:
        for base in self.grid:
            if base is not None and base < 1.01:
                raise ValueError(f"grid must hold numbers of at least 1.01 or null, got {base}")
        return self


def run(job: Job) -> None:
    """Choose the base, and write the finished model."""
    settings = job.config.scale
    job.release_teacher()
    student = job.measured_student("finetune")
    with StageProgress("scale", len(settings.grid), job.compute.main) as progress, job.compute.autocast():
        rows = choose_scale(
            student,
            long_samples(job.corpus, settings),
            settings.grid,
            job.training_length(),
            job.journal("scale"),
            lambda done, base: progress.update(done, "bases tried"),
        )
    if not job.compute.main:
        return
    best, second = rows[0], rows[1] if len(rows) > 1 else None
    if second and second["advantage_error"] is None:
        warn("the choice of the scale's base has no error estimate, since there is one sample; measure more")
    elif second and second["advantage"] < 2 * second["advantage_error"]:
        warn(
            f"the choice of the scale's base is not certain: a = {best['a']} is better than a = {second['a']} by "
            f"{second['advantage']:.4f} +- {second['advantage_error']:.4f} nats; measure more samples"
        )
    say(f"{'scale':10} a = {best['a']}, loss {best['loss']:.4f}")
    record = {"a": best["a"], "length": settings.length, "training_length": job.training_length(), "grid": rows}
    files.write_json(job.directory("scale") / files.SCALE, record)
    job.save_model(best["a"])


def shortfalls(settings: ScaleSettings, corpus: Corpus) -> Iterator[str]:
    """Yield a line for everything that the measurement needs and the text or the lengths do not give."""
    num_episodes = round(settings.needle_ratio * settings.documents)
    if num_episodes < settings.documents and corpus.count_chunks("choose", settings.length) < MIN_CHUNKS:
        yield (
            f"scale.length: must leave {MIN_CHUNKS} samples of held-out text, got {settings.length} tokens of "
            f"{corpus.store('choose').num_tokens} that layers and scale are chosen by; raise data.held_out"
        )
    least = corpus.task("choose").min_length(1, 1)
    if num_episodes and settings.length < least:
        yield f"scale.length: must be at least {least} for recall episodes with this tokenizer, got {settings.length}"


def choose_scale(
    model: PreTrainedModel,
    samples: torch.Tensor,
    grid: list[float | None],
    training_length: int,
    journal: Journal,
    on_progress: Any = lambda done, base: None,
) -> list[dict[str, Any]]:
    """Measure the loss for every base in the grid.

    Args:
        model: The student; its base is changed.
        samples: int64 [n, length].
        grid: The bases; None for no scale.
        training_length: Positions from here on count half, together.
        journal: Keeps the losses of finished bases.
        on_progress: Called with the number of bases that are done, and the last one.

    Returns:
        A row per base, lowest loss first. `advantage` is by how much the best loss is lower, paired over samples.
    """
    model.eval()

    def measure(base: float | None) -> list[list[float]]:
        models.set_logit_scale_base(model, base)
        return [list(pair) for pair in zip(*split_losses(model, samples, training_length), strict=True)]

    found = journal.measure({f"a = {base}": partial(measure, base) for base in grid}, on_progress)
    parts = np.array([found[f"a = {base}"] for base in grid])  # [bases, samples, (within, beyond)]
    losses = parts.mean(-1)
    best = losses[int(np.argmin(losses.mean(1)))]
    rows = [_row(base, loss, pair, best) for base, loss, pair in zip(grid, losses, parts, strict=True)]
    return sorted(rows, key=lambda row: row["loss"])


@torch.no_grad()
def split_losses(model: PreTrainedModel, samples: torch.Tensor, training_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean loss of each sample within the training length and beyond it, in nats, each float64 [n].

    Samples that are not longer than the training length have the same value in both.
    """
    head = model.get_output_embeddings().weight
    within, beyond = [], []
    for ids in samples.split(1):
        ids = ids.to(head.device)
        hidden_BTD = models.hidden_states(model, Batch(ids, torch.zeros_like(ids, dtype=torch.int32)))
        per_token = token_losses(hidden_BTD, head, next_token_labels(ids))[0, :-1].double().cpu()
        within.append(per_token[:training_length].mean().item())
        rest = per_token[training_length:]
        beyond.append(rest.mean().item() if len(rest) else within[-1])
    return np.array(within), np.array(beyond)


def long_samples(corpus: Corpus, settings: ScaleSettings) -> torch.Tensor:
    """Return chunks of packed held-out text, some replaced by recall episodes, int64 [n, length]."""
    num_episodes = round(settings.needle_ratio * settings.documents)
    parts = []
    if num_episodes < settings.documents:
        parts.append(corpus.chunks("choose", settings.documents - num_episodes, settings.length))
    if num_episodes:
        episode = corpus.episodes(corpus.seed, "choose")
        parts.append(torch.from_numpy(np.stack([episode(i, settings.length) for i in range(num_episodes)])))
    samples = torch.cat(parts)
    if len(samples) < settings.documents:
        warn(
            f"scale: the held-out text has {len(samples)} samples of {settings.length} tokens, not {settings.documents}"
        )
    return samples


def _row(base: float | None, loss: np.ndarray, parts: np.ndarray, best: np.ndarray) -> dict[str, Any]:
    def spread(values: np.ndarray) -> float | None:
        return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None

    gap = loss - best
    return {
        "a": base,
        "loss": float(loss.mean()),
        "loss_error": spread(loss),
        "loss_within": float(parts[:, 0].mean()),
        "loss_beyond": float(parts[:, 1].mean()),
        "advantage": float(gap.mean()),
        "advantage_error": spread(gap),
        "documents": len(loss),
    }
