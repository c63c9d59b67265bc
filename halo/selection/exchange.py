"""The exchange step: a choice is improved in the student's form, one layer at a time.

Scores look at one layer at a time, in a teacher whose other layers are all attention. Here the whole student is
measured: attention without positions in the kept layers, twins in all others.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from halo.selection.measurer import Measurer
from halo.selection.results import divergence_and_error
from halo.selection.scores import Choice
from halo.selection.variants import student


@dataclass(frozen=True)
class Exchanged:
    """The result of the exchange step.

    Attributes:
        layers: The layers that stay attention.
        tried: Every exchange that was measured, as plain JSON: its gain is by how much it lowers the divergence.
        decided: For pairs (kept, dropped) that were compared in the final student, whether they are equivalent.
    """

    layers: list[int]
    tried: list[dict[str, Any]]
    decided: dict[tuple[int, int], bool]


def exchange(measurer: Measurer, layers: list[int], scores: np.ndarray, candidates: int, rounds: int) -> Exchanged:
    """Exchange kept layers for the next in line as long as that lowers the divergence by more than two standard errors.

    Args:
        measurer: Measures students.
        layers: The choice to begin with.
        scores: Of every layer [L]; the candidates are the dropped layers with the largest ones.
        candidates: Layers to try in place of each kept one.
        rounds: Most exchanges. Each lowers the divergence on the same samples, so none is undone.
    """
    tried: list[dict[str, Any]] = []
    decided: dict[tuple[int, int], bool] = {}
    for number in range(1, rounds + 1):
        order = [layer for layer in np.argsort(-scores, kind="stable").tolist() if layer not in layers][:candidates]
        swaps = [(removed, added) for removed in layers for added in order]
        others = [sorted({*layers, added} - {removed}) for removed, added in swaps]
        base, *results = measurer.measure([student(kept, measurer.num_layers) for kept in (layers, *others)])
        changes = [divergence_and_error(result, base) for result in results]
        found = [(-float(change), float(error)) for change, error in changes]
        better = [i for i, (gain, error) in enumerate(found) if gain > 2 * error]
        best = max(better, key=lambda i: found[i][0], default=None)
        for i, ((removed, added), (gain, error)) in enumerate(zip(swaps, found, strict=True)):
            step = {"round": number, "removed": removed, "added": added, "gain": gain, "error": error}
            tried.append(step | {"accepted": i == best})
        if best is None:
            decided = {pair: abs(gain) <= 2 * error for pair, (gain, error) in zip(swaps, found, strict=True)}
            break
        layers = others[best]
    return Exchanged(layers, tried, decided)


def apply_exchange(measurer: Measurer, choice: Choice, candidates: int, rounds: int) -> Choice:
    """Improve a choice that has scores, and decide by the student which pairs are equivalent where it was measured."""
    assert choice.scores is not None
    done = exchange(measurer, choice.layers, choice.scores, candidates, rounds)
    # Keep the pairs of the score that are still a kept and a dropped layer, unless a student has decided about them.
    pairs = [
        (kept, dropped)
        for kept, dropped in choice.equivalents
        if kept in done.layers and dropped not in done.layers and (kept, dropped) not in done.decided
    ]
    pairs += [pair for pair, equivalent in done.decided.items() if equivalent]
    return replace(choice, layers=done.layers, exchanges=done.tried, equivalents=pairs)
