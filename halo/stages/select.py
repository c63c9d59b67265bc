"""Layer selection: one layer at a time is replaced by its aligned twin, and all are measured on the same samples."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from halo import models
from halo.config import SelectSettings
from halo.data import Batch, Corpus
from halo.evaluation.needle import NeedleTask, recall_per_episode
from halo.journal import Journal
from halo.losses import next_token_labels, token_losses
from halo.plan import Measurements
from hypenet import HypeNetForCausalLM


def measure_swaps(
    teacher: PreTrainedModel,
    twins: HypeNetForCausalLM,
    corpus: Corpus,
    settings: SelectSettings,
    journal: Journal,
    on_progress: Callable[[int], None],
) -> Measurements:
    """Measure recall and loss per sample, for the teacher and with each layer replaced by its twin.

    Args:
        teacher: The teacher; its own layers are put back.
        twins: The HypeNet with the aligned recurrent mixers.
        corpus: Provides held-out text and episodes.
        settings: Numbers and lengths of the samples.
        journal: Keeps the results of finished layers.
        on_progress: Called with the number of layers that are done.
    """
    teacher.eval()
    task = NeedleTask(corpus.tokenizer, corpus.store(held_out=True).tokens)
    chunks = corpus.held_out_chunks(settings.language_samples, settings.language_length)

    def measure() -> dict[str, list[float]]:
        samples, length, batch = settings.recall_samples, settings.recall_length, settings.batch
        recall = recall_per_episode(teacher, task, length, samples, corpus.seed, batch_size=batch)
        loss = chunk_losses(teacher, chunks, batch)
        return {"recall": recall.tolist(), "loss": loss.tolist()}

    def measure_swap(layer: int) -> dict[str, list[float]]:
        with models.swapped(teacher, twins, layer):
            return measure()

    whole = journal.once("teacher", measure)
    swaps = []
    for layer in range(teacher.config.num_hidden_layers):
        swaps.append(journal.once(f"layer {layer}", partial(measure_swap, layer)))
        on_progress(layer + 1)
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
