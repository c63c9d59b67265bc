"""Records as tables: cells for each kind of row, rendered for the terminal (rich) or as Markdown.

python -m bench.tables OPS.json    # prints the Markdown table
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:  # records.py needs the built modules, and a table on its own does not
    from rich.table import Table

    from bench.records import FamiliesRecord, FamilyRow, ModelRecord, ModelRow, PeerTimes, Row
    from bench.sass.predict import CaseRow, KernelRow

OPS_HEADER = ["case", "time", "spread", "rate", "roof", "speedup over peers"]
MODEL_HEADER = ["model", "dtype", "context", "prefill tokens/s", "decode ms", "cache MB", "peak MB"]
STUDENT_HEADER = ["context", "prefill, times as fast", "decode, times as fast", "cache, % of the teacher's"]
FAMILY_HEADER = ["family", "dtype", "phase", "part", "transformers", "patched", "speedup"]
KERNEL_HEADER = ["kernel, blocks x warps of an SM", "per", "instructions", "HMMA", "LDSM", "cycles", "limiter"]
PREDICTED_HEADER = ["op", "H100", "H200", "made of (H100)", "published for others"]
SPEEDUP_HEADER = ["family", "dtype", "prefill", "prefill: recurrence", "decode", "decode: recurrence"]


def op_cells(row: "Row") -> list[str]:
    """Return the cells of OPS_HEADER for one case."""
    if row["ours"] is None:
        return [row["name"], "not timed", "", "", "", row["failure"] or "unfinished"]
    by_compute = row["bound"] == "compute"
    compute, memory = rates(row)
    peers = ", ".join(peer_text(name, peer) for name, peer in row["peers"].items())
    roof = f"{100 * row['fraction']:.0f} % of {'the matrix product' if by_compute else _memory(row)}"
    time = time_of(row["ours"]) + _note(row["ours"])
    return [row["name"], time, spread_of(row["ours"]), compute if by_compute else memory, roof, peers]


def model_cells(row: "ModelRow") -> list[str]:
    """Return the cells of MODEL_HEADER for one model at one context length."""
    return [
        row["model"],
        row["dtype"],
        str(row["length"]),
        "" if row["prefill_s"] is None else f"{row['length'] / row['prefill_s']:.0f}",
        f"{row['decode_ms']:.2f}",
        f"{row['cache_bytes'] / 1e6:.2f}",
        "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
    ]


def fastest(record: "ModelRecord", model: str, length: int, what: str) -> "ModelRow | None":
    """Return the row of the dtype in which a model is fastest at a length; what: "prefill_s" or "decode_ms"."""
    rows = [row for row in record["rows"] if (row["model"], row["length"]) == (model, length)]
    timed = [row for row in rows if cast(dict[str, Any], row)[what] is not None]
    return min(timed, key=lambda row: cast(dict[str, Any], row)[what], default=None)


def student_cells(record: "ModelRecord") -> list[list[str]]:
    """Return a row for every length, under STUDENT_HEADER: HypeNet against its teacher, each in its faster dtype."""
    cells = []
    for length in sorted({row["length"] for row in record["rows"]}):
        ratios = []
        for what in ("prefill_s", "decode_ms"):
            pair = [fastest(record, model, length, what) for model in ("Qwen3", "HypeNet")]
            values = [cast(dict[str, Any], row)[what] for row in pair if row is not None]
            ratios.append(f"{values[0] / values[1]:.2f}" if len(values) == 2 else "")
        caches = [fastest(record, model, length, "decode_ms") for model in ("Qwen3", "HypeNet")]
        held = [row["cache_bytes"] for row in caches if row is not None]
        cells.append([str(length), *ratios, f"{100 * held[1] / held[0]:.0f}" if len(held) == 2 else ""])
    return cells


def family_cells(row: "FamilyRow") -> list[str]:
    """Return the cells of a row of families.json, under FAMILY_HEADER."""
    head = [row["family"], row["dtype"], row["phase"], row["part"]]
    if "failure" in row:
        return [*head, "not timed", "", row["failure"]]
    times = [f"{time_of(timing)} {spread_of(timing)}" for timing in (row["without"], row["patched"])]
    return [*head, *times, f"{row['ratio']:.2f}"]


def speedup_cells(record: "FamiliesRecord") -> list[list[str]]:
    """Return a row for every family and dtype, under SPEEDUP_HEADER; the convolutions are left out."""
    found: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    for row in record["rows"]:
        if not row["part"].startswith("causal_conv1d"):
            part = "model" if row["part"] == "model" else "recurrence"
            ratio = f"{row['ratio']:.2f}" if "ratio" in row else "not timed"
            found.setdefault((row["family"], row["dtype"]), {})[row["phase"], part] = ratio
    places = [(phase, part) for phase in ("prefill", "decode") for part in ("model", "recurrence")]
    return [[*key, *(ratios.get(place, "") for place in places)] for key, ratios in found.items()]


def kernel_cells(row: "KernelRow") -> list[str]:
    """Return the cells of KERNEL_HEADER for a kernel of sass.json."""
    counts = [f"{row['instructions']:.0f}", f"{row['hmma']:.0f}", f"{row['ldsm']:.0f}"]
    most = max(row["resources"], key=lambda name: row["resources"][name])
    used = f"{most} {100 * row['resources'][most] / row['cycles']:.0f} %"
    limiter = used if row["limiter"] == most else f"{row['limiter']} ({used})"
    return [row["kernel"], row["unit"], *counts, f"{row['cycles']:.0f}", limiter]


def predicted_cells(row: "CaseRow") -> list[str]:
    """Return the cells of PREDICTED_HEADER for an op of sass.json."""
    parts = ", ".join(
        f"{name} {_in_units(ms['H100'])}{' (memory)' if ms['H100'] != ms['H200'] else ''}"
        for name, ms in row["kernels"].items()
    )
    peers = ", ".join(f"{name} {_in_units(ms)}" for name, ms in row["peers"].items())
    return [row["case"], _in_units(row["ms"]["H100"]), _in_units(row["ms"]["H200"]), parts, peers]


def time_of(timing: Mapping[str, Any]) -> str:
    """Return the median; on CUDA also the time until the caller has the result, if that is much longer."""
    ms, latency = timing["median"], timing["latency"]
    return _in_units(ms) + (f" (call {_in_units(latency)})" if latency is not None and latency > 1.2 * ms else "")


def _in_units(ms: float) -> str:
    """Return a time with three digits, in the unit that fits."""
    if ms >= 1e3:
        return f"{1e-3 * ms:.3g} s"
    return f"{ms:.3g} ms" if ms >= 1 else f"{1e3 * ms:.3g} µs"


def spread_of(timing: Mapping[str, Any]) -> str:
    """Return half the interquartile range, as a percentage of the median."""
    return f"± {50 * (timing['high'] - timing['low']) / timing['median']:.0f} %"


def rates(row: "Row") -> tuple[str, str]:
    """Return FLOP/s and bytes per second of our op."""
    assert row["ours"] is not None
    seconds = 1e-3 * row["ours"]["median"]
    return f"{row['flops'] / seconds / 1e9:.4g} GFLOP/s", f"{row['bytes'] / seconds / 1e9:.4g} GB/s"


def peer_text(name: str, peer: "PeerTimes") -> str:
    """Return how many times as fast as the peer ours is, or why the peer was not timed."""
    return f"{name}: {peer['error']}" if "error" in peer else f"{peer['ratio']:.2f} x {name}{_note(peer)}"


def _note(timing: Mapping[str, Any]) -> str:
    return f" ({timing['note']})" if timing.get("note") else ""


def _memory(row: "Row") -> str:
    """Name the memory roof, with its bandwidth if that was measured beside this case."""
    return f"memory's {max(row['memory'].values()) / 1e9:.0f} GB/s" if "memory" in row else "memory"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def terminal(header: Sequence[str], rows: Iterable[Sequence[str]], left: Iterable[str], title: str = "") -> "Table":
    """Return a table for the terminal; the columns named in `left` are aligned left, the others right."""
    from rich.table import Table  # only the command line needs rich

    table, left = Table(title=title or None, header_style="bold"), set(left)
    for name in header:
        table.add_column(name, justify="left" if name in left else "right")
    for row in rows:
        table.add_row(*row)
    return table


if __name__ == "__main__":
    print(markdown(OPS_HEADER, [op_cells(row) for row in json.loads(Path(sys.argv[1]).read_text())["rows"]]))
