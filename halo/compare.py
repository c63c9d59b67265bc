"""The command `halo compare`: what differs between conversions in settings, choices, losses, measurements and time.

Runs may be unfinished, or stopped in the middle of a stage; what they do not have yet is shown as "-".
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from halo import files
from halo.columns import columns
from halo.settings import HaloError
from halo.stages import STAGES, TRAINED_STAGES

MISSING = "-"
LONGEST = 60  # characters of a value


@dataclass(frozen=True)
class Row:
    """One line: a title and a value for each run, None where the run has none."""

    title: str
    values: list[str | None]


@dataclass(frozen=True)
class Conversion:
    """What the files of one run say.

    Attributes:
        directory: Of the run.
        settings: All of them, by dotted key.
        metrics: The lines of metrics.jsonl of each training stage.
        records: done.json of each stage that is finished, and the result of calibrate, select, scale and eval.
    """

    directory: Path
    settings: dict[str, Any]
    metrics: dict[str, list[dict[str, Any]]]
    records: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, directory: Path) -> "Conversion":
        """Read the files of a run.

        Raises:
            HaloError: If it is not the directory of a conversion, or one of its files is damaged.
        """
        path = directory / files.CONFIG
        if not path.is_file():
            raise HaloError(f"{directory}: must be the directory of a conversion (it has no {files.CONFIG})")
        with files.reading(path, "run a stage of the conversion again"):
            tree = yaml.safe_load(path.read_text("utf-8"))
            assert isinstance(tree, dict), "not a mapping of keys"
        places = {stage: directory / stage for stage in STAGES}
        if tree.get("aligned"):
            other = Path(tree["aligned"])
            places["calibrate"] = other / "calibrate"
            places["align"] = other / "align" if (other / "align").is_dir() else other
        records = {}
        for stage, place in places.items():
            for name in (files.DONE, files.CALIBRATION, files.SELECTION, files.SCALE, files.RESULTS):
                if (place / name).is_file():
                    remedy = f"delete {place} to run its stage again"
                    records[f"{stage}/{name}"] = files.read_json(place / name, remedy)
        metrics = {stage: files.read_lines(places[stage] / files.METRICS) for stage in TRAINED_STAGES}
        return cls(directory, dict(_flat(tree)), metrics, records)

    def record(self, stage: str, name: str) -> dict[str, Any]:
        """Return a result, or an empty one."""
        return self.records.get(f"{stage}/{name}", {})

    def last(self, stage: str, key: str) -> Any:
        """Return the last value of a key in a stage's metrics, or None."""
        return next((line[key] for line in reversed(self.metrics[stage]) if line.get(key) is not None), None)

    def setting(self, key: str) -> Any:
        """Return a setting, or None."""
        return self.settings.get(key)


def compare(directories: Sequence[Path]) -> dict[str, list[Row]]:
    """Compare conversions.

    Args:
        directories: Their output directories, at least two.

    Returns:
        Rows under the headings settings, calibration, layers, training, scale, evaluation and seconds; of the settings
        only those that differ, of the rest those that any run has.

    Raises:
        HaloError: If there are fewer than two, or one cannot be read.
    """
    if len(directories) < 2:
        raise HaloError(f"compare: must be given at least two directories, got {len(directories)}")
    runs = [Conversion.read(directory) for directory in directories]
    parts = {
        "settings": _settings,
        "calibration": _calibration,
        "layers": _layers,
        "training": _training,
        "scale": _scale,
        "evaluation": _evaluation,
        "seconds": _seconds,
    }
    found = {}
    for heading, rows_of in parts.items():
        for run in runs:
            with files.reading(run.directory, f"its record of {heading} is damaged; run the stage again"):
                list(rows_of([run]))
        found[heading] = list(rows_of(runs))
    return {heading: rows for heading, rows in found.items() if rows}


def lines(directories: Sequence[Path]) -> list[str]:
    """Format a comparison as text, a column for each run."""
    found = compare(directories)
    names = [directory.resolve().name for directory in directories]
    if len(set(names)) < len(names):
        names = [str(directory) for directory in directories]
    table = [["", *names]]
    for heading, rows in found.items():
        table += [[heading.upper()] + [""] * len(names)]
        table += [[f"  {row.title}", *(MISSING if value is None else value for value in row.values)] for row in rows]
    return columns(table, left=len(names) + 1)


def _settings(runs: list[Conversion]) -> Iterator[Row]:
    for key in dict.fromkeys(key for run in runs for key in run.settings):
        values = [_written(run.settings[key]) if key in run.settings else None for run in runs]
        if len(set(values)) > 1 and key != "out":
            yield Row(key, values)


