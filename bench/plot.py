"""Draw roofline.png, speed.png and context.png of one device's records, and overview.png for the README."""

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench import records, tables
from bench.records import ModelRecord, ModelRow, OpsRecord, Row

DPI = 120
COLORS = {"Qwen3": "tab:gray", "HypeNet": "tab:blue"}
OVERVIEW = {"teacher": "Qwen3 (teacher)", "converted": "HypeNet (converted)"}  # models of the demo's record


def draw(folder: Path) -> list[Path]:
    """Draw what the records in `folder` (ops.json, model.json) allow; returns the paths."""
    drawn = []
    if (folder / "ops.json").is_file():
        record = records.load(folder / "ops.json")
        drawn += [roofline(record, folder / "roofline.png"), speed(record, folder / "speed.png")]
    if (folder / "model.json").is_file():
        drawn.append(context(records.load(folder / "model.json"), folder / "context.png"))
    if not drawn:
        raise SystemExit(f"bench: {folder} must hold ops.json or model.json, got neither")
    return drawn


def draw_overview(results: Path) -> Path | None:
    """Draw overview.png from demo/demo.json and the first device's model.json under `results`, if both are there."""
    demo, whole = results / "demo" / "demo.json", sorted(results.glob("*/model.json"))
    if not demo.is_file() or not whole:
        return None
    return overview(records.load(whole[0]), records.load(demo), results / "overview.png")


