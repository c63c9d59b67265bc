"""Measurements of a converted model, on text and episodes that chose nothing (the side "judge")."""

import json
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from bench.experiments.arms import Row
from halo import files, models
from halo.data import Batch
from halo.job import Job
from halo.journal import Journal
from halo.losses import next_token_labels, token_divergences
from halo.pipeline import Pipeline
from halo.stages.evaluate import SPLIT, evaluate

TEXT_CHUNKS, TEXT_LENGTH = 32, 256
EPISODES, EPISODE_LENGTH = 32, 512
EPISODE_SEED = 7
BATCH = 16


def student(pipeline: Pipeline) -> Row:
    """Measure the finished model: recall, bits per byte, divergence from the teacher."""
    job = pipeline.job
    model = job.measured_student("scale")
    return {
        "scale": model.config.attn_logits_scaling,
        "layers": job.softmax_layers(),
        **at_lengths(job, model, model.config.attn_logits_scaling),
        "divergence": divergence(job, model),
    }


def teacher(pipeline: Pipeline) -> Row:
    """Measure the teacher."""
    return at_lengths(pipeline.job, pipeline.job.teacher, None)


def selection(pipeline: Pipeline) -> Row:
    """Return the choice of layers and what it was made by."""
    path = pipeline.job.directory("select") / files.SELECTION
    return {"selection": json.loads(path.read_text())}


def at_lengths(job: Job, model: PreTrainedModel, scaling: str | float | None, label: str = "model") -> Row:
    """Measure recall and bits per byte at each multiple of the training length, as the stage eval does."""
    journal = Journal(job.out / "measured" / label, job.identity("eval"), job.compute)
    with job.compute.autocast():
        rows = evaluate([(label, model, scaling)], job.corpus, job.config.eval, journal)
    keys = ("recall", "recall_error", "bits_per_byte", "bits_per_byte_error")
    return {key: {str(row["multiple"]): row[key] for row in rows} for key in keys}


@torch.no_grad()
def divergence(job: Job, model: PreTrainedModel) -> dict[str, float]:
    """Return KL(teacher || model) in nats a token, on text and on recall episodes."""
    text = job.corpus.chunks(SPLIT, TEXT_CHUNKS, TEXT_LENGTH)
    episode = job.corpus.episodes(EPISODE_SEED, SPLIT)
    episodes = torch.from_numpy(np.stack([episode(number, EPISODE_LENGTH) for number in range(EPISODES)]))
    found = {}
    with job.compute.autocast():
        for name, all_ids in (("text", text), ("episodes", episodes)):
            sums = [_divergence(job.teacher, model, ids.to(job.compute.device)) for ids in all_ids.split(BATCH)]
            found[name] = float(torch.cat(sums).mean())
    return found


def _divergence(teacher: PreTrainedModel, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    batch = Batch(ids, torch.zeros_like(ids, dtype=torch.int32))
    heads: Any = [each.get_output_embeddings().weight for each in (model, teacher)]
    states = [models.hidden_states(each, batch) for each in (model, teacher)]
    return token_divergences(states[0], heads[0], states[1], heads[1], next_token_labels(ids))[0].mean(-1).double()
