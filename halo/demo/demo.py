"""The demo: converts the small teacher that ships with the package three times, and compares the results.

The first conversion is calibrated and chooses its attention layers by measurement. The second spaces them evenly, on
the same aligned twins. The third has the layers of the first and no calibration. The teacher, all results, and the
first without its attention scale are measured at 1 to 16 times the training length, on the same samples. On a CPU,
what follows the first conversion runs in two processes. The output directory receives demo.md, demo.png, demo.json
and three complete conversions.
"""

import json
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from halo import files
from halo.config import Config
from halo.data.local import DEMO_MARK
from halo.demo.together import run_together
from halo.evaluation.paired import bits_ratio, recall_difference
from halo.journal import Journal
from halo.pipeline import Pipeline
from halo.progress import console, say
from halo.report import evaluation_table, every_digit, plot_evaluation, write_report
from halo.stages import STAGES
from halo.stages.evaluate import Labelled, evaluate

RESULTS = "demo.json"
SELECTED, SPACED, PLAIN = "selected", "even", "uncalibrated"
CONVERTING_STAGES = tuple(stage for stage in STAGES if stage != "eval")
TEACHER, CONVERTED, UNSCALED = "teacher", "converted", "converted, no scale"
EVEN, UNCALIBRATED = "evenly spaced", "not calibrated"
MODELS = (TEACHER, CONVERTED, UNSCALED, EVEN, UNCALIBRATED)
PROMPT = "def read(self, size=-1):"
WORSE, RECALL = 0.05, 0.97  # what is claimed of the converted model


def run_demo(config: Config) -> dict:
    """Run the conversions and the comparison in config.out, and return the content of demo.json."""
    began = time.monotonic()
    out = config.out
    files.write_text(out / DEMO_MARK, "Results of a demo. May be deleted.\n")
    selected = Pipeline(config.model_copy(update={"out": out / SELECTED}))
    even_selection = config.select.model_copy(update={"policy": "uniform", "layers": None, "exchange": None})
    even = Pipeline(
        config.model_copy(update={"out": out / SPACED, "aligned": out / SELECTED, "select": even_selection}),
        like=selected,
    )
    _convert(selected)
    plain = _uncalibrated(selected)
    conversions = {CONVERTED: selected, EVEN: even, UNCALIBRATED: plain}
    _finish({label: conversion.config for label, conversion in conversions.items()}, selected)
    say("== comparison")
    rows = _compare(conversions)
    record = {
        "training_length": config.eval.length,
        "layers": {label: conversion.job.softmax_layers() for label, conversion in conversions.items()},
        "scale": {label: _scale(conversion) for label, conversion in conversions.items()},
        "rows": rows,
        "claims": claims(rows),
        "seconds": {"total": round(time.monotonic() - began, 1)} | _stage_seconds(conversions.values()),
    }
    files.write_json(out / RESULTS, record)
    write_demo_report(out)
    _print(record, out)
    return record


def write_demo_report(out: Path) -> Path:
    """Write demo.md, demo.png and the reports of the conversions, and return the path of demo.md."""
    record = files.read_json(out / RESULTS, "run `halo demo` again")
    with files.reading(out / RESULTS, "run `halo demo` again"):
        plot_evaluation(record["rows"], record["training_length"], out / "demo.png")
        text = _markdown(record)
    files.write_text(out / "demo.md", text)
    for name in (SELECTED, SPACED, PLAIN):
        write_report(out / name)
    return out / "demo.md"


def claims(rows: list[dict]) -> list[dict]:
    """Return what a conversion should achieve, with the measured numbers and whether they show it."""
    at = {(row["model"], row["multiple"]): row for row in rows}
    found = []

    def claim(text: str, shown: bool, numbers: str) -> None:
        found.append({"claim": text, "shown": bool(shown), "numbers": numbers})

    teacher, student = at[TEACHER, 1], at[CONVERTED, 1]
    ratio, error = bits_ratio(student, teacher)
    claim(
        f"within {WORSE:.0%} of the teacher's bits per byte at the training length",
        ratio <= 1 + WORSE,
        f"{student['bits_per_byte']:.3f} against {teacher['bits_per_byte']:.3f}, {ratio - 1:+.1%} ± {error:.1%}",
    )
    for multiple in sorted({row["multiple"] for row in rows}):
        recall = at[CONVERTED, multiple]["recall"]
        claim(f"recall of {RECALL} at {multiple} x the training length", recall >= RECALL, f"{recall:.3f}")
    for other, text in (
        (TEACHER, "recall above the teacher's"),
        (UNSCALED, "recall with the scale at least that without"),
        (EVEN, "recall above that of evenly spaced layers"),
    ):
        for multiple in sorted({row["multiple"] for row in rows if row["multiple"] >= 4}):
            if (other, multiple) not in at:
                continue
            ours, theirs = at[CONVERTED, multiple], at[other, multiple]
            more, error = recall_difference(ours, theirs)
            claim(
                f"{text} at {multiple} x the training length",
                more >= (0.0 if other == UNSCALED else 2 * error),
                f"{ours['recall']:.2f} against {theirs['recall']:.2f}, {more:+.3f} ± {error:.3f}",
            )
    if (UNCALIBRATED, 1) in at:
        ratio, error = bits_ratio(at[UNCALIBRATED, 1], student)
        claim(
            "fewer bits per byte than without calibration, after equal training",
            ratio - 1 >= 2 * error,
            f"{student['bits_per_byte']:.3f} against {at[UNCALIBRATED, 1]['bits_per_byte']:.3f}, "
            f"{1 / ratio - 1:+.1%} ± {error:.1%}",
        )
    return found


