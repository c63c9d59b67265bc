"""Forward search in the student's form: the layer that lowers the divergence most becomes attention, k times."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from halo.selection.cost import Runs
from halo.selection.measurer import Measurer
from halo.selection.results import Resamples, Result, divergence_and_error
from halo.selection.scores import Choice
from halo.selection.settings import SelectSettings, check_layers
from halo.selection.variants import student


@dataclass(frozen=True)
class GreedyPolicy:
    """Begins with a student without attention.

    The score of a kept layer is by how much it lowered the divergence when it was added; that of a dropped layer, by
    how much it would have in the last round. The share of the resamples is that in which a layer wins the round in
    which it was added, and for a dropped layer the largest of all rounds.
    """

    def runs(self, num_layers: int, keep: int, settings: SelectSettings) -> Runs:
        """Count what is measured."""
        return Runs(students=1 + sum(num_layers - i for i in range(keep)))

    def choose(self, measurer: Measurer, settings: SelectSettings) -> Choice:
        """Search, and compare the winner of each round with the others."""
        num_layers = measurer.num_layers
        layers: list[int] = []
        scores, errors, shares = np.zeros(num_layers), np.zeros(num_layers), np.zeros(num_layers)
        rounds: list[dict[str, Any]] = []
        close: list[tuple[float, int, int]] = []
        (base,) = measurer.measure([student([], num_layers)])
        for _ in range(check_layers(settings, num_layers)):
            rest = [layer for layer in range(num_layers) if layer not in layers]
            results = measurer.measure([student([*layers, layer], num_layers) for layer in rest])
            stacked = Result.stack(results)
            gains, gain_errors = divergence_and_error(stacked, base)
            scores[rest], errors[rest] = -gains, gain_errors
            resamples = Resamples.draw(stacked, settings.bootstrap, measurer.seed)
            wins = np.argmin(stacked.means(resamples).divergence, axis=0)
            share = np.bincount(wins, minlength=len(rest)) / settings.bootstrap
            shares[rest] = np.maximum(shares[rest], share)
            best = int(np.argmin(stacked.means().divergence))
            shares[rest[best]] = share[best]
            gaps, gap_errors = divergence_and_error(stacked, results[best])
            close += [
                (float(gap), rest[best], layer)
                for layer, gap, error in zip(rest, gaps, gap_errors, strict=True)
                if layer != rest[best] and gap <= 2 * error
            ]
            rounds.append(
                {"added": rest[best], "gain": float(-gains[best]), "error": float(gain_errors[best])}
                | {"divergence": float(stacked.means().divergence[best])}
            )
            layers, base = sorted([*layers, rest[best]]), results[best]
        pairs = [(kept, dropped) for _, kept, dropped in sorted(close) if dropped not in layers]
        return Choice(layers, scores, errors, shares, pairs, rounds=rounds)
