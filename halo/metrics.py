"""What a training stage logs: lines of metrics.jsonl, and TensorBoard's event files where they are asked for."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from halo import files
from halo.compute import Compute
from halo.hardware import peak_flops


@dataclass(frozen=True)
class Work:
    """What a step does: tokens of all processes, and the model's floating-point operations for each, if known."""

    tokens: int
    flops_per_token: float | None = None


class Metrics:
    """A context manager around the log of one stage; only the main process writes.

    Args:
        directory: Of the stage; metrics.jsonl is in it.
        compute: Device and processes.
        step: Steps that are done already; later lines of an interrupted run are dropped, since they are repeated.
        seconds: What the steps before took.
        work: What a step does.
        tensorboard: Whether to write event files as well.
    """

    def __init__(
        self, directory: Path, compute: Compute, step: int, seconds: float, work: Work, tensorboard: bool
    ) -> None:
        self.path, self.compute = directory / files.METRICS, compute
        self.work, self.tensorboard = work, tensorboard
        cuda = compute.device.type == "cuda"
        self.peak = peak_flops(torch.cuda.get_device_name(compute.device)) if cuda else None
        self.last_step, self.last_time = step, time.monotonic()
        self.began = self.last_time - seconds

    def __enter__(self) -> Self:
        self.writer: Any = None
        if self.compute.main:
            kept = [line for line in files.read_lines(self.path) if line.get("step", 0) <= self.last_step]
            files.write_file(self.path, lambda path: path.write_text("".join(json.dumps(line) + "\n" for line in kept)))
            if self.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(self.path.parent), purge_step=self.last_step + 1)
        if self.compute.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.compute.device)
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.writer:
            self.writer.close()

    @property
    def seconds(self) -> float:
        """Seconds that all steps so far took, those of interrupted runs included."""
        return time.monotonic() - self.began

    def log(self, step: int, record: dict[str, Any]) -> dict[str, Any]:
        """Write a line about a step, with time, speed, memory and utilisation added, and return it."""
        now = time.monotonic()
        speed = self.work.tokens * (step - self.last_step) / max(now - self.last_time, 1e-9)
        self.last_step, self.last_time = step, now
        record = {"step": step} | record | {"seconds": round(self.seconds, 3), "tokens_per_second": round(speed)}
        if self.compute.device.type == "cuda":
            record["memory_gib"] = round(torch.cuda.max_memory_allocated(self.compute.device) / 2**30, 3)
        if self.peak is not None and self.work.flops_per_token is not None:
            record["mfu"] = round(speed * self.work.flops_per_token / (self.peak * self.compute.world), 4)
        if self.compute.main:
            with files.writing(self.path), self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        if self.writer:
            for key, value in record.items():
                if isinstance(value, int | float):
                    self.writer.add_scalar(key, value, step)
        return record