def _convert(conversion: Pipeline) -> None:
    say(f"== {conversion.out}")
    for stage in CONVERTING_STAGES:
        conversion.run_stage(stage)


@dataclass(frozen=True)
class Share:
    """What one process does after the first conversion: a conversion, and the measurements of some models."""

    configs: dict[str, Config]  # of the conversions of these models, by their labels
    label: str  # of the conversion to run
    models: tuple[str, ...]  # labels of what to measure
    number: int  # of its journal


def _finish(configs: dict[str, Config], selected: Pipeline) -> None:
    """Run the second and the third conversion: on a CPU at the same time, and measurements after them.

    Two processes use two cores better than two threads do. The second conversion takes less time than the third, which
    aligns twins of its own, and leaves time for more measurements.
    """
    threads = torch.get_num_threads()
    if selected.compute.device.type != "cpu" or threads == 1:
        for label in (EVEN, UNCALIBRATED):
            _convert(Pipeline(configs[label], like=selected))
        return
    half = {label: config.model_copy(update={"threads": threads // 2}) for label, config in configs.items()}
    shares = (
        Share(half, EVEN, (EVEN, TEACHER, CONVERTED), 1),
        Share(half, UNCALIBRATED, (UNCALIBRATED, UNSCALED), 2),
    )
    run_together(_do_share, {half[share.label].out.name: share for share in shares})


def _do_share(share: Share) -> None:
    own = Pipeline(share.configs[share.label])
    _convert(own)
    selected = Pipeline(share.configs[CONVERTED], like=own)
    _compare({CONVERTED: selected, share.label: own}, share.models, share.number)


def _uncalibrated(selected: Pipeline) -> Pipeline:
    """Return a conversion without calibration that keeps the layers that another has chosen."""
    config = selected.config
    given = {"policy": "given", "layers": selected.job.softmax_layers(), "exchange": None}
    changes = {
        "out": config.out.with_name(PLAIN),
        "calibrate": config.calibrate.model_copy(update={"parts": "off"}),
        "select": config.select.model_copy(update=given),
    }
    return Pipeline(config.model_copy(update=changes), like=selected)


def _compare(
    conversions: dict[str, Pipeline], measured: Collection[str] = MODELS, number: int | None = None
) -> list[dict]:
    """Return the rows of the models whose labels are in `measured`, of which journals may hold some already."""
    job = conversions[CONVERTED].job
    models: list[Labelled] = [(TEACHER, job.teacher, None)]
    for label, conversion in conversions.items():
        student = conversion.job.measured_student("scale")
        chosen = student.config.attn_logits_scaling
        models.append((label, student, chosen))
        if label == CONVERTED and chosen is not None:
            models.append((UNSCALED, student, None))
    journal = Journal(job.out.parent, job.identity("eval"), job.compute, number)
    with job.compute.autocast():
        return evaluate([model for model in models if model[0] in measured], job.corpus, job.config.eval, journal)


def _scale(conversion: Pipeline) -> float | None:
    return json.loads((conversion.out / "scale" / files.SCALE).read_text())["a"]


def _stage_seconds(conversions: Iterable[Pipeline]) -> dict[str, float]:
    seconds = {}
    for conversion in conversions:
        for stage in CONVERTING_STAGES:
            path = conversion.out / stage / files.DONE
            if path.is_file():
                seconds[f"{conversion.out.name}/{stage}"] = json.loads(path.read_text())["seconds"]
    return seconds


def _markdown(record: dict) -> str:
    lines = ["# Conversion of the demo's teacher\n"]
    for label, layers in record["layers"].items():
        base = record["scale"][label]
        scale = "no scale" if base is None else f"scale base a = {every_digit(base)}"
        lines.append(f"- {label}: softmax attention in layers {layers}, {scale}")
    lines += ["", evaluation_table(record["rows"]), "![recall and bits per byte](demo.png)\n", "## Claims\n"]
    lines += ["| claim | measured | shown |", "|---|---|---|"]
    for claim in record["claims"]:
        lines.append(f"| {claim['claim']} | {claim['numbers']} | {'yes' if claim['shown'] else '**no**'} |")
    lines += ["", "## Time\n", "| stage | seconds |", "|---|---:|"]
    lines += [f"| {name} | {seconds:.0f} |" for name, seconds in record["seconds"].items()]
    lines += [
        "",
        "Details: " + ", ".join(f"[{name}]({name}/report.md)" for name in (SELECTED, SPACED, PLAIN)) + ".",
        "",
    ]
    return "\n".join(lines)


def _print(record: dict, out: Path) -> None:
    rows = record["rows"]
    for key, title in (("recall", "needle recall"), ("bits_per_byte", "bits per byte, held-out text")):
        table = Table(title=title, title_justify="left")
        table.add_column("model")
        lengths = sorted({row["length"] for row in rows})
        for length in lengths:
            table.add_column(f"{length}", justify="right")
        for label in dict.fromkeys(row["model"] for row in rows):
            values = {row["length"]: row[key] for row in rows if row["model"] == label}
            table.add_row(label, *(f"{values[n]:.3f}" if values[n] is not None else "-" for n in lengths))
        console.print(table)
    for claim in record["claims"]:
        say(f"{'shown    ' if claim['shown'] else 'NOT shown'}  {claim['claim']}: {claim['numbers']}")
    say(f"report: {out / 'demo.md'}, plot: {out / 'demo.png'}, numbers: {out / RESULTS}")
    say(f'try:    hypenet generate --model "{out / SELECTED / "model"}" --prompt "{PROMPT}"')
