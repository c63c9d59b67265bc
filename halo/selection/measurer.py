"""Measurement of variants of the teacher on held-out text and recall episodes, each of them once.

All of a sample's numbers come from one forward pass. Memory beyond the model: logits of a few hundred tokens at a time,
and the teacher's hidden states, which are kept in main memory as far as they fit and recomputed otherwise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halo import models
from halo.data import Batch, Corpus
from halo.journal import Journal
from halo.losses import next_token_labels, token_divergences
from halo.progress import warn
from halo.selection.results import Result
from halo.selection.settings import SelectSettings
from halo.selection.variants import Variant, arranged

SPLIT = "choose"


class Measurer(Protocol):
    """The interface that policies measure through.

    Attributes:
        num_layers: Of the teacher.
        seed: Of the bootstrap.
    """

    num_layers: int
    seed: int

    def measure(self, variants: Sequence[Variant]) -> list[Result]:
        """Measure variants, those that were measured before at no cost."""
        ...

    def train_gates(self, seed: int) -> np.ndarray:
        """Train one gate a layer, 0 for the twin and 1 for attention, and return them [L]."""
        ...


@dataclass
class Unmeasured:
    """The measurer of policies that measure nothing."""

    num_layers: int
    seed: int = 0

    def measure(self, variants: Sequence[Variant]) -> list[Result]:
        """Refuse."""
        raise ValueError(f"Unmeasured: variants must not be measured, got {len(variants)}")

    def train_gates(self, seed: int) -> np.ndarray:
        """Refuse."""
        raise ValueError("Unmeasured: gates must not be trained")


@dataclass(frozen=True)
class Samples:
    """The samples that all variants see.

    Attributes:
        text: Chunks of packed text, int64 [M, T].
        episodes: Recall episodes, int64 [N, T].
        answers: Positions of the answers' tokens in an episode, int64 [queries, tokens].
    """

    text: Tensor
    episodes: Tensor
    answers: Tensor

    @classmethod
    def draw(cls, corpus: Corpus, settings: SelectSettings, split: str = SPLIT) -> "Samples":
        """Take samples of one side of the held-out text, by default of that which choices are made by."""
        text = corpus.chunks(split, settings.language_samples, settings.language_length)
        if len(text) < settings.language_samples:
            warn(
                f"select: the held-out text has {len(text)} chunks of {settings.language_length} tokens, "
                f"not {settings.language_samples}"
            )
        task, length = corpus.task(split), settings.recall_length
        rng = np.random.default_rng(corpus.seed)
        episodes = [task.episode(rng, length) for _ in range(settings.recall_samples)]
        starts = task.answer_starts(length, len(episodes[0].answers))
        return cls(
            text,
            torch.from_numpy(np.stack([episode.input_ids for episode in episodes])),
            torch.from_numpy(starts[:, None] + np.arange(task.answer_length)),
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples."""
        return self.text.numel() + self.episodes.numel()


class ModelMeasurer:
    """Measures variants of a real teacher.

    Args:
        teacher: The teacher; its own layers are put back after each variant.
        twins: The aligned recurrent mixers.
        samples: What to measure on.
        settings: Forward passes and memory.
        journal: Keeps the results of finished variants, and shares them out over processes.
        seed: Of the bootstrap.
        on_progress: Called with the number of variants that are measured, and the name of the last one.
        gates: Trains the gates of policy joint from a seed.
        rotary: Whether the student's attention has the teacher's rotary embedding.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        twins: nn.ModuleList,
        samples: Samples,
        settings: SelectSettings,
        journal: Journal,
        seed: int,
        on_progress: Callable[[int, str], None] = lambda done, name: None,
        gates: Callable[[int], np.ndarray] | None = None,
        rotary: bool = False,
    ) -> None:
        self.teacher, self.twins = teacher.eval(), twins.eval()
        self.samples, self.settings, self.journal = samples, settings, journal
        self.num_layers, self.seed = len(twins), seed
        self.on_progress, self.gates, self.rotary = on_progress, gates, rotary
        self.measured: dict[str, Variant] = {}
        self._states: dict[tuple[str, int], Tensor] = {}
        self._free_bytes = settings.cache_gib * 2**30

    def measure(self, variants: Sequence[Variant]) -> list[Result]:
        """Measure variants, those that were measured before at no cost."""
        before = len(self.measured)
        parts: dict[str, Callable[[], Any]] = {
            variant.name: partial(self._measure, variant) for variant in variants if variant.name not in self.measured
        }
        self.measured |= {variant.name: variant for variant in variants}
        self.journal.measure(parts, lambda done, name: self.on_progress(before + done, name))
        return [Result.from_plain(self.journal.pieces[variant.name]) for variant in variants]

    def train_gates(self, seed: int) -> np.ndarray:
        """Train one gate a layer, 0 for the twin and 1 for attention, and return them [L]."""
        if self.gates is None:
            raise ValueError("ModelMeasurer: gates must be given to train them, got None")
        return self.gates(seed)

    @torch.no_grad()
    def _measure(self, variant: Variant) -> dict[str, Any]:
        samples, settings = self.samples, self.settings
        columns: dict[str, list[Tensor]] = {}
        for kind, all_ids in (("text", samples.text), ("episode", samples.episodes)):
            for number, ids in enumerate(all_ids.split(settings.batch)):
                for name, values in self._batch(variant, kind, number, ids).items():
                    columns.setdefault(name, []).append(values.double().cpu())
        columns.pop("episode_loss")
        return Result(**{name: torch.cat(values).numpy() for name, values in columns.items()}).plain()

    def _batch(self, variant: Variant, kind: str, number: int, ids: Tensor) -> dict[str, Tensor]:
        """Return the numbers of each sample of a batch."""
        head: Any = self.teacher.get_output_embeddings()
        ids = ids.to(head.weight.device)
        batch = Batch(ids, torch.zeros_like(ids, dtype=torch.int32))
        teacher_BTD = self._teacher_states(kind, number, batch)
        if all(form == "attention" for form in variant.forms):
            hidden_BTD = teacher_BTD
        else:
            with arranged(self.teacher, list(self.twins), variant, self.rotary):
                hidden_BTD = models.hidden_states(self.teacher, batch)
        labels = next_token_labels(ids)
        divergences, losses = token_divergences(hidden_BTD, head.weight, teacher_BTD, head.weight, labels)
        found = {
            f"{kind}_divergence": divergences.double().mean(-1),
            f"{kind}_loss": losses.double().sum(-1) / (ids.shape[1] - 1),
        }
        if kind == "episode":
            answers = self.samples.answers.to(ids.device)
            # The logits at position i are about token i + 1. Greedy decoding gets an answer right exactly if each of
            # its tokens is the argmax after the true text before it.
            predicted = head(hidden_BTD[:, answers - 1]).argmax(-1)
            found["recall"] = (predicted == ids[:, answers]).all(-1).double().mean(-1)
        return found

    def _teacher_states(self, kind: str, number: int, batch: Batch) -> Tensor:
        """Return the teacher's hidden states [B, T, D] of a batch."""
        kept = self._states.get((kind, number))
        if kept is not None:
            return kept.to(batch.input_ids.device)
        hidden_BTD = models.hidden_states(self.teacher, batch)
        if hidden_BTD.nbytes <= self._free_bytes:
            self._free_bytes -= hidden_BTD.nbytes
            self._states[kind, number] = hidden_BTD.cpu()
        return hidden_BTD
