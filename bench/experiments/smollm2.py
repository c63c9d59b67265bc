"""SmolLM2-135M-Instruct, a real pretrained model: calibration before training, alignment, selection, distillation."""

import json
from typing import Any

import numpy as np

from bench.experiments import calibration, measure, tables
from bench.experiments.arms import Arm, Experiment, Row
from bench.experiments.runner import directory_name
from halo import files
from halo.job import Job
from halo.pipeline import Pipeline
from halo.selection.measurer import ModelMeasurer, Samples
from halo.selection.policies import spaced_layers
from halo.selection.scores import top_layers
from halo.selection.variants import student, unchanged

SHARES = (0.75, 0.5, 0.25)  # of the layers that stay attention
ORDER = "order of layers"
CALIBRATED = {"lightning": ("off", "rank+gain", "decay+ridge"), "gdn": ("off", "faithful", "auto")}
JUDGED = {"language_samples": 16, "language_length": 512, "recall_samples": 16, "recall_length": 256}
ALIGN_STEPS, ALIGN_BATCH, LENGTH = 490, 4, 256  # 0.5M tokens
MULTIPLES = (1, 2, 4)


def before_training(pipeline: Pipeline) -> Row:
    """Measure students that were only transferred and calibrated, with more and less attention kept."""
    job = pipeline.job
    twins = job.untrained_mixers()
    settings = job.config.select.model_copy(update=JUDGED)
    samples = Samples.draw(job.corpus, settings, measure.SPLIT)
    measurer = ModelMeasurer(job.teacher, twins, samples, settings, job.journal("select"), job.config.seed)
    count = len(twins)
    sets = {"all": ((), unchanged(count))} | {
        f"{name} {share:.0%}": (layers, student(layers, count))
        for share in SHARES
        for name, layers in (
            ("uniform", spaced_layers(count, round(share * count))),
            ("position", _position(job, share)),
        )
    }
    with job.compute.autocast():
        results = measurer.measure([variant for _, variant in sets.values()])
    found = {
        name: {"layers": list(layers), "loss": float(result.text_loss.mean()), "recall": float(result.recall.mean())}
        for (name, (layers, _)), result in zip(sets.items(), results, strict=True)
    }
    return {"before_training": found, "errors": _calibration_errors(job)}


def teacher(pipeline: Pipeline) -> Row:
    """Measure the teacher."""
    return {"quality": measure.teacher(pipeline)}


def converted(pipeline: Pipeline) -> Row:
    """Measure the converted model, and return its losses in training."""
    distill = pipeline.job.directory("distill")
    return {"quality": measure.student(pipeline), "distill": calibration.curve(distill, "held_out_loss")}


def _position(job: Job, share: float) -> list[int]:
    """Return the layers with the largest scores of policy position, as measured once on calibrated Lightning twins."""
    record = json.loads(
        (job.out.parent.parent / "seed-0" / directory_name(ORDER) / "select" / files.SELECTION).read_text()
    )
    scores = np.array([row["score"] for row in record["table"]])
    return top_layers(scores, round(share * len(scores)))


def _calibration_errors(job: Job) -> list[list[float]] | None:
    path = job.directory("calibrate") / files.CALIBRATION
    return [row["errors"] for row in json.loads(path.read_text())["layers"]] if path.is_file() else None


def make_tables(rows: list[Row]) -> str:
    """Return tables: before training, alignment, the worth of each layer, the converted model."""
    parts = [_before(rows), calibration.alignment_table(rows, ALIGN_STEPS), _layers(rows), _quality(rows)]
    return "\n\n".join(part for part in parts if part)


def _before(rows: list[Row]) -> str:
    own = [row for row in rows if "before_training" in row]
    names = ["all", *(f"{name} {share:.0%}" for share in SHARES for name in ("uniform", "position"))]

    def perplexity(name: str) -> Any:
        return lambda row: float(np.exp(row["before_training"][name]["loss"]))

    columns: list[tables.Column] = [(name, perplexity(name)) for name in names]
    recalls: list[tables.Column] = [(name, tables.at("before_training", name, "recall")) for name in names]
    first = tables.by_arm(own, columns, digits=0, first="perplexity, no training")
    return f"{first}\n\n{tables.by_arm(own, recalls, first='recall at 256, no training')}"


def _layers(rows: list[Row]) -> str:
    lines = ["| layer | M: cost of the twin | N: cost of no positions | M - N | kept |", "|---:|---:|---:|---:|---|"]
    for row in rows:
        if "selection" not in row or row["seed"]:
            continue
        kept = row["selection"]["layers"]
        for line in row["selection"]["table"]:
            m, n = line["M"], line["N"]
            lines.append(
                f"| {line['layer']} | {m:.3f} | {n:.3f} | {m - n:+.3f} | {'yes' if line['layer'] in kept else ''} |"
            )
    return "\n".join(lines) if len(lines) > 2 else ""


def _quality(rows: list[Row]) -> str:
    own = [row for row in rows if "quality" in row]
    columns: list[tables.Column] = [
        (f"{title} {multiple} x", tables.at("quality", key, str(multiple)))
        for key, title in (("bits_per_byte", "bits per byte"), ("recall", "recall"))
        for multiple in MULTIPLES
    ]
    return tables.by_arm(own, columns, first="after training") if own else ""


def _aligned(parts: str) -> dict[str, Any]:
    return {"calibrate.parts": parts, "align.steps": ALIGN_STEPS}


EXPERIMENT = Experiment(
    name="smollm2",
    question="What do calibration, selection and a short training make of a real pretrained model?",
    config="smollm2-135m",
    settings={
        "threads": 1,
        "align.batch": ALIGN_BATCH,
        "align.length": LENGTH,
        "align.held_out_every": 70,
        "align.held_out_samples": 8,
        "select.keep": 8,
        "scale.length": 2048,
        "eval.length": 2048,
        "eval.multiples": list(MULTIPLES),
    },
    seeds=3,
    tables=make_tables,
    arms=(
        Arm(
            ORDER,
            measure.selection,
            {
                "calibrate.parts": "rank+gain",
                "align.steps": 0,
                "select.policy": "position",
                "select.exchange": 0,  # which would measure 74 students
            },
            last="select",
            only_seed=0,
        ),
        *(
            Arm(f"{mixer} {parts}", before_training, {"mixer": mixer, "calibrate.parts": parts}, last="calibrate")
            for mixer, all_parts in CALIBRATED.items()
            for parts in all_parts
        ),
        Arm("teacher", teacher, last="transfer"),
        Arm("lightning off, aligned", calibration.alignment, _aligned("off"), last="align", only_seed=0),
        Arm("lightning rank+gain, aligned", calibration.alignment, _aligned("rank+gain"), last="align", only_seed=0),
        Arm("converted", converted, {"distill.steps": 200}, base="lightning rank+gain, aligned", only_seed=0),
    ),
)
