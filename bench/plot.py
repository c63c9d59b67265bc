"""roofline.png, speed.png and context.png of one device's records."""

from itertools import groupby

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench import records

DPI = 120


def draw(folder):
    """Draws what the records in `folder` (ops.json, model.json) allow; returns the paths."""
    drawn = []
    if (folder / "ops.json").is_file():
        record = records.load(folder / "ops.json")
        drawn += [roofline(record, folder / "roofline.png"), speed(record, folder / "speed.png")]
    if (folder / "model.json").is_file():
        drawn.append(context(records.load(folder / "model.json"), folder / "context.png"))
    if not drawn:
        raise SystemExit(f"bench: {folder} must hold ops.json or model.json, got neither")
    return drawn


def _timed(record):
    return [row for row in record["rows"] if row["ours"] is not None]


def _title(record):
    stamp = record["stamp"]
    return f"{stamp['device']}, {stamp['date'][:10]}, {stamp['commit'][:8]}"


def roofline(record, path):
    """Every case at its FLOPs per byte and its FLOP/s, under the roofs."""
    figure, axes = plt.subplots(figsize=(9, 6))
    rows, roofs = _timed(record), record["roofs"]
    bandwidth = max(roofs["copy"], roofs["read"])
    peak = max(roofs["matmul"].values())
    intensities = [row["flops"] / row["bytes"] for row in rows]
    reach = [min([*intensities, 0.1]), max([*intensities, 10 * peak / bandwidth])]
    ridge = peak / bandwidth
    corners = [reach[0], ridge, reach[1]], [bandwidth * reach[0], peak, peak]
    axes.plot(*corners, color="black", label="memory and matrix product")
    kind = lambda row: (row["op"], row["backward"])  # noqa: E731
    for (op, backward), group in groupby(sorted(rows, key=kind), key=kind):
        group = list(group)
        x = [row["flops"] / row["bytes"] for row in group]
        y = [row["flops"] / (1e-3 * row["ours"]["median"]) for row in group]
        axes.scatter(x, y, label=f"{op}{', fwd+bwd' if backward else ''}", marker="s" if backward else "o")
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="FLOP/s", title=_title(record))
    axes.legend(fontsize=7)
    return _save(figure, path)


def speed(record, path):
    """Tokens a second against T, ours and peers, for the ops over whole sequences."""
    panels = {}
    for row in _timed(record):
        if "T" in row["sizes"] and row["dtype"] == _main_dtype(record) and not row["sizes"].get("gated"):
            panels.setdefault((row["op"], row["backward"]), []).append(row)
    columns = max(1, (len(panels) + 1) // 2)
    figure, grid = plt.subplots(2, columns, figsize=(4 * columns, 7), squeeze=False)
    for axes, ((op, backward), rows) in zip(grid.T.flat, sorted(panels.items()), strict=False):
        for name, points in _lines(rows).items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axes.set(xscale="log", ylim=(0, None), xlabel="T", ylabel="tokens/s")
        axes.set_title(f"{op}\n{'forward + backward' if backward else 'forward'}", fontsize=9)
        axes.legend(fontsize=7)
    figure.suptitle(_title(record), fontsize=8)
    return _save(figure, path)


def _lines(rows):
    """implementation -> (T, tokens a second), of the rows with the smallest batch and, of these, the most heads."""
    shape = lambda row: (-row["sizes"]["B"], row["sizes"]["H"])  # noqa: E731
    most = max(map(shape, rows))
    lines = {}
    for row in rows:
        for name, timing in {"ours": row["ours"], **row["peers"]}.items():
            if shape(row) == most and "median" in timing:
                tokens = row["sizes"]["B"] * row["sizes"]["T"]
                lines.setdefault(name, []).append((row["sizes"]["T"], 1e3 * tokens / timing["median"]))
    return lines


def _main_dtype(record):
    return "bfloat16" if "float32" not in record["roofs"]["matmul"] else "float32"


def context(record, path):
    """Decode time and cache size against context length, per model."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4))
    for name in sorted({row["model"] for row in record["rows"]}):
        rows = [row for row in record["rows"] if row["model"] == name]
        lengths = [row["length"] for row in rows]
        spread = [[row["decode_ms"] - row["decode_low_ms"] for row in rows]]
        spread.append([row["decode_high_ms"] - row["decode_ms"] for row in rows])
        left.errorbar(lengths, [row["decode_ms"] for row in rows], yerr=spread, marker="o", label=name)
        right.plot(lengths, [row["cache_bytes"] / 1e6 for row in rows], marker="o", label=name)
    left.set(xscale="log", ylim=(0, None), xlabel="context", ylabel="decode, ms a token")
    right.set(xscale="log", yscale="log", xlabel="context", ylabel="cache, MB")
    left.legend()
    figure.suptitle(f"{record['layers']} layers; {_title(record)}", fontsize=8)
    return _save(figure, path)


def _save(figure, path):
    figure.tight_layout()
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path
