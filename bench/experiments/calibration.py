"""Calibration: what each part gives before any training, and how many tokens of alignment and distillation it saves."""

import itertools
import json
from pathlib import Path

import numpy as np
import torch

from bench.experiments import tables
from bench.experiments.arms import SHORT, Arm, Experiment, Row
from halo import files
from halo.data import Batch
from halo.pipeline import Pipeline
from halo.stages.align import Align
from halo.trainer import held_out_record

PARTS = {
    "lightning": ("off", "decay", "rank", "gain", "rank+gain", "decay+gain", "ridge", "decay+ridge"),
    "gdn": ("off", "faithful", "decay+beta+gate", "decay+gain", "decay+beta+gate+gain", "decay+beta+gate+ridge"),
    "mamba2": ("off", "auto"),
}
DISTILLED = {"lightning": ("off", "rank+gain", "decay+gain"), "gdn": ("off", "faithful", "decay+beta+gate+gain")}
ALIGN_STEPS, DISTILL_STEPS, EVERY, SAMPLES = 100, 100, 10, 16
STEP_TOKENS = 16 * 256


def alignment(pipeline: Pipeline) -> Row:
    """Return each layer's relative error on held-out text before and during alignment."""
    job = pipeline.job
    settings = job.config.align
    training = Align(job.teacher, job.untrained_mixers(), settings)
    chunks = job.corpus.chunks("choose", settings.held_out_samples, settings.length)
    start = held_out_record(training, [Batch(chunks, torch.zeros_like(chunks, dtype=torch.int32))], job.compute)
    return {"relative_error": {"0": start["relative_loss"]} | curve(job.directory("align"), "held_out_relative_loss")}


def distillation(pipeline: Pipeline) -> Row:
    """Return the divergence on held-out text during distillation."""
    return {"divergence": curve(pipeline.job.directory("distill"), "held_out_loss")}


def curve(directory: Path, key: str) -> Row:
    """Return what a training stage logged under a key, by step."""
    lines = [json.loads(line) for line in (directory / files.METRICS).read_text().splitlines()]
    return {str(line["step"]): line[key] for line in lines if key in line}


def make_tables(rows: list[Row]) -> str:
    """Return a table of alignment, and one of distillation with the tokens to equal quality."""
    return f"{alignment_table(rows, ALIGN_STEPS)}\n\n{_distillation_table(rows)}"


def alignment_table(rows: list[Row], last: int) -> str:
    """Return the table of relative errors, means over layers, and of the steps to the uncalibrated error at the end.

    Args:
        rows: Of arms whose names are a mixer and its parts.
        last: The number of steps of alignment.
    """
    own = [row for row in rows if "relative_error" in row]
    errors = [{step: float(np.mean(layers)) for step, layers in row["relative_error"].items()} for row in own]
    targets = {_mixer(row): error[str(last)] for row, error in zip(own, errors, strict=True) if _parts(row) == "off"}
    lines = [
        {"arm": row["arm"], "error": error, "steps": steps_to(error, targets[_mixer(row)])}
        for row, error in zip(own, errors, strict=True)
    ]
    measured = sorted({int(step) for error in errors for step in error})
    shown = measured if len(measured) < 10 else [step for step in (0, 10, 30, 60, 100) if step in measured]
    columns: list[tables.Column] = [(f"step {step}", tables.at("error", str(step))) for step in shown]
    columns.append((f"steps to what `off` has after {last}", tables.at("steps")))
    return tables.by_arm(lines, columns, digits=3, first="relative error of alignment") if own else ""


def _distillation_table(rows: list[Row]) -> str:
    own = [row for row in rows if "divergence" in row]
    targets = {_mixer(row): row["divergence"][str(DISTILL_STEPS)] for row in own if _parts(row) == "off"}
    align_tokens, step_tokens = ALIGN_STEPS * STEP_TOKENS, STEP_TOKENS
    lines = []
    for row in own:
        steps = steps_to(row["divergence"], targets[_mixer(row)])
        line = {"arm": row["arm"], "divergence": row["divergence"], "fewer": None, "fewer_with_align": None}
        if steps:
            whole = align_tokens + DISTILL_STEPS * step_tokens
            line |= {"fewer": DISTILL_STEPS / steps, "fewer_with_align": whole / (align_tokens + steps * step_tokens)}
        lines.append(line)
    columns: list[tables.Column] = [
        (f"step {step}", tables.at("divergence", str(step))) for step in (10, 30, 60, DISTILL_STEPS)
    ]
    columns += [
        ("distillation tokens saved, x", tables.at("fewer")),
        ("x with alignment counted", tables.at("fewer_with_align")),
    ]
    return tables.by_arm(lines, columns, digits=3, first="KL on held-out text")


def _mixer(row: Row) -> tuple[int, str]:
    return row["seed"], row["arm"].split()[0]


def _parts(row: Row) -> str:
    return str(row["arm"].split()[1].strip(","))


def steps_to(curve: dict[str, float], target: float) -> float | None:
    """Return the steps after which a falling curve first reaches a target, interpolated between measurements."""
    points = sorted((int(step), value) for step, value in curve.items())
    for (s0, v0), (s1, v1) in itertools.pairwise(points):
        if v1 <= target:
            return float(s0 if v0 <= target else s0 + (s1 - s0) * (v0 - target) / (v0 - v1))
    return None


def _held_out(stage: str) -> dict[str, int]:
    return {f"{stage}.held_out_every": EVERY, f"{stage}.held_out_samples": SAMPLES}


EXPERIMENT = Experiment(
    name="calibration",
    question="What does each part of the calibration give, and how many tokens does it save?",
    settings=SHORT
    | {"align.steps": ALIGN_STEPS, "distill.steps": DISTILL_STEPS}
    | _held_out("align")
    | _held_out("distill"),
    tables=make_tables,
    arms=(
        *(
            Arm(f"{mixer} {parts}", alignment, {"mixer": mixer, "calibrate.parts": parts}, last="align")
            for mixer, all_parts in PARTS.items()
            for parts in all_parts
        ),
        *(
            Arm(f"{mixer} {parts}, distilled", distillation, {"mixer": mixer}, base=f"{mixer} {parts}", last="distill")
            for mixer, all_parts in DISTILLED.items()
            for parts in all_parts
        ),
    ),
)