def _calibration(runs: list[Conversion]) -> Iterator[Row]:
    records = [run.record("calibrate", files.CALIBRATION) for run in runs]
    yield from _row("parts", ["+".join(record["parts"]) if record else None for record in records], str)
    for title, place in (("before", 0), ("after", -1)):
        errors = [[row["errors"][place] for row in record.get("layers", [])] for record in records]
        means = [sum(values) / len(values) if values else None for values in errors]
        yield from _row(f"relative error {title}, mean of layers", means, _number)


def _layers(runs: list[Conversion]) -> Iterator[Row]:
    chosen = [run.record("select", files.SELECTION) for run in runs]
    yield from _row("softmax layers", [record.get("layers") for record in chosen], _written)
    # Older records have the policy under the name `score`.
    yield from _row("policy", [record.get("policy", record.get("score")) for record in chosen], str)
    equivalent = [sorted({kept for kept, _ in record.get("equivalents", [])}) or None for record in chosen]
    yield from _row("kept, equivalent to dropped ones", equivalent, _written)
    warnings = [len(record["warnings"]) if "warnings" in record else None for record in chosen]
    yield from _row("warnings", warnings, str)


def _training(runs: list[Conversion]) -> Iterator[Row]:
    for stage in TRAINED_STAGES:
        steps = [run.last(stage, "step") for run in runs]
        sizes = [(run.setting(f"{stage}.batch"), run.setting(f"{stage}.length")) for run in runs]
        tokens = [
            step * batch * length if step and batch and length else None
            for step, (batch, length) in zip(steps, sizes, strict=True)
        ]
        yield from _row(f"{stage} steps", steps, lambda step: f"{step:,}")
        yield from _row(f"{stage} tokens", tokens, lambda count: f"{count:,}")
        yield from _row(f"{stage} loss", [run.last(stage, "loss") for run in runs], _number)
        yield from _row(f"{stage} held-out loss", [run.last(stage, "held_out_loss") for run in runs], _number)
        relative = [run.last(stage, "relative_loss") for run in runs]
        means = [sum(values) / len(values) if values else None for values in relative]
        yield from _row(f"{stage} relative loss, mean of layers", means, _number)
        yield from _row(f"{stage} seconds", [run.last(stage, "seconds") for run in runs], _number)


def _scale(runs: list[Conversion]) -> Iterator[Row]:
    records = [run.record("scale", files.SCALE) for run in runs]
    bases = [("none" if record["a"] is None else _number(record["a"])) if "a" in record else None for record in records]
    yield from _row("a", bases, str)
    best = [min((row["loss"] for row in record.get("grid", [])), default=None) for record in records]
    yield from _row("loss", best, _number)


def _evaluation(runs: list[Conversion]) -> Iterator[Row]:
    tables: list[dict[tuple[str, int, str], str]] = [
        dict(_cells(run.record("eval", files.RESULTS).get("rows", []))) for run in runs
    ]
    keys = dict.fromkeys(key for table in tables for key in table)
    for model, length, measure in sorted(keys, key=lambda key: (key[0] != "converted", key[0], key[2], key[1])):
        values = [table.get((model, length, measure)) for table in tables]
        yield Row(f"{model}, {measure}, {length} tokens", values)


def _cells(rows: list[dict[str, Any]]) -> Iterator[tuple[tuple[str, int, str], str]]:
    for row in rows:
        measures = {"recall": (row.get("recall"), row.get("recall_error"))}
        measures["bits per byte"] = (row.get("bits_per_byte"), row.get("bits_per_byte_error"))
        measures |= {name: (task["recall"], task["recall_error"]) for name, task in row.get("tasks", {}).items()}
        for name, (value, error) in measures.items():
            if value is not None:
                yield (row["model"], row["length"], name), f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _seconds(runs: list[Conversion]) -> Iterator[Row]:
    for stage in STAGES:
        yield from _row(stage, [run.record(stage, files.DONE).get("seconds") for run in runs], _number)
    totals = [
        sum(record.get("seconds", 0.0) for key, record in run.records.items() if key.endswith(files.DONE))
        for run in runs
    ]
    yield from _row("all finished stages", [total or None for total in totals], _number)


def _row(title: str, values: list[Any], write: Callable[[Any], str]) -> Iterator[Row]:
    """Yield a row, unless no run has a value."""
    if any(value is not None for value in values):
        yield Row(title, [None if value is None else write(value) for value in values])


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _written(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"
