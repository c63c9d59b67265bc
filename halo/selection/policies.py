"""The policies by name. A policy says what it will measure, and chooses layers with a measurer."""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from halo.selection import scores
from halo.selection.cost import Runs
from halo.selection.exchange import apply_exchange
from halo.selection.greedy import GreedyPolicy
from halo.selection.measurer import Measurer
from halo.selection.results import Resamples, Result, divergence_and_error, drops, mean_and_error
from halo.selection.scores import Choice, Measured, Score
from halo.selection.settings import SelectSettings, check_layers
from halo.selection.variants import Form, Variant, one_layer, student, unchanged


class Policy(Protocol):
    """A way to choose layers."""

    def runs(self, num_layers: int, keep: int, settings: SelectSettings) -> Runs:
        """Count what is measured, without what every policy adds: the exchange step and the cost of positions."""
        ...

    def choose(self, measurer: Measurer, settings: SelectSettings) -> Choice:
        """Choose layers."""
        ...


@dataclass(frozen=True)
class ScorePolicy:
    """Keeps the layers with the largest scores, each measured on its own.

    Attributes:
        score: The score of every layer.
        forms: What is measured of every layer: "twin", "kept", "silent", or "student" with this layer as attention.
    """

    score: Score
    forms: tuple[Form | Literal["student"], ...]

    def runs(self, num_layers: int, keep: int, settings: SelectSettings) -> Runs:
        """Count what is measured."""
        students = num_layers * self.forms.count("student")
        return Runs(teachers=1 + num_layers * len(self.forms) - students, students=students)

    def choose(self, measurer: Measurer, settings: SelectSettings) -> Choice:
        """Measure every layer and estimate by a bootstrap over samples how certain scores and choice are."""
        num_layers = measurer.num_layers
        variants = [_variant(form, layer, num_layers) for form in self.forms for layer in range(num_layers)]
        found = measurer.measure([unchanged(num_layers), *variants])
        teacher = Result.stack(found[:1])
        results: dict[str, Result] = {
            form: Result.stack(found[1 + i * num_layers : 1 + (i + 1) * num_layers])
            for i, form in enumerate(self.forms)
        }
        columns: dict[str, np.ndarray] = {}
        if "twin" in results:
            columns["M"], columns["M_error"] = divergence_and_error(results["twin"])
            columns |= drops(results["twin"], teacher)
        error = float(columns["language_drop_error"].max()) if "twin" in results else 0.0

        def score(resamples: Resamples | None = None) -> np.ndarray:
            means = {form: result.means(resamples) for form, result in results.items()}
            return self.score(Measured(teacher.means(resamples), means, error), settings)

        best, keep = score(), check_layers(settings, num_layers)
        drawn = score(Resamples.draw(found[0], settings.bootstrap, measurer.seed))
        layers = scores.top_layers(best, keep)
        pairs = scores.equivalent_pairs(best, drawn, layers)
        share = scores.kept_share(drawn, keep)
        return Choice(
            layers, best, drawn.std(1, ddof=1), share, pairs, columns, warnings=self._warnings(results, layers)
        )

    def _warnings(self, results: dict[str, Result], layers: list[int]) -> list[str]:
        """Name layers that the published ratio drops although they cost far more recall than one that it keeps."""
        if self.score is not scores.halo_score:
            return []
        twin = results["twin"]
        recall = twin.recall.mean(1)
        weakest = max(layers, key=lambda layer: recall[layer])
        warnings = []
        for layer in scores.top_layers(-recall, len(layers)):
            gap = twin.recall[weakest] - twin.recall[layer]
            if layer not in layers and gap.mean() > max(0.05, 2 * gap.std(ddof=1) / np.sqrt(len(gap))):
                warnings.append(
                    f"the published score drops layer {layer}, whose swap leaves {recall[layer]:.2f} of recall, and "
                    f"keeps layer {weakest}, whose swap leaves {recall[weakest]:.2f}"
                )
        return warnings


@dataclass(frozen=True)
class SpacedPolicy:
    """Keeps evenly spaced layers: the first of each group of L / k layers, or the last."""

    last: bool = False

    def runs(self, num_layers: int, keep: int, settings: SelectSettings) -> Runs:
        """Count what is measured."""
        return Runs()

    def choose(self, measurer: Measurer, settings: SelectSettings) -> Choice:
        """Space the layers."""
        return Choice(spaced_layers(measurer.num_layers, check_layers(settings, measurer.num_layers), self.last))


