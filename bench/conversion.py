"""Run a whole conversion as a user does, killing it once in every stage, and record what came out.

The child process gets SIGKILL in each stage, in a training stage after its first checkpoint, and is started again with
the same command. The record has the time and the losses of every stage, where it was killed and where it continued, and
the final measurements.
"""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from bench import records
from halo.stages import STAGES, TRAINED_STAGES

POLL_SECONDS = 0.2
CHECKPOINT_MINUTES = 1.0  # so that there is one to continue from before the kill


def run(config: str, out: Path, kill: bool, log: Path) -> dict[str, Any]:
    """Convert, and return the record.

    Args:
        config: A YAML file, or the name of a shipped configuration.
        out: Output directory.
        kill: Whether to kill the process once in every stage.
        log: File that the output of all attempts is appended to.

    Raises:
        RuntimeError: If the conversion fails by itself.
    """
    command = [sys.executable, "-m", "halo", "convert", "--config", config, "--out", str(out)]
    command += [f"--set={stage}.checkpoint_minutes={CHECKPOINT_MINUTES}" for stage in TRAINED_STAGES] if kill else []
    waiting = list(STAGES) if kill else []
    kills: list[dict[str, Any]] = []
    began = time.monotonic()
    while True:
        start = log.stat().st_size if log.is_file() else 0
        with log.open("a") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                while waiting and (out / waiting[0] / "done.json").exists():
                    waiting.pop(0)
                if waiting and _is_amid(out / waiting[0], waiting[0]):
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    kills.append({"stage": waiting.pop(0), "seconds": round(time.monotonic() - began)})
        said = log.read_bytes()[start:].decode(errors="replace")
        for stage, step in re.findall(r"(\w+): continues after step (\d+)", said):
            for killed in kills:
                if killed["stage"] == stage:
                    killed["continued_after_step"] = int(step)
        if process.returncode == 0:
            break
        if process.returncode != -signal.SIGKILL:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}, see {log}")
    return _record(out, kills, round(time.monotonic() - began))


def _is_amid(directory: Path, stage: str) -> bool:
    """Return whether a stage has something to continue from."""
    if stage in TRAINED_STAGES:
        return any((directory / "checkpoints").glob("step-*[0-9]"))
    journal = directory / "metrics.jsonl"
    return journal.is_file() and journal.read_text().count("\n") > 2


def _record(out: Path, kills: list[dict[str, Any]], seconds: int) -> dict[str, Any]:
    config = yaml.safe_load((out / "config.yaml").read_text())
    config.pop("out")
    stages: dict[str, Any] = {}
    for stage in STAGES:
        done = json.loads((out / stage / "done.json").read_text())
        stages[stage] = {"seconds": done["seconds"]}
        if stage in TRAINED_STAGES:
            lines = [json.loads(line) for line in (out / stage / "metrics.jsonl").read_text().splitlines()]
            numbers = config[stage]
            stages[stage] |= {
                "tokens": numbers["steps"] * numbers["batch"] * numbers["length"],
                "training_seconds": lines[-1]["seconds"],
                "first_loss": lines[0]["loss"],
                "last_loss": lines[-1]["loss"],
                "held_out_losses": {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line},
            }
            if "relative_loss" in lines[0]:
                stages[stage]["relative_loss"] = [lines[0]["relative_loss"], lines[-1]["relative_loss"]]
    read = {name: json.loads((out / path).read_text()) for name, path in _RESULTS.items()}
    return {
        "stamp": records.stamp("cpu"),
        "config": config,
        "seconds": seconds,
        "kills": kills,
        "stages": stages,
        "layers": read["selection"]["layers"],
        "scale": read["scale"]["a"],
        "rows": read["results"]["rows"],
    }


_RESULTS = {
    "selection": "select/selection.json",
    "scale": "scale/scale.json",
    "results": "eval/results.json",
}
