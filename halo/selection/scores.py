"""Scores of single layers; the layers with the largest scores stay attention.

M_i is the teacher whose layer i is replaced by its aligned twin, N_i the teacher whose layer i attends without
positions, S_i the student in which layer i alone is attention, Z_i the teacher whose layer i adds nothing. D is the
divergence from the teacher, R recall, C the loss in nats, r_i = R(teacher) - R(M_i) the recall drop, and
l_i = 1 - exp(C(teacher) - C(M_i)) the language drop.

    position      D(M_i) - D(N_i)               what the twin costs, less what a kept layer costs, which loses positions
    halo          (max_j R(M_j) - R(M_i)) / (max_j P(M_j) - P(M_i) + eps) with P = exp(-C): the published score
                  (arXiv 2601.22156, section 4.2), cut off above `clip` if that is given (50 in the published code)
    recall-drop   r_i
    difference    r_i - w l_i
    ratio         r_i / max(l_i, 2 * largest standard error of a language drop)
    kl            D(M_i)
    lm-ppl        C(Z_i) - C(teacher)           (arXiv 2606.16429, "AR")
    single-layer  C(teacher) - C(S_i)           (arXiv 2606.16429, GA-S2)

The published ratio divides by a number that is zero by construction for the best layer, and zero within its error for
others, so a layer without any effect can win. The denominator of `ratio` is never smaller than what can be measured.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from halo.selection.results import Means
from halo.selection.settings import SelectSettings

TAIL = 0.0228  # share of a normal distribution below two standard deviations


@dataclass(frozen=True)
class Measured:
    """The measurements that scores are computed from: means [L] or [L, R].

    Attributes:
        teacher: Of the teacher, with L = 1.
        forms: Of the one-layer variants by form, "twin", "kept", "silent", and "student" for S_i.
        language_error: The largest standard error of a twin's language drop.
    """

    teacher: Means
    forms: dict[str, Means]
    language_error: float = 0.0


@dataclass(frozen=True)
class Choice:
    """The choice of layers, and what it rests on.

    Attributes:
        layers: The layers that stay attention.
        scores: Score of every layer [L]; None if nothing was measured.
        score_error: Its standard error [L].
        kept_share: Share of the resamples in which a layer is kept [L].
        equivalents: Pairs of a kept and a dropped layer that do not differ within the error.
        columns: What else was measured of every layer [L], by name.
        exchanges: The exchanges that were tried, as plain JSON.
        rounds: The rounds of a greedy search, as plain JSON.
        warnings: Reasons to doubt the choice.
    """

    layers: list[int]
    scores: np.ndarray | None = None
    score_error: np.ndarray | None = None
    kept_share: np.ndarray | None = None
    equivalents: list[tuple[int, int]] = field(default_factory=list)
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    exchanges: list[dict[str, Any]] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def position_score(measured: Measured, settings: SelectSettings) -> np.ndarray:
    """Compute what the twin costs, less what a kept layer costs by the loss of its positions."""
    return measured.forms["twin"].divergence - measured.forms["kept"].divergence


def halo_score(measured: Measured, settings: SelectSettings) -> np.ndarray:
    """Compute the published score from measured recall and loss."""
    twin = measured.forms["twin"]
    return published_score(twin.recall, np.exp(-twin.loss), settings.eps, settings.clip)


def published_score(recall: np.ndarray, language: np.ndarray, eps: float, clip: float | None = None) -> np.ndarray:
    """Compute HALO's score (section 4.2), whose maxima run over the swapped models; recall and language in [0, 1]."""
    values = (recall.max(0) - recall) / (language.max(0) - language + eps)
    return values if clip is None else np.minimum(values, clip)


def recall_drop(measured: Measured, settings: SelectSettings) -> np.ndarray:
    """Compute the recall that the swap loses."""
    return measured.teacher.recall - measured.forms["twin"].recall


def difference_score(measured: Measured, settings: SelectSettings) -> np.ndarray:
    """Compute the recall drop less the weighted language drop."""
    return recall_drop(measured, settings) - settings.language_weight * _language_drop(measured)


def ratio_score(measured: Measured, settings: SelectSettings) -> np.ndarray:
    """Compute the recall drop over the language drop."""
    floor = max(2 * measured.language_error, np.finfo(np.float64).tiny)
    return recall_drop(measured, settings) / np.maximum(_language_drop(measured), floor)


def divergence_score(measured: Measured, settings: SelectSettings) -> np.ndarray:
    """Compute the divergence of the swap from the teacher."""
    return measured.forms["twin"].divergence


def silence_score(measured: Measured, settings: SelectSettings) -> np.ndarray:
    """Compute by how much the loss rises without the layer's attention."""
    return measured.forms["silent"].loss - measured.teacher.loss


def single_layer_score(measured: Measured, settings: SelectSettings) -> np.ndarray:
    """Compute by how much the loss is below the teacher's (a negative number) if the layer alone is attention."""
    return measured.teacher.loss - measured.forms["student"].loss


Score = Callable[[Measured, SelectSettings], np.ndarray]


def top_layers(values: np.ndarray, keep: int) -> list[int]:
    """Return the indices of the `keep` largest values, in ascending order; in a tie the earlier layer wins."""
    return sorted(np.argsort(-values, kind="stable")[:keep].tolist())


def kept_share(drawn: np.ndarray, keep: int) -> np.ndarray:
    """Return the share of resamples in which each layer is among the `keep` best [L], from scores [L, R]."""
    best = np.argsort(-drawn, axis=0, kind="stable")[:keep]
    return np.bincount(best.ravel(), minlength=len(drawn)) / drawn.shape[1]


def equivalent_pairs(scores: np.ndarray, drawn: np.ndarray, layers: list[int]) -> list[tuple[int, int]]:
    """Return pairs of a kept and a dropped layer that the samples cannot tell apart, closest first.

    These are pairs whose order is the other way round in more resamples than a difference of two standard errors
    allows. Unlike a standard error, this is not misled by scores that are ratios, of which a few are huge.

    Args:
        scores: Of every layer [L].
        drawn: Of every layer in each resample [L, R].
        layers: The kept layers.
    """
    pairs = [
        (abs(scores[kept] - scores[dropped]), kept, dropped)
        for kept in layers
        for dropped in range(len(scores))
        if dropped not in layers and np.mean(drawn[dropped] >= drawn[kept]) > TAIL
    ]
    return [(kept, dropped) for _, kept, dropped in sorted(pairs)]


def equivalence_lines(pairs: list[tuple[int, int]]) -> list[str]:
    """Say which layers are equivalent, a line for each group of kept layers with the same dropped ones."""
    rivals: dict[int, list[int]] = {}
    for kept, dropped in pairs:
        rivals.setdefault(kept, []).append(dropped)
    groups: dict[tuple[int, ...], list[int]] = {}
    for kept, dropped_ones in sorted(rivals.items()):
        groups.setdefault(tuple(sorted(dropped_ones)), []).append(kept)
    return [
        f"layers {_listed(sorted([*kept, *dropped]))} are equivalent within the error (kept: {_listed(kept)})"
        for dropped, kept in groups.items()
    ]


def _listed(layers: list[int]) -> str:
    *first, last = (str(layer) for layer in layers)
    return f"{', '.join(first)} and {last}" if first else last


def _language_drop(measured: Measured) -> np.ndarray:
    return 1 - np.exp(measured.teacher.loss - measured.forms["twin"].loss)
