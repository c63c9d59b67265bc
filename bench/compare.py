"""Two records of the same kind: how much faster the new one is, and whether that is more than their spread."""

from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True)
class Change:
    """old / new of a case: median, and the range that the quartiles of both allow."""

    name: str
    ratio: float
    low: float
    high: float

    @property
    def verdict(self):
        if self.low <= 1 <= self.high:
            return "no change"
        return "faster" if self.ratio > 1 else "slower"


def compare(old, new):
    """A Change for every case that both records have timed, and the names that only one has."""
    before, after = (_timed(record) for record in (old, new))
    changes = [_change(name, before[name], after[name]) for name in before if name in after]
    return changes, sorted(before.keys() ^ after.keys())


def _timed(record):
    if record["kind"] == "ops":
        return {row["name"]: row["ours"] for row in record["rows"] if row["ours"] is not None}
    return {f"{row['model']}, decode at {row['length']}": _decode(row) for row in record["rows"]}


def _decode(row):
    return {"median": row["decode_ms"], "low": row["decode_low_ms"], "high": row["decode_high_ms"]}


def _change(name, old, new):
    return Change(name, old["median"] / new["median"], old["low"] / new["high"], old["high"] / new["low"])


def terminal(changes):
    table = Table(header_style="bold")
    for name in ("case", "times as fast", "spread", "verdict"):
        table.add_column(name, justify="left" if name == "case" else "right")
    for change in changes:
        table.add_row(change.name, f"{change.ratio:.2f}", f"{change.low:.2f} to {change.high:.2f}", change.verdict)
    return table
