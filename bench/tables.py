"""The records as tables, for the terminal (rich) and for RESULTS.md.

python -m bench.tables OPS.json    # as Markdown
"""

import json
import sys
from pathlib import Path


def time_of(timing):
    """The time, and on CUDA also what a caller waits where that is much more."""
    ms, latency = timing["median"], timing["latency"]
    return _in_units(ms) + (f" (call {_in_units(latency)})" if latency is not None and latency > 1.2 * ms else "")


def _in_units(ms):
    """Three digits, with a unit that fits."""
    return f"{ms:.3g} ms" if ms >= 1 else f"{1e3 * ms:.3g} µs"


def spread_of(timing):
    """Half of the range between the quartiles, of the median."""
    return f"± {50 * (timing['high'] - timing['low']) / timing['median']:.0f} %"


def rates(row):
    seconds = 1e-3 * row["ours"]["median"]
    return f"{row['flops'] / seconds / 1e9:.4g} GFLOP/s", f"{row['bytes'] / seconds / 1e9:.4g} GB/s"


def peer_text(name, peer):
    return f"{name}: {peer['error']}" if "error" in peer else f"{peer['ratio']:.2f} x {name}{_note(peer)}"


def _note(timing):
    return f" ({timing['note']})" if timing.get("note") else ""


def cells(row):
    """case, time, spread, rate, share of the roof, ratios to the peers."""
    if row["ours"] is None:
        return [row["name"], "not timed", "", "", "", row["failure"] or "unfinished"]
    compute, memory = rates(row)
    rate = compute if row["bound"] == "compute" else memory
    peers = ", ".join(peer_text(name, peer) for name, peer in row["peers"].items())
    roof = f"{100 * row['fraction']:.0f} % of {'the product' if row['bound'] == 'compute' else _memory(row)}"
    return [row["name"], time_of(row["ours"]) + _note(row["ours"]), spread_of(row["ours"]), rate, roof, peers]


def _memory(row):
    """The memory's rate where it was measured with the case."""
    return f"memory's {max(row['memory'].values()) / 1e9:.0f} GB/s" if "memory" in row else "memory"


HEADER = ["case", "time", "spread", "rate", "roof", "ours is faster by"]


def terminal(record):
    from rich.table import Table  # RESULTS.md and a GPU machine do without

    table = Table(title=record["stamp"]["device"], header_style="bold")
    for name in HEADER:
        table.add_column(name, justify="left" if name in ("case", HEADER[-1]) else "right")
    for row in record["rows"]:
        table.add_row(*cells(row))
    return table


def markdown(header, rows):
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


if __name__ == "__main__":
    print(markdown(HEADER, [cells(row) for row in json.loads(Path(sys.argv[1]).read_text())["rows"]]))
