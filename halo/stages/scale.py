"""Choice of the base `a` of s_t = ln(t + a) / ln(a), after training, by the loss on long held-out documents."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from halo import models
from halo.config import ScaleSettings
from halo.data import Corpus
from halo.journal import Journal
from halo.stages.select import chunk_losses


def choose_scale(
    model: PreTrainedModel,
    corpus: Corpus,
    settings: ScaleSettings,
    journal: Journal,
    on_progress: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Measure the loss for every base in the grid, and set the best one in `model`.

    Args:
        model: The student.
        corpus: Provides held-out text and episodes.
        settings: Grid, and number and length of the documents.
        journal: Keeps the losses of finished bases.
        on_progress: Called with the number of bases that are done.

    Returns:
        A row per base, lowest loss first. `advantage` is by how much the best loss is lower, paired over documents.
    """
    model.eval()
    documents = long_documents(corpus, settings)
    losses = []
    for done, base in enumerate(settings.grid, 1):
        models.set_logit_scale_base(model, base)
        losses.append(np.array(journal.once(f"a = {base}", lambda: chunk_losses(model, documents, batch=1).tolist())))
        on_progress(done)
    best = int(np.argmin([loss.mean() for loss in losses]))
    models.set_logit_scale_base(model, settings.grid[best])
    rows = [_row(base, loss, losses[best]) for base, loss in zip(settings.grid, losses, strict=True)]
    return sorted(rows, key=lambda row: row["loss"])


def long_documents(corpus: Corpus, settings: ScaleSettings) -> torch.Tensor:
    """Return beginnings of held-out documents, some replaced by recall episodes, int64 [documents, length]."""
    num_episodes = round(settings.needle_ratio * settings.documents)
    parts = []
    if num_episodes < settings.documents:
        parts.append(corpus.held_out_documents(settings.documents - num_episodes, settings.length))
    if num_episodes:
        episode = corpus.episodes(corpus.seed, held_out=True)
        parts.append(torch.from_numpy(np.stack([episode(i, settings.length) for i in range(num_episodes)])))
    return torch.cat(parts)


def _row(base: float | None, loss: np.ndarray, best: np.ndarray) -> dict[str, Any]:
    root = np.sqrt(max(len(loss), 1))

    def spread(values: np.ndarray) -> float | None:
        return float(values.std(ddof=1) / root) if len(values) > 1 else None

    gap = loss - best
    return {
        "a": base,
        "loss": float(loss.mean()),
        "loss_error": spread(loss),
        "advantage": float(gap.mean()),
        "advantage_error": spread(gap),
        "documents": len(loss),
    }