def overview(record: ModelRecord, demo: dict[str, Any], path: Path) -> Path:
    """Decode time against context length, and needle recall against context length, of teacher and HypeNet."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    for name, rows in _by_model(record):
        left.plot(_lengths(rows), [row["decode_ms"] for row in rows], marker="o", color=COLORS[name], label=name)
    _log_axis(left, "context, tokens", _all_lengths(record))
    left.set(ylim=(0, None), ylabel="ms per token")
    left.set_title(f"Decode time: {record['layers']} layers, {record['stamp']['device']}", fontsize=10)
    for (model, label), color in zip(OVERVIEW.items(), COLORS.values(), strict=True):
        points = [row for row in demo["rows"] if row["model"] == model]
        recall, errors = ([row[name] for row in points] for name in ("recall", "recall_error"))
        right.errorbar([row["length"] for row in points], recall, yerr=errors, marker="o", color=color, label=label)
    _log_axis(right, "context, tokens", sorted({row["length"] for row in demo["rows"]}))
    right.axvline(demo["training_length"], color="black", linewidth=0.8, linestyle=":")
    right.set(ylim=(-0.05, 1.05), ylabel="fraction of needles found")
    right.set_title("Needle recall: demo model (dotted: training length)", fontsize=10)
    for axes, place in ((left, "upper left"), (right, "center right")):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9, loc=place)
    return _save(figure, path)


def _timed(record: OpsRecord) -> list[Row]:
    return [row for row in record["rows"] if row["ours"] is not None]


def _median(row: Row) -> float:
    assert row["ours"] is not None
    return row["ours"]["median"]


def _title(record: OpsRecord | ModelRecord) -> str:
    stamp = record["stamp"]
    return f"{stamp['device']}, {stamp['date'][:10]}, {stamp['commit'][:8]}"


def roofline(record: OpsRecord, path: Path) -> Path:
    """Plot every case at its FLOPs per byte and its FLOP/s, under the roofs."""
    figure, axes = plt.subplots(figsize=(9, 6))
    rows, roofs = _timed(record), record["roofs"]
    bandwidth = max(roofs["copy"], roofs["read"])
    peak = max(roofs["matmul"].values())
    intensities = [row["flops"] / row["bytes"] for row in rows]
    reach = [min([*intensities, 0.1]), max([*intensities, 10 * peak / bandwidth])]
    ridge = peak / bandwidth
    corners = [reach[0], ridge, reach[1]], [bandwidth * reach[0], peak, peak]
    axes.plot(*corners, color="black", label="memory bandwidth, matrix product")
    kind = lambda row: (row["op"], row["backward"])  # noqa: E731
    for (op, backward), group in groupby(sorted(rows, key=kind), key=kind):
        members = list(group)
        x = [row["flops"] / row["bytes"] for row in members]
        y = [row["flops"] / (1e-3 * _median(row)) for row in members]
        axes.scatter(x, y, label=f"{op}{', fwd+bwd' if backward else ''}", marker="s" if backward else "o")
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="FLOP/s", title=_title(record))
    axes.legend(fontsize=7)
    return _save(figure, path)


def speed(record: OpsRecord, path: Path) -> Path:
    """Plot tokens per second against T, of ours and the peers, for the ops over whole sequences."""
    panels: dict[tuple[str, bool], list[Row]] = {}
    for row in _timed(record):
        if "T" in row["sizes"] and row["dtype"] == _main_dtype(record) and not row["sizes"].get("gated"):
            panels.setdefault((row["op"], row["backward"]), []).append(row)
    columns = max(1, (len(panels) + 1) // 2)
    figure, grid = plt.subplots(2, columns, figsize=(4 * columns, 7), squeeze=False)
    for axes, ((op, backward), rows) in zip(grid.T.flat, sorted(panels.items()), strict=False):
        lines = _lines(rows)
        for name, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        _log_axis(axes, "T", sorted({T for points in lines.values() for T, _ in points}))
        axes.set(ylim=(0, 1.1 * axes.dataLim.y1), ylabel="tokens/s")
        axes.set_title(f"{op}\n{'forward + backward' if backward else 'forward'}", fontsize=9)
        axes.legend(fontsize=7)
    figure.suptitle(_title(record), fontsize=8)
    return _save(figure, path)


def _lines(rows: list[Row]) -> dict[str, list[tuple[int, float]]]:
    """implementation -> (T, tokens per second), of the rows with the smallest batch and, of these, the most heads."""
    shape = lambda row: (-row["sizes"]["B"], row["sizes"]["H"])  # noqa: E731
    most = max(map(shape, rows))
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if shape(row) != most:
            continue
        medians = {"ours": _median(row)} | {n: p["median"] for n, p in row["peers"].items() if "median" in p}
        for name, median in medians.items():
            tokens = row["sizes"]["B"] * row["sizes"]["T"]
            lines.setdefault(name, []).append((row["sizes"]["T"], 1e3 * tokens / median))
    return lines


def _main_dtype(record: OpsRecord) -> str:
    return "bfloat16" if "float32" not in record["roofs"]["matmul"] else "float32"


def context(record: ModelRecord, path: Path) -> Path:
    """Plot decode time and cache size against context length, per model."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4))
    for name, rows in _by_model(record):
        spread = [[row["decode_ms"] - row["decode_low_ms"] for row in rows]]
        spread.append([row["decode_high_ms"] - row["decode_ms"] for row in rows])
        style = {"marker": "o", "color": COLORS[name], "label": name}
        left.errorbar(_lengths(rows), [row["decode_ms"] for row in rows], yerr=spread, **style)
        right.plot(_lengths(rows), [row["cache_bytes"] / 1e6 for row in rows], **style)
    for axes in (left, right):
        _log_axis(axes, "context, tokens", _all_lengths(record))
    left.set(ylim=(0, None), ylabel="decode, ms per token")
    right.set(yscale="log", ylabel="cache, MB")
    left.legend()
    figure.suptitle(f"{record['layers']} layers; {_title(record)}", fontsize=8)
    return _save(figure, path)


def _by_model(record: ModelRecord) -> Iterable[tuple[str, list[ModelRow]]]:
    """Return the rows of each model, at each length in the dtype in which it decodes faster."""
    for name in COLORS:
        rows = (tables.fastest(record, name, length, "decode_ms") for length in _all_lengths(record))
        yield name, [row for row in rows if row is not None]


def _lengths(rows: Iterable[ModelRow]) -> list[int]:
    return [row["length"] for row in rows]


def _all_lengths(record: ModelRecord) -> list[int]:
    return sorted({row["length"] for row in record["rows"]})


def _log_axis(axes: Axes, label: str, lengths: list[int]) -> None:
    """Make the x axis logarithmic, with a tick at each measured length and no others."""
    axes.set(xscale="log", xlabel=label)
    axes.set_xticks(lengths, [_short(length) for length in lengths])
    axes.set_xticks([], minor=True)


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def _save(figure: Figure, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path
