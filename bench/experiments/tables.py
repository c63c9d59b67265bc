"""Markdown tables of rows: means over seeds with the spread between them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bench.experiments.arms import Row

Column = tuple[str, Callable[[Row], float | None]]


def at(*keys: str) -> Callable[[Row], Any]:
    """Return a function that looks up nested keys, None where one is missing."""

    def look_up(row: Row) -> Any:
        value: Any = row
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    return look_up


def by_arm(rows: Sequence[Row], columns: Sequence[Column], digits: int = 2, first: str = "arm") -> str:
    """Return a table with a line for each arm and mean +- standard deviation over the seeds."""
    lines = [f"| {first} | " + " | ".join(name for name, _ in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        lines.append(f"| {arm} | " + " | ".join(spread([get(row) for row in own], digits) for _, get in columns) + " |")
    return "\n".join(lines)


def spread(values: Sequence[float | None], digits: int = 2) -> str:
    """Format values of several seeds as mean +- standard deviation."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{np.mean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ± {np.std(known, ddof=1):.{digits}f}"


def quality(rows: Sequence[Row]) -> str:
    """Return the table of `measure.student`, a line for each arm."""
    return by_arm(rows, QUALITY)


QUALITY: list[Column] = [
    ("KL text", at("divergence", "text")),
    ("KL episodes", at("divergence", "episodes")),
    ("bits per byte", at("bits_per_byte", "1")),
    ("recall 1 x", at("recall", "1")),
    ("4 x", at("recall", "4")),
    ("16 x", at("recall", "16")),
]
