"""Compare two records of the same kind: how much faster the new one is, and whether that exceeds the spread of both."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

HEADER = ["case", "speedup", "range", "verdict"]


@dataclass(frozen=True)
class Change:
    """Old time over new time of a case: ratio of the medians, and the range that the quartiles of both allow."""

    name: str
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        if self.low <= 1 <= self.high:
            return "no change"
        return "faster" if self.ratio > 1 else "slower"


def compare(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[Change], list[str]]:
    """Return a Change for every case timed in both records, and the names of the cases timed in only one."""
    before, after = (_timed(record) for record in (old, new))
    changes = [_change(name, before[name], after[name]) for name in before if name in after]
    return changes, sorted(before.keys() ^ after.keys())


def cells(changes: Iterable[Change]) -> list[list[str]]:
    """Return the cells of HEADER for every change."""
    return [[c.name, f"{c.ratio:.2f}", f"{c.low:.2f} to {c.high:.2f}", c.verdict] for c in changes]


def _timed(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    if record["kind"] == "ops":
        return {row["name"]: row["ours"] for row in record["rows"] if row["ours"] is not None}
    return {f"{row['model']}, decode at {row['length']}": _decode(row) for row in record["rows"]}


def _decode(row: dict[str, Any]) -> dict[str, float]:
    return {"median": row["decode_ms"], "low": row["decode_low_ms"], "high": row["decode_high_ms"]}


def _change(name: str, old: dict[str, float], new: dict[str, float]) -> Change:
    return Change(name, old["median"] / new["median"], old["low"] / new["high"], old["high"] / new["low"])