@dataclass(frozen=True)
class GivenPolicy:
    """Keeps the layers that the settings list."""

    def runs(self, num_layers: int, keep: int, settings: SelectSettings) -> Runs:
        """Count what is measured."""
        return Runs()

    def choose(self, measurer: Measurer, settings: SelectSettings) -> Choice:
        """Return the layers of the settings."""
        check_layers(settings, measurer.num_layers)
        return Choice(sorted(set(settings.layers or ())))


@dataclass(frozen=True)
class JointPolicy:
    """Keeps the layers whose gates between twin and attention stay largest when all gates are trained together.

    The error of a gate is over seeds of the training data, if there are several.
    """

    def runs(self, num_layers: int, keep: int, settings: SelectSettings) -> Runs:
        """Count what is trained."""
        tokens = settings.joint_steps * settings.joint_batch * settings.joint_length
        return Runs(training_tokens=settings.joint_seeds * tokens)

    def choose(self, measurer: Measurer, settings: SelectSettings) -> Choice:
        """Train the gates."""
        seeds, keep = settings.joint_seeds, check_layers(settings, measurer.num_layers)
        gates = np.stack([measurer.train_gates(measurer.seed + i) for i in range(seeds)], axis=1)
        best = gates.mean(1)
        layers = scores.top_layers(best, keep)
        if seeds == 1:
            return Choice(layers, best)
        others = [layer for layer in range(measurer.num_layers) if layer not in layers]
        pairs = [(i, j) for i in layers for j in others if _is_close(gates[i] - gates[j])]
        return Choice(layers, best, mean_and_error(gates)[1], scores.kept_share(gates, keep), pairs)


POLICIES: dict[str, Policy] = {
    "position": ScorePolicy(scores.position_score, ("twin", "kept")),
    "halo": ScorePolicy(scores.halo_score, ("twin",)),
    "recall-drop": ScorePolicy(scores.recall_drop, ("twin",)),
    "difference": ScorePolicy(scores.difference_score, ("twin",)),
    "ratio": ScorePolicy(scores.ratio_score, ("twin",)),
    "kl": ScorePolicy(scores.divergence_score, ("twin",)),
    "lm-ppl": ScorePolicy(scores.silence_score, ("silent",)),
    "single-layer": ScorePolicy(scores.single_layer_score, ("student",)),
    "greedy": GreedyPolicy(),
    "joint": JointPolicy(),
    "uniform": SpacedPolicy(),
    "uniform-late": SpacedPolicy(last=True),
    "given": GivenPolicy(),
}


def choose(measurer: Measurer, settings: SelectSettings) -> Choice:
    """Choose layers by the policy of the settings, with the exchange step and the cost of positions if they say so."""
    choice = POLICIES[settings.policy].choose(measurer, settings)
    if settings.candidates:
        choice = apply_exchange(measurer, choice, settings.candidates, settings.exchange_rounds)
    if settings.measures and (settings.measure_positions or settings.policy == "position"):
        kept = measurer.measure([one_layer("kept", i, measurer.num_layers) for i in range(measurer.num_layers)])
        choice.columns["N"], choice.columns["N_error"] = divergence_and_error(Result.stack(kept))
    return choice


def count_runs(settings: SelectSettings, num_layers: int) -> Runs:
    """Count what a choice will measure and train."""
    keep = check_layers(settings, num_layers)
    policy = POLICIES[settings.policy]
    runs = policy.runs(num_layers, keep, settings)
    if settings.candidates and keep < num_layers:
        tried = keep * min(settings.candidates, num_layers - keep)
        runs += Runs(students=1 + tried, further=(settings.exchange_rounds - 1) * tried)
    if settings.measures and settings.measure_positions and settings.policy != "position":
        runs += Runs(teachers=num_layers)
    return runs


def spaced_layers(num_layers: int, keep: int, last: bool = False) -> list[int]:
    """Return `keep` evenly spaced layers, the first of each group or the last: [0, 4] or [3, 7] of 8."""
    return [(i + 1) * num_layers // keep - 1 if last else i * num_layers // keep for i in range(keep)]


def _is_close(differences: np.ndarray) -> bool:
    """Return whether the mean of differences is within two standard errors of zero."""
    mean, error = mean_and_error(differences)
    return bool(abs(mean) <= 2 * error)


def _variant(form: Form | Literal["student"], layer: int, num_layers: int) -> Variant:
    return student([layer], num_layers) if form == "student" else one_layer(form, layer, num_layers)
