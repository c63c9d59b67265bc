"""The part of a conversion's report about its choice of layers: a table with a row for each layer, and a plot."""

from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from halo import files
from halo.selection.scores import equivalence_lines

# Title, column, and its format.
COLUMNS = (
    ("M, nats", "M", ".4f"),
    ("N, nats", "N", ".4f"),
    ("recall drop", "recall_drop", ".3f"),
    ("loss rise, nats", "loss_rise", ".4f"),
    ("score", "score", ".4g"),
    ("kept in resamples", "kept_share", ".0%"),
)
MEANINGS = {
    "M": "M: divergence from the teacher with this layer's twin in its place.",
    "N": "N: divergence with this layer's attention without positions, that is what positions are worth in this layer.",
    "recall_drop": "Recall drop and loss rise are those of the twin.",
}


def selection_section(record: dict[str, Any], path: Path) -> str:
    """Format selection.json as Markdown, and write the plot to `path` if layers were measured."""
    policy = record.get("policy", record.get("score"))
    lines = ["## Selection\n", f"Softmax attention stays in layers {record['layers']} (policy: {policy}).\n"]
    table = record.get("table", [])
    if not table:
        return "\n".join(lines)
    shown = [column for column in COLUMNS if column[1] in table[0]]
    if "cost" in record:
        cost = record["cost"]
        lines.append(
            f"Measured on {record['language_samples']} chunks of text and {record['recall_samples']} recall episodes; "
            f"{cost['tokens']:,} tokens in {cost['passes']} passes, {cost['flops']:.1e} FLOPs.\n"
        )
    lines += [" ".join(text for name, text in MEANINGS.items() if name in table[0]) + "\n"]
    lines += [f"| layer | {' | '.join(title for title, _, _ in shown)} |", "|---:|" + "---:|" * len(shown)]
    for row in table:
        name = f"**{row['layer']}**" if row["layer"] in record["layers"] else str(row["layer"])
        lines.append(f"| {name} | {' | '.join(_cell(row, column, form) for _, column, form in shown)} |")
    lines.append("")
    lines += [f"{line[0].upper()}{line[1:]}.\n" for line in equivalence_lines(record.get("equivalents", []))]
    lines += [*_exchange_lines(record.get("exchanges", [])), *_round_lines(record.get("rounds", []))]
    lines += [f"Warning: {warning}.\n" for warning in record.get("warnings", [])]
    panels = [(title, column) for title, column, _ in shown if column in ("M", "N", "recall_drop", "score")]
    if panels:
        _plot(record, panels, path)
        lines.append(f"![layers]({path.name})\n")
    return "\n".join(lines)


def _cell(row: dict[str, Any], column: str, form: str) -> str:
    error = row.get(f"{column}_error")
    return f"{row[column]:{form}}" + ("" if error is None else f" ± {error:{form}}")


def _exchange_lines(exchanges: list[dict[str, Any]]) -> list[str]:
    if not exchanges:
        return []
    accepted = [step for step in exchanges if step["accepted"]]
    done = [
        f"layer {step['added']} replaces {step['removed']} and lowers the divergence by {step['gain']:.4f} ± "
        f"{step['error']:.4f} nats"
        for step in accepted
    ]
    lines = [f"Exchanges in the student's form: {len(exchanges)} tried, {'; '.join(done) or 'none is better'}.\n"]
    if accepted:
        lines.append("Scores and shares of resamples are those before the exchanges.\n")
    return lines


def _round_lines(rounds: list[dict[str, Any]]) -> list[str]:
    if not rounds:
        return []
    lines = ["| round | added | lowers the divergence by, nats | divergence, nats |", "|---:|---:|---:|---:|"]
    for number, step in enumerate(rounds, 1):
        gain = f"{step['gain']:.4f} ± {step['error']:.4f}"
        lines.append(f"| {number} | {step['added']} | {gain} | {step['divergence']:.4f} |")
    return [*lines, ""]


def _plot(record: dict[str, Any], panels: list[tuple[str, str]], path: Path) -> None:
    table = record["table"]
    colors = ["tab:orange" if row["layer"] in record["layers"] else "tab:blue" for row in table]
    figure, all_axes = plt.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 3.4), constrained_layout=True, squeeze=False
    )
    for axes, (title, column) in zip(all_axes[0], panels, strict=True):
        errors = [row.get(f"{column}_error") or 0 for row in table]
        axes.bar([row["layer"] for row in table], [row[column] for row in table], yerr=errors, color=colors, capsize=2)
        axes.set_title(title)
        axes.set_xlabel("layer (orange: stays attention)")
        axes.grid(alpha=0.3, axis="y")
    files.write_file(path, lambda partial: figure.savefig(partial, dpi=130, format="png"))
    plt.close(figure)
