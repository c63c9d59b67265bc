"""The command `halo select --replay`: layers chosen from a sweep that was measured elsewhere.

A sweep has recall and language score of the teacher with each layer replaced, one at a time, both from 0 to 1. It is
a CSV file with the columns layer, recall and language, or a JSON file with a list of objects with these keys.
"""

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from halo.columns import columns
from halo.selection.scores import published_score, top_layers
from halo.selection.settings import SelectSettings, check_layers
from halo.settings import HaloError

MAX_LAYERS = 8192
COLUMNS = ("layer", "recall", "language")
REPLAYED = ("halo", "difference")


@dataclass(frozen=True)
class Replay:
    """A choice of layers.

    Attributes:
        order: All layers, the most important first.
        layers: Those that stay attention, ascending.
        recall, language, scores: Of each swap [L].
    """

    order: list[int]
    layers: list[int]
    recall: np.ndarray
    language: np.ndarray
    scores: np.ndarray


def replay(path: Path, settings: SelectSettings) -> Replay:
    """Choose layers from a sweep.

    Args:
        path: The sweep.
        settings: Policy and number of layers; the policy is halo unless it is set.

    Raises:
        HaloError: If the file is not a sweep, or the policy needs more than averages.
    """
    recall, language = read_sweep(path)
    policy = settings.policy if "policy" in settings.model_fields_set else "halo"
    if policy not in REPLAYED:
        raise HaloError(f"select.policy: must be {' or '.join(REPLAYED)} to replay averages, got {policy}")
    if policy == "halo":
        scores = published_score(recall, language, settings.eps, settings.clip)
    else:  # drops from the best swap, since the teacher is not among them
        scores = (recall.max() - recall) - settings.language_weight * (language.max() - language)
    order = np.argsort(-scores, kind="stable").tolist()
    return Replay(order, top_layers(scores, check_layers(settings, len(recall))), recall, language, scores)


def read_sweep(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read recall and language score of every layer's swap, each float64 [L].

    Raises:
        HaloError: If the file cannot be read, or does not have each layer once with values from 0 to 1.
    """
    found: dict[int, tuple[float, float]] = {}
    for place, row in _rows(path):
        if not isinstance(row, dict) or not set(COLUMNS) <= row.keys():
            raise HaloError(f"{path}: {place} must have {', '.join(COLUMNS)}, got {_shortened(row)}")
        layer, recall, language = (_number(row[name]) for name in COLUMNS)
        if layer is None or not 0 <= layer < MAX_LAYERS or layer != int(layer) or layer in found:
            raise HaloError(
                f"{path}: {place} must have a layer below {MAX_LAYERS} of its own, got {_shortened(row['layer'])}"
            )
        if recall is None or language is None or not (0 <= recall <= 1 and 0 <= language <= 1):
            values = f"{_shortened(row['recall'])} and {_shortened(row['language'])}"
            raise HaloError(f"{path}: {place} must have recall and language from 0 to 1, got {values}")
        found[int(layer)] = recall, language
    missing = sorted(set(range(max(found, default=0) + 1)) - found.keys())
    if missing:
        raise HaloError(f"{path}: must have every layer from 0 on, got none for {missing}")
    recalls, languages = zip(*(found[layer] for layer in sorted(found)), strict=True)
    return np.array(recalls), np.array(languages)


def lines(chosen: Replay) -> list[str]:
    """Format a choice as text: the layers by importance, * marks those that stay attention, and the key to set."""
    rows = [["", *COLUMNS, "score"]]
    for layer in chosen.order:
        values = [f"{array[layer]:.4f}" for array in (chosen.recall, chosen.language, chosen.scores)]
        rows.append(["*" if layer in chosen.layers else "", str(layer), *values])
    return [*columns(rows), "", f"select.layers: {chosen.layers}"]


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield each row with its place, to name in messages."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise HaloError(f"{path}: must be a readable text file: {error}") from None
    if path.suffix.lower() == ".json":
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise HaloError(f"{path}: must be JSON: {error}") from None
        if not isinstance(rows, list):
            raise HaloError(f"{path}: must be a list of objects with {', '.join(COLUMNS)}, got {type(rows).__name__}")
        yield from ((f"entry {number}", row) for number, row in enumerate(rows, 1))
        return
    numbered = [(number, line) for number, line in enumerate(text.splitlines(), 1) if not line.startswith("#")]
    numbered = [(number, line) for number, line in numbered if line.strip()]
    parsed = csv.DictReader((line for _, line in numbered), skipinitialspace=True)
    try:
        yield from ((f"line {number}", row) for (number, _), row in zip(numbered[1:], parsed, strict=False))
    except csv.Error as error:
        raise HaloError(f"{path}: must be CSV: {error}") from None


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and not isinstance(value, bool) else None


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."
