"""Results of variants per sample, their means, paired errors, and a bootstrap over samples.

The teacher and all variants see the same samples, so a difference between two of them is a mean of paired differences,
with a correspondingly small standard error. L variants (one for each layer), M chunks of text, N episodes, R resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np


@dataclass(frozen=True)
class Result:
    """Measurements of one variant, or with a leading dimension of L variants; float64.

    Attributes:
        text_divergence: Mean KL divergence from the teacher's next-token distribution on each chunk [M], in nats.
        text_loss: Mean next-token loss on each chunk [M], in nats.
        episode_divergence: The divergence on each episode [N].
        recall: Share of right answers in each episode [N].
    """

    text_divergence: np.ndarray
    text_loss: np.ndarray
    episode_divergence: np.ndarray
    recall: np.ndarray

    def __post_init__(self) -> None:
        text, episodes = self.text_divergence.shape, self.episode_divergence.shape
        for name, expected in (("text_loss", text), ("recall", episodes)):
            found = getattr(self, name).shape
            if found != expected:
                raise ValueError(f"Result: {name} must have shape {list(expected)}, got {list(found)}")

    @classmethod
    def stack(cls, results: Sequence["Result"]) -> Self:
        """Stack the results of L variants along a new first dimension."""
        names = [field.name for field in fields(cls)]
        return cls(*(np.stack([getattr(result, name) for result in results]) for name in names))

    @classmethod
    def from_plain(cls, plain: dict[str, list[float]]) -> Self:
        """Return what `plain` wrote."""
        return cls(**{name: np.array(values, dtype=np.float64) for name, values in plain.items()})

    def plain(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        return {field.name: getattr(self, field.name).tolist() for field in fields(self)}

    def means(self, resamples: "Resamples | None" = None) -> "Means":
        """Return the means over samples [L], or of each resample [L, R]."""
        if resamples is None:
            text, episodes = (np.full(x.shape[-1], 1 / x.shape[-1]) for x in (self.text_loss, self.recall))
        else:
            text, episodes = resamples.text.T, resamples.episodes.T
        return Means(
            divergence=(self.text_divergence @ text + self.episode_divergence @ episodes) / 2,
            loss=self.text_loss @ text,
            recall=self.recall @ episodes,
        )


@dataclass(frozen=True)
class Means:
    """Means over samples, each [L] or [L, R].

    Attributes:
        divergence: From the teacher, half on text and half on episodes, in nats.
        loss: Next-token loss on text, in nats.
        recall: In [0, 1].
    """

    divergence: np.ndarray
    loss: np.ndarray
    recall: np.ndarray


@dataclass(frozen=True)
class Resamples:
    """How often, as a share, each chunk [R, M] and each episode [R, N] is drawn in each resample."""

    text: np.ndarray
    episodes: np.ndarray

    @classmethod
    def draw(cls, result: Result, count: int, seed: int) -> Self:
        """Draw chunks and episodes with replacement."""
        rng = np.random.default_rng(seed)
        sizes = result.text_loss.shape[-1], result.recall.shape[-1]
        text, episodes = (rng.multinomial(size, np.full(size, 1 / size), size=count) / size for size in sizes)
        return cls(text, episodes)


def divergence_and_error(result: Result, base: Result | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean divergence [L] and its standard error; with `base`, of its difference to that result's."""
    text, episodes = result.text_divergence, result.episode_divergence
    if base is not None:
        text, episodes = text - base.text_divergence, episodes - base.episode_divergence
    (t, t_error), (e, e_error) = mean_and_error(text), mean_and_error(episodes)
    return (t + e) / 2, np.hypot(t_error, e_error) / 2


def drops(result: Result, teacher: Result) -> dict[str, np.ndarray]:
    """Compute by how much variants are worse than the teacher, with standard errors, each [L].

    `recall_drop`; `loss_rise` in nats; `language_drop` = 1 - exp(-loss_rise), the relative loss of the right token's
    (geometric mean) probability, which is below 1 like recall; and `..._error` of each.
    """
    recall_drop, recall_error = mean_and_error(teacher.recall - result.recall)
    loss_rise, loss_error = mean_and_error(result.text_loss - teacher.text_loss)
    kept = np.exp(-loss_rise)
    return {
        "recall_drop": recall_drop,
        "recall_drop_error": recall_error,
        "loss_rise": loss_rise,
        "loss_rise_error": loss_error,
        "language_drop": 1 - kept,
        "language_drop_error": kept * loss_error,
    }


def mean_and_error(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean over the last axis and its standard error."""
    return samples.mean(-1), samples.std(-1, ddof=1) / np.sqrt(samples.shape[-1])
