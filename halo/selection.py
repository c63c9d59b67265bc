"""Choice of the layers that stay attention: scores of one-layer swaps, their errors, and how stable the choice is.

Swap i replaces the mixer of layer i of the teacher by its aligned recurrent twin. It is measured by recall r in [0, 1]
on N episodes and by next-token loss l in nats on M chunks of text. The teacher and all swaps see the same samples, so a
drop is a mean of paired differences, with a correspondingly small standard error:

    recall_drop_i   = mean_n(r_teacher,n - r_i,n)
    loss_rise_i     = mean_m(l_i,m - l_teacher,m)          language_drop_i = 1 - exp(-loss_rise_i)

The language drop is the relative loss of the correct token's (geometric mean) probability; like recall, it is below 1.

    difference   recall_drop_i - w * language_drop_i
    ratio        recall_drop_i / max(language_drop_i, 2 * largest standard error of a language drop)
    paper        (max_j R_j - R_i) / (max_j C_j - C_i + eps) with R recall, C = exp(-loss): HALO's published form,
                 cut off above `clip` if that is given, as in the published code (50, with eps = 1e-10)

The published ratio divides by a number that is zero by construction for the best layer, and zero within its error for
others, so a layer without any effect can win. The denominator of `ratio` is never smaller than what can be measured.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Measurements:
    """Per-sample results, float64: recall [N] and loss [M] of the teacher, and [L, N] and [L, M] of the L swaps."""

    recall: np.ndarray
    loss: np.ndarray
    swapped_recall: np.ndarray
    swapped_loss: np.ndarray

    def __post_init__(self) -> None:
        layers = self.swapped_recall.shape[0]
        if self.swapped_recall.shape != (layers, *self.recall.shape) or self.recall.ndim != 1:
            raise ValueError(
                f"Measurements: swapped_recall must have shape [L, {len(self.recall)}], got {self.swapped_recall.shape}"
            )
        if self.swapped_loss.shape != (layers, *self.loss.shape) or self.loss.ndim != 1:
            raise ValueError(
                f"Measurements: swapped_loss must have shape [{layers}, {len(self.loss)}], "
                f"got {self.swapped_loss.shape}"
            )

    def resample(self, rng: np.random.Generator) -> "Measurements":
        """Draw episodes and chunks with replacement."""
        episodes = rng.integers(len(self.recall), size=len(self.recall))
        chunks = rng.integers(len(self.loss), size=len(self.loss))
        return Measurements(
            self.recall[episodes], self.loss[chunks], self.swapped_recall[:, episodes], self.swapped_loss[:, chunks]
        )


@dataclass(frozen=True)
class ScoreRule:
    """How to compute scores from drops: the rule's name and its parameters."""

    name: str = "difference"
    language_weight: float = 1.0
    eps: float = 1e-6
    clip: float | None = None


@dataclass(frozen=True)
class Drops:
    """Mean and standard error of each drop, [L]; loss_rise is in nats per token, the others are in [-1, 1]."""

    recall_drop: np.ndarray
    recall_error: np.ndarray
    loss_rise: np.ndarray
    loss_error: np.ndarray
    language_drop: np.ndarray
    language_error: np.ndarray


@dataclass(frozen=True)
class Plan:
    """The choice of layers.

    Attributes:
        layers: The layers that stay attention.
        scores: Score of every layer [L].
        score_error: Its bootstrap standard error [L].
        kept_share: Share of the resamples in which a layer is kept [L].
        warnings: Reasons to doubt the choice.
    """

    layers: list[int]
    scores: np.ndarray
    score_error: np.ndarray
    kept_share: np.ndarray
    warnings: list[str]


def measure_drops(measured: Measurements) -> Drops:
    """Compute the paired drops of every swap."""
    recall_drop, recall_error = _mean_and_error(measured.recall - measured.swapped_recall)
    loss_rise, loss_error = _mean_and_error(measured.swapped_loss - measured.loss)
    kept = np.exp(-loss_rise)
    return Drops(recall_drop, recall_error, loss_rise, loss_error, 1 - kept, kept * loss_error)


def scores(measured: Measurements, rule: ScoreRule) -> np.ndarray:
    """Compute the score of every layer [L]; layers with the largest scores are kept."""
    if rule.name == "paper":
        return average_scores(measured.swapped_recall.mean(1), np.exp(-measured.swapped_loss.mean(1)), rule)
    drops = measure_drops(measured)
    if rule.name == "difference":
        return drops.recall_drop - rule.language_weight * drops.language_drop
    if rule.name == "ratio":
        floor = max(2 * drops.language_error.max(), np.finfo(np.float64).tiny)
        return drops.recall_drop / np.maximum(drops.language_drop, floor)
    raise ValueError(f"scores: rule must be difference, ratio or paper, got {rule.name}")


