"""Writes report.md and its plots from the JSON and JSONL files of a conversion."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import yaml
from matplotlib import pyplot as plt

from halo import files
from halo.evaluation.paired import bits_ratio
from halo.selection.report import selection_section
from halo.settings import HaloError
from halo.stages import TRAINED_STAGES

LOSS_NAMES = {
    "align": "mean squared error",
    "distill": "KL from the teacher, nats",
    "finetune": "next-token loss, nats",
}
MARKERS = "osD^v*"
SPANS = {"look_back": 1, "entropy": 2}  # of a layer's heads, with digits after the point


def write_report(out: Path) -> Path:
    """Write <out>/report.md and its plots about the stages that are finished.

    Returns:
        The path of report.md.

    Raises:
        HaloError: If `out` is not the output directory of a conversion.
    """
    if not (out / "config.yaml").is_file():
        raise HaloError(f"{out}: must be the directory of a conversion (it has no config.yaml)")
    path = out / files.CONFIG
    with files.reading(path, "run a stage of the conversion again"):
        config = yaml.safe_load(path.read_text("utf-8"))
        assert isinstance(config, dict)
    directories = {stage: out / stage for stage in ("calibrate", *TRAINED_STAGES)}
    if config["aligned"]:
        aligned = Path(config["aligned"])
        directories["calibrate"] = aligned / "calibrate"
        directories["align"] = aligned / "align" if (aligned / "align").is_dir() else aligned
    sections = [
        f"# Conversion of {config['teacher']} ({config['mixer']} layers)\n",
        _section(directories.pop("calibrate") / files.CALIBRATION, _calibration_section, out),
        _training_section(out, config, directories),
        _section(out / "select" / files.SELECTION, _selection_section, out),
        _section(out / "scale" / files.SCALE, _scale_section, out),
        _section(out / "eval" / files.RESULTS, _evaluation_section, out),
    ]
    path = out / "report.md"
    files.write_text(path, "\n".join(section for section in sections if section))
    return path


def evaluation_table(rows: list[dict]) -> str:
    """Format recall, RULER's tasks and bits per byte as Markdown tables: a row per model, a column per length."""
    lengths = sorted({row["length"] for row in rows})
    multiples = {row["length"]: row["multiple"] for row in rows}
    head = " | ".join(f"{length} ({multiples[length]}x)" for length in lengths)
    tasks = dict.fromkeys(name for row in rows for name in row.get("tasks", {}))
    cells_of: dict[str, Callable[[dict], str]] = {"needle recall": _recall_cell}
    cells_of |= {f"{name}, generated": partial(_task_cell, name) for name in tasks}
    lines = []
    for title, cell in (cells_of | {"bits per byte": _bits_cell}).items():
        lines += [f"| {title} | {head} |", "|---|" + "---:|" * len(lengths)]
        for label in dict.fromkeys(row["model"] for row in rows):
            by_length = {row["length"]: row for row in rows if row["model"] == label}
            cells = [cell(by_length[length]) if length in by_length else "" for length in lengths]
            lines.append(f"| {label} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def position_table(rows: list[dict]) -> str:
    """Format bits per byte by position, at the greatest length that was measured, as a Markdown table."""
    longest = max((row["length"] for row in rows if row.get("by_position")), default=None)
    chosen = [row for row in rows if row["length"] == longest and row["by_position"]]
    if not chosen:
        return ""
    head = [f"{part['start']} to {part['stop'] - 1}" for part in chosen[0]["by_position"]]
    lines = [f"| bits per byte by position, at {longest} tokens | {' | '.join(head)} |", "|---|" + "---:|" * len(head)]
    for row in chosen:
        cells = [_with_error(part["bits_per_byte"], part["stderr"], 3) for part in row["by_position"]]
        lines.append(f"| {row['model']} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def plot_evaluation(rows: list[dict], training_length: int, path: Path) -> None:
    """Plot recall and bits per byte against length, with standard errors, a line per model.

    Bits per byte are compared with those of the first model over the same text, so that their errors are those of the
    difference: how much harder one text is than another does not count.
    """
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    labels = list(dict.fromkeys(row["model"] for row in rows))
    first = {row["length"]: row for row in rows if row["model"] == labels[0]}
    for marker, label in zip(MARKERS, labels, strict=False):
        own = [row for row in rows if row["model"] == label]
        recall = [(row["length"], row["recall"], row["recall_error"] or 0) for row in own if row["recall"] is not None]
        bits = [
            (row["length"], 100 * (ratio - 1), 100 * error)
            for row in own
            if row["bits_per_byte"] is not None
            for ratio, error in [bits_ratio(row, first[row["length"]])]
        ]
        for axes, points in zip(panels, (recall, bits), strict=True):
            if points:
                places, values, errors = zip(*points, strict=True)
                axes.errorbar(places, values, yerr=errors, marker=marker, capsize=2, label=label)
    lengths = sorted({row["length"] for row in rows})
    titles = ("needle recall", f"bits per byte on held-out text, % above the {labels[0]}'s")
    for axes, title in zip(panels, titles, strict=True):
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.axvline(training_length, color="grey", linestyle=":", linewidth=1)
        axes.set_xlabel("context, tokens (dotted: the teacher's training length)")
        axes.set_title(title)
        axes.grid(alpha=0.3)
    panels[0].set_ylim(-0.03, 1.03)
    panels[0].legend()
    files.write_file(path, lambda partial: figure.savefig(partial, dpi=130, format="png"))
    plt.close(figure)


def read_record(path: Path) -> dict | None:
    """Read a result of a stage, or return None if the stage has none yet.

    Raises:
        HaloError: If it is damaged.
    """
    return files.read_json(path, _again(path)) if path.is_file() else None


def every_digit(value: float) -> str:
    """Return the shortest text that reads back as the same number."""
    return repr(value).removesuffix(".0")


def _section(path: Path, write: Callable[[dict, Path], str], out: Path) -> str:
    """Return the section about a stage's result; empty if there is none yet."""
    record = read_record(path)
    if record is None:
        return ""
    with files.reading(path, _again(path)):
        return write(record, out)


def _again(path: Path) -> str:
    return f"delete {path.parent} to run its stage again"


def _calibration_section(record: dict, out: Path) -> str:
    rows = record["layers"]
    means = [sum(values) / len(rows) for values in zip(*(row["errors"] for row in rows), strict=True)]
    lines = [
        "## Calibration\n",
        "Squared error of each recurrent twin, relative to the power of its attention layer's output, before and after "
        f"each part; fitted on {record['samples']} sequences of {record['length']} tokens, measured on "
        f"{record['held_samples']} others. Look-back: how far the layer's heads attend, in tokens, the nearest and the "
        "farthest; entropy of their attention in nats.\n",
        "| layer | look-back | entropy | before | " + " | ".join(f"+ {part}" for part in record["parts"]) + " |",
        "|---:|" + "---:|" * (3 + len(record["parts"])),
    ]
    for row in rows:
        spans = (f"{min(row[key]):.{digits}f} to {max(row[key]):.{digits}f}" for key, digits in SPANS.items())
        errors = " | ".join(f"{error:.3f}" for error in row["errors"])
        lines.append(f"| {row['layer']} | {' | '.join(spans)} | {errors} |")
    lines.append("| mean | | | " + " | ".join(f"{error:.3f}" for error in means) + " |")
    return "\n".join([*lines, ""])


def _training_section(out: Path, config: dict, directories: dict[str, Path]) -> str:
    metrics = {
        stage: lines
        for stage, directory in directories.items()
        if (lines := files.read_lines(directory / files.METRICS))
    }
    if not metrics:
        return ""
    figure, panels = plt.subplots(
        1, len(metrics), figsize=(4.6 * len(metrics), 3.6), constrained_layout=True, squeeze=False
    )
    table = ["| stage | steps | tokens | length | first loss | last loss | seconds | tokens/s |", "|---|" + "---:|" * 7]
    for axes, (stage, lines) in zip(panels[0], metrics.items(), strict=True):
        numbers = config[stage]
        axes.plot([line["step"] for line in lines], [line["loss"] for line in lines])
        axes.set_title(stage)
        axes.set_xlabel("step")
        axes.set_ylabel(LOSS_NAMES[stage])
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        tokens = lines[-1]["step"] * numbers["batch"] * numbers["length"]
        seconds = lines[-1]["seconds"]
        table.append(
            f"| {stage} | {lines[-1]['step']} | {tokens:,} | {numbers['length']} | {lines[0]['loss']:.4g} | "
            f"{lines[-1]['loss']:.4g} | {seconds:.0f} | {tokens / max(seconds, 1e-9):,.0f} |"
        )
    files.write_file(out / "training.png", lambda partial: figure.savefig(partial, dpi=130, format="png"))
    plt.close(figure)
    return "\n".join(["## Training\n", *table, "", "![losses](training.png)", "", _alignment_table(metrics)])


def _alignment_table(metrics: dict[str, list[dict]]) -> str:
    if "align" not in metrics:
        return ""
    first, last = metrics["align"][0]["relative_loss"], metrics["align"][-1]["relative_loss"]
    lines = [
        "Mean squared error of each recurrent twin, relative to the mean square of its attention layer's output:\n"
    ]
    lines += ["| layer | " + " | ".join(str(layer) for layer in range(len(last))) + " |", "|---|" + "---:|" * len(last)]
    for title, values in (("before", first), ("after", last)):
        lines.append(f"| {title} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    return "\n".join(lines) + "\n"


def _selection_section(record: dict, out: Path) -> str:
    return selection_section(record, out / "selection.png")


def _scale_section(record: dict, out: Path) -> str:
    chosen = "no scale" if record["a"] is None else f"a = {every_digit(record['a'])}"
    lines = [
        "## Scale\n",
        f"Chosen: {chosen}, by the loss on {record['grid'][0]['documents']} held-out documents of {record['length']} "
        "tokens.\n",
        "| a | loss, nats | above the best |",
        "|---:|---:|---:|",
    ]
    for row in sorted(record["grid"], key=lambda row: row["a"] or 0):
        name = "none" if row["a"] is None else every_digit(row["a"])
        error = "" if row["advantage_error"] is None else f" ± {row['advantage_error']:.4f}"
        lines.append(f"| {name} | {row['loss']:.4f} | {row['advantage']:.4f}{error} |")
    return "\n".join([*lines, ""])


def _evaluation_section(record: dict, out: Path) -> str:
    plot_evaluation(record["rows"], record["training_length"], out / "evaluation.png")
    tables = [evaluation_table(record["rows"]), position_table(record["rows"])]
    return "\n".join(["## Evaluation\n", *tables, "![evaluation](evaluation.png)\n"])


def _recall_cell(row: dict) -> str:
    if row["recall"] is None:
        return "not measured"
    return _with_error(row["recall"], row["recall_error"], 2)


def _task_cell(name: str, row: dict) -> str:
    task = row["tasks"].get(name)
    return "" if task is None else _recall_cell(task)


def _bits_cell(row: dict) -> str:
    if row["bits_per_byte"] is None:
        return "not enough text"
    return _with_error(row["bits_per_byte"], row["bits_per_byte_error"], 3)


def _with_error(value: float, error: float | None, digits: int) -> str:
    """Format a value and its standard error, which a single sample does not have."""
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
