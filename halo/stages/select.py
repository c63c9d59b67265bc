"""Layer selection: one layer at a time is replaced by its aligned twin, and all are measured on the same samples.

Leaves selection.json: the layers that stay attention, and what was measured.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn
from transformers import PreTrainedModel

from halo import files, models, selection
from halo.data import Batch, Corpus
from halo.evaluation.needle import recall_per_episode
from halo.job import Job
from halo.journal import Journal
from halo.losses import next_token_labels, token_losses
from halo.progress import StageProgress, say, warn
from halo.selection import Measurements
from halo.settings import HOW, HaloError, Settings

MIN_CHUNKS = 2


class SelectSettings(Settings):
    """How to choose the layers that stay softmax attention."""

    keep: PositiveInt | None = Field(None, description="number of attention layers; default: a quarter")
    layers: list[NonNegativeInt] | None = Field(None, description="keep these and measure nothing")
    score: Literal["difference", "ratio", "paper", "even"] = Field(
        "difference", description="how the measured drops become scores; even: evenly spaced, nothing is measured"
    )
    language_weight: float = Field(1.0, ge=0, description="weight of the language drop in the difference score")
    eps: float = Field(1e-6, gt=0, description="added to the denominator of the paper's score")
    clip: float | None = Field(
        None, gt=0, description="largest value of the paper's score; the published code has 50, with eps 1e-10"
    )
    recall_samples: PositiveInt = Field(200, ge=2, description="recall episodes")
    recall_length: PositiveInt = Field(512, description="tokens per episode")
    language_samples: PositiveInt = Field(128, ge=2, description="chunks of held-out text")
    language_length: PositiveInt = Field(512, ge=2, description="tokens per chunk")
    batch: PositiveInt = Field(16, json_schema_extra=HOW, description="samples per forward pass")
    bootstrap: PositiveInt = Field(1000, ge=2, description="resamples for the stability of the choice")
    stable_share: float = Field(0.8, gt=0, le=1, description="warn when a kept layer is kept in fewer resamples")


def run(job: Job) -> None:
    """Choose the layers and write the choice."""
    settings = job.config.select
    num_layers = job.teacher_config.num_hidden_layers
    record: dict[str, Any] = {"num_layers": num_layers, "score": settings.score}
    keep = check_layers(settings, num_layers)
    if settings.layers is not None:
        record |= {"score": "given", "layers": sorted(set(settings.layers))}
    elif settings.score == "even":
        record["layers"] = selection.even_layers(num_layers, keep)
    else:
        twins = job.measured_mixers()
        with StageProgress("select", num_layers + 1, job.compute.main) as progress, job.compute.autocast():
            measured = measure_swaps(
                job.teacher,
                twins,
                job.corpus,
                settings,
                job.journal("select"),
                lambda done, part: progress.update(done, "layers swapped"),
            )
        rule = score_rule(settings)
        chosen = selection.choose(measured, keep, rule, settings.bootstrap, settings.stable_share, job.config.seed)
        record |= _record(measured, chosen)
    if job.compute.main:
        for warning in record.get("warnings", []):
            warn(warning)
        say(f"{'select':10} softmax attention stays in layers {record['layers']} (score: {record['score']})")
        files.write_json(job.directory("select") / files.SELECTION, record)


def shortfalls(settings: SelectSettings, corpus: Corpus) -> Iterator[str]:
    """Yield a line for everything that the measurement needs and the text or the lengths do not give."""
    if settings.layers is not None or settings.score == "even":
        return
    least = corpus.task("choose").min_length()
    if settings.recall_length < least:
        yield f"select.recall_length: must be at least {least} with this tokenizer, got {settings.recall_length}"
    if corpus.count_chunks("choose", settings.language_length) < MIN_CHUNKS:
        yield (
            f"select.language_length: must leave {MIN_CHUNKS} chunks of held-out text, got {settings.language_length} "
            f"tokens of {corpus.store('choose').num_tokens}; raise data.held_out"
        )


def score_rule(settings: SelectSettings) -> selection.ScoreRule:
    """Return how scores are computed."""
    return selection.ScoreRule(settings.score, settings.language_weight, settings.eps, settings.clip)


def check_layers(settings: SelectSettings, num_layers: int) -> int:
    """Return the number of layers to keep.

    Raises:
        HaloError: If the teacher has fewer layers than the settings ask for.
    """
    if settings.layers is not None and (not settings.layers or max(settings.layers) >= num_layers):
        raise HaloError(f"select.layers: must be layers below {num_layers}, got {settings.layers}")
    keep = settings.keep or max(1, num_layers // 4)
    if keep > num_layers:
        raise HaloError(f"select.keep: must be at most the teacher's {num_layers} layers, got {keep}")
    return keep


def measure_swaps(
    teacher: PreTrainedModel,
    twins: nn.ModuleList,
    corpus: Corpus,
    settings: SelectSettings,
    journal: Journal,
    on_progress: Callable[[int, str], None] = lambda done, part: None,
) -> Measurements:
    """Measure recall and loss per sample, for the teacher and with each layer replaced by its twin.

    Args:
        teacher: The teacher; its own layers are put back.
        twins: The aligned recurrent mixers.
        corpus: Provides held-out text and episodes.
        settings: Numbers and lengths of the samples.
        journal: Keeps the results of finished layers.
        on_progress: Called with the number of parts that are done, and the name of the last one.
    """
    teacher.eval()
    twins.eval()
    task = corpus.task("choose")
    chunks = corpus.chunks("choose", settings.language_samples, settings.language_length)
    if len(chunks) < settings.language_samples:
        warn(
            f"select: the held-out text has {len(chunks)} chunks of {settings.language_length} tokens, "
            f"not {settings.language_samples}"
        )

    def measure() -> dict[str, list[float]]:
        samples, length, batch = settings.recall_samples, settings.recall_length, settings.batch
        recall = recall_per_episode(teacher, task, length, samples, corpus.seed, batch_size=batch)
        loss = chunk_losses(teacher, chunks, batch)
        return {"recall": recall.tolist(), "loss": loss.tolist()}

    def measure_swap(layer: int) -> dict[str, list[float]]:
        with models.swapped(teacher, twins, layer):
            return measure()

    parts: dict[str, Callable[[], Any]] = {"teacher": measure}
    parts |= {f"layer {layer}": partial(measure_swap, layer) for layer in range(len(twins))}
    whole, *swaps = journal.measure(parts, on_progress).values()
    recalls, losses = (np.array([swap[name] for swap in swaps]) for name in ("recall", "loss"))
    return Measurements(np.array(whole["recall"]), np.array(whole["loss"]), recalls, losses)


@torch.no_grad()
def chunk_losses(model: PreTrainedModel, chunks: Tensor, batch: int) -> np.ndarray:
    """Return the mean next-token loss of each chunk [n, T] in nats, float64 [n]."""
    losses = []
    head = model.get_output_embeddings().weight
    for ids in chunks.split(batch):
        ids = ids.to(head.device)
        hidden_BTD = models.hidden_states(model, Batch(ids, torch.zeros_like(ids, dtype=torch.int32)))
        per_token = token_losses(hidden_BTD, head, next_token_labels(ids))
        losses.append(per_token.double().sum(-1).cpu() / (ids.shape[1] - 1))
    return torch.cat(losses).numpy()


def _record(measured: Measurements, chosen: selection.Plan) -> dict[str, Any]:
    drops = selection.measure_drops(measured)
    columns = {key: value.tolist() for key, value in asdict(drops).items()}
    columns |= {"score_value": chosen.scores.tolist(), "score_error": chosen.score_error.tolist()}
    columns |= {"kept_share": chosen.kept_share.tolist()}
    layers = range(len(chosen.scores))
    rows = [{"layer": layer} | {key: column[layer] for key, column in columns.items()} for layer in layers]
    return {
        "layers": chosen.layers,
        "teacher_recall": float(measured.recall.mean()),
        "teacher_loss": float(measured.loss.mean()),
        "episodes": len(measured.recall),
        "chunks": len(measured.loss),
        "warnings": chosen.warnings,
        "table": rows,
    }