def choose(measured: Measurements, keep: int, rule: ScoreRule, resamples: int, stable_share: float, seed: int) -> Plan:
    """Choose the layers with the largest scores, and estimate by a bootstrap over samples how stable the choice is.

    Args:
        measured: Results of the teacher and of all swaps.
        keep: Number of layers that stay attention.
        rule: How to compute scores.
        resamples: Number of bootstrap resamples.
        stable_share: Warn about a chosen layer that is chosen in a smaller share of the resamples.
        seed: Seed of the bootstrap.
    """
    best = scores(measured, rule)
    layers = top_layers(best, keep)
    rng = np.random.default_rng(seed)
    drawn = np.stack([scores(measured.resample(rng), rule) for _ in range(resamples)])
    kept = np.zeros(len(best))
    for row in drawn:
        kept[top_layers(row, keep)] += 1 / resamples
    error = drawn.std(0, ddof=1) if resamples > 1 else np.full(len(best), np.nan)
    return Plan(layers, best, error, kept, _warnings(measured, rule, layers, kept, stable_share))


def top_layers(values: np.ndarray, keep: int) -> list[int]:
    """Return the indices of the `keep` largest values, in ascending order; in a tie the earlier layer wins."""
    return sorted(np.argsort(-values, kind="stable")[:keep].tolist())


def even_layers(num_layers: int, keep: int) -> list[int]:
    """Return `keep` evenly spaced layers, the first of each group: attention, RNN, RNN, RNN for a quarter."""
    return [i * num_layers // keep for i in range(keep)]


def average_scores(recall: np.ndarray, language: np.ndarray, rule: ScoreRule) -> np.ndarray:
    """Compute the score of every layer [L] from the averages of its swap.

    Args:
        recall: Recall of each swap [L], in [0, 1].
        language: Accuracy of each swap in language tasks, or probability of the right token [L], in [0, 1].
        rule: "paper", or "difference" with drops from the best swap, since the teacher is not among them.

    Raises:
        ValueError: If the rule needs the samples or the teacher.
    """
    recall_drop, language_drop = recall.max() - recall, language.max() - language
    if rule.name == "difference":
        return recall_drop - rule.language_weight * language_drop
    if rule.name != "paper":
        raise ValueError(f"average_scores: rule must be paper or difference, got {rule.name}")
    return paper_scores(recall, language, rule.eps, rule.clip)


def paper_scores(recall: np.ndarray, language: np.ndarray, eps: float, clip: float | None = None) -> np.ndarray:
    """Compute HALO's score (section 4.2), whose maxima run over the swapped models; recall and language in [0, 1]."""
    values = (recall.max() - recall) / (language.max() - language + eps)
    return values if clip is None else np.minimum(values, clip)


def _warnings(
    measured: Measurements, rule: ScoreRule, layers: list[int], kept: np.ndarray, stable_share: float
) -> list[str]:
    warnings = []
    unsure = [layer for layer in layers if kept[layer] < stable_share]
    if unsure:
        rivals = [layer for layer in np.argsort(-kept).tolist() if layer not in layers][: len(unsure)]
        listed = ", ".join(f"{layer} ({kept[layer]:.0%})" for layer in unsure)
        rival_list = ", ".join(f"{layer} ({kept[layer]:.0%})" for layer in rivals)
        warnings.append(
            f"the choice of layers is not stable: kept in fewer than {stable_share:.0%} of resamples: {listed}; "
            f"next in line: {rival_list}. Measure more samples, or set select.layers"
        )
    drops = measure_drops(measured)
    dropped = [layer for layer in top_layers(drops.recall_drop, len(layers)) if layer not in layers]
    weakest = min(layers, key=lambda layer: drops.recall_drop[layer])
    for layer in dropped:
        gap, error = _mean_and_error(measured.swapped_recall[weakest] - measured.swapped_recall[layer])
        if gap > 2 * error and gap > 0.05:
            warnings.append(
                f"score {rule.name!r} drops layer {layer}, whose swap costs {drops.recall_drop[layer]:.2f} of recall, "
                f"and keeps layer {weakest}, whose swap costs {drops.recall_drop[weakest]:.2f}"
            )
    return warnings


def _mean_and_error(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean over the last axis and its standard error."""
    return samples.mean(-1), samples.std(-1, ddof=1) / np.sqrt(samples.shape[-1])
