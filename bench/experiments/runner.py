"""Runs the arms of an experiment, several at a time, each in a process of its own; a stopped run continues."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import records
from bench.experiments.arms import Arm, Experiment, Row
from halo import files
from halo.config import Config, apply_override, make_config, read_tree
from halo.job import Job
from halo.pipeline import Pipeline
from halo.stages import STAGES

ROW = "row.json"
POLL_SECONDS = 0.5


def run(experiment: Experiment, seeds: Sequence[int], work: Path, jobs: int, ended: Callable[[str], None]) -> None:
    """Run all arms that have no row yet.

    Args:
        experiment: What to run.
        seeds: Seeds of data orders, episodes and initialisations; the teacher stays the same.
        work: Directory of the runs.
        jobs: Processes at a time; each arm has as many threads as the experiment's settings say.
        ended: Called with a line for each arm that ends.

    Raises:
        RuntimeError: If an arm fails; its log is named.
    """
    work.mkdir(parents=True, exist_ok=True)
    config = configuration(experiment, experiment.arms[0], seeds[0], work)
    Job(config.model_copy(update={"out": work})).corpus.fingerprint  # noqa: B018  tokenised once, for all arms
    waiting = [run for run in experiment.runs(seeds) if not row_path(experiment, run[1], run[0], work).is_file()]
    running: list[tuple[int, Arm, subprocess.Popen, float]] = []
    while waiting or running:
        ready = [
            (seed, arm)
            for seed, arm in waiting
            if arm.base is None or row_path(experiment, experiment.arm(arm.base), seed, work).is_file()
        ]
        while ready and len(running) < jobs:
            seed, arm = ready.pop(0)
            waiting.remove((seed, arm))
            running.append((seed, arm, _start(experiment, arm, seed, work), time.monotonic()))
        time.sleep(POLL_SECONDS)
        for entry in list(running):
            seed, arm, process, began = entry
            if process.poll() is None:
                continue
            running.remove(entry)
            if process.returncode:
                for _, _, other, _ in running:
                    other.terminate()
                log = _log(experiment, arm, seed, work)
                raise RuntimeError(f"{experiment.name}, {arm.name}, seed {seed}: failed, see {log}")
            ended(f"{experiment.name}, seed {seed}, {arm.name}: {time.monotonic() - began:.0f} s, {len(waiting)} left")


def collect(experiment: Experiment, seeds: Sequence[int], work: Path) -> dict[str, Any]:
    """Return the record of all rows that there are, of some seeds."""
    paths = [row_path(experiment, arm, seed, work) for seed, arm in experiment.runs(seeds)]
    return {
        "stamp": records.stamp("cpu"),
        "experiment": experiment.name,
        "settings": dict(experiment.settings),
        "rows": [json.loads(path.read_text()) for path in paths if path.is_file()],
    }


def run_arm(experiment: Experiment, arm: Arm, seed: int, work: Path) -> Row:
    """Run one arm in this process, and write and return its row."""
    config = configuration(experiment, arm, seed, work)
    config.out.mkdir(parents=True, exist_ok=True)
    (work / "data").mkdir(exist_ok=True)
    data = config.out / "data"
    if not data.exists():
        data.symlink_to((work / "data").resolve())
    pipeline = Pipeline(config)
    for stage in STAGES[: STAGES.index(arm.last) + 1]:
        pipeline.run_stage(stage)
        if stage == "transfer" and arm.alter is not None:
            arm.alter(pipeline)
    row = {"seed": seed, "arm": arm.name, "seconds": stage_seconds(config.out)} | arm.measure(pipeline)
    files.write_json(row_path(experiment, arm, seed, work), row)
    return row


def configuration(experiment: Experiment, arm: Arm, seed: int, work: Path) -> Config:
    """Return the configuration of an arm."""
    tree, _ = read_tree(experiment.config)
    place = work / experiment.name / f"seed-{seed}"
    changes = (
        dict(experiment.settings) | dict(arm.settings) | {"seed": seed, "out": str(place / directory_name(arm.name))}
    )
    if arm.base is not None:
        changes["aligned"] = str(place / directory_name(arm.base))
    for key, value in changes.items():
        apply_override(tree, f"{key}={json.dumps(value)}")
    return make_config(tree, experiment.name)


def row_path(experiment: Experiment, arm: Arm, seed: int, work: Path) -> Path:
    """Return where the row of an arm is."""
    return work / experiment.name / f"seed-{seed}" / directory_name(arm.name) / ROW


def directory_name(name: str) -> str:
    """Return a name for a directory, without what a shell would treat specially."""
    return "".join(character if character.isalnum() or character in "+-." else "_" for character in name)


def stage_seconds(out: Path) -> dict[str, float]:
    """Return the seconds that each finished stage of a run took."""
    done = {stage: out / stage / files.DONE for stage in STAGES}
    return {stage: json.loads(path.read_text())["seconds"] for stage, path in done.items() if path.is_file()}


def _start(experiment: Experiment, arm: Arm, seed: int, work: Path) -> subprocess.Popen:
    log = _log(experiment, arm, seed, work)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "bench.experiments", "arm", experiment.name, arm.name]
    with log.open("a") as file:
        return subprocess.Popen(
            [*command, "--seed", str(seed), "--work", str(work)], stdout=file, stderr=subprocess.STDOUT
        )


def _log(experiment: Experiment, arm: Arm, seed: int, work: Path) -> Path:
    return work / experiment.name / f"seed-{seed}" / f"{directory_name(arm.name)}.log"
