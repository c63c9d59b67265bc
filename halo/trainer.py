"""The training loop of all stages. A stage defines the trained weights, the loss and what the loss is a mean over.

The gradient of a step is the gradient of the whole batch, whatever the micro-batches and the number of processes: each
adds its sum, divided by the count of the whole batch. A run that is interrupted and started again continues from its
last checkpoint with the same batches, so its losses are bit for bit those of an uninterrupted run.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from halo import files
from halo.checkpoint import Checkpoints
from halo.compute import Compute
from halo.data import Batch
from halo.metrics import Metrics, Work
from halo.progress import StageProgress, say
from halo.settings import HaloError, TrainingSettings
from halo.sharding import reshard, synchronise, whole_tensor
from halo.signals import Stopped, StopRequest

# (first step) -> this process's share of the batch of every step from there on
BatchSource = Callable[[int], Iterator[Batch]]


class Training(nn.Module, ABC):
    """What one stage trains: the module's trainable parameters, by the loss that its forward pass computes."""

    name: ClassVar[str]
    adam_eps: ClassVar[float] = 1e-8
    settings: TrainingSettings

    @abstractmethod
    def shard(self, compute: Compute) -> None:
        """Divide the weights over the processes, if there are several."""

    @abstractmethod
    def units(self, batch: Batch) -> Tensor:
        """Return how many units the loss of a batch is a mean over, such as tokens or labels, as a scalar tensor."""

    @abstractmethod
    def accumulate(self, batch: Batch, count: Tensor, scale: float) -> dict[str, Tensor]:
        """Add the gradient of a micro-batch to the parameters' gradients.

        Args:
            batch: The micro-batch.
            count: Units of the whole batch, by which the sum over this micro-batch is divided.
            scale: Factor of the gradient.

        Returns:
            This micro-batch's share of what is logged; the sum over all of them is the value of the batch.
        """

    def record(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what to log of a batch, of which one value is named `loss`."""
        return sums

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """Return groups of parameters; the gradient norm of each group is clipped on its own."""
        return [[parameter for parameter in self.parameters() if parameter.requires_grad]]


@dataclass(frozen=True)
class Run:
    """What a stage is trained on and how that is logged.

    Attributes:
        batches: Makes the batches from a step on.
        held_out: Batches of held-out text, of which this process measures its share; empty for none.
        identity: Everything that the result depends on, as plain JSON; a checkpoint of another identity is refused.
        flops_per_token: Floating-point operations of the model for each token of training; None if not known.
        tensorboard: Whether to write TensorBoard's event files too.
        sync_every_micro_batch: Whether processes reduce gradients after every micro-batch, not after the last alone.
    """

    batches: BatchSource
    held_out: list[Batch] = field(default_factory=list)
    identity: dict[str, Any] | None = None
    flops_per_token: float | None = None
    tensorboard: bool = False
    sync_every_micro_batch: bool = False


def train(training: Training, run: Run, directory: Path, compute: Compute) -> None:
    """Run all steps of a stage; `training` holds the result.

    Args:
        training: What to train, on the device.
        run: Its data and log.
        directory: Receives metrics.jsonl and checkpoints/, from the last of which an interrupted run continues.
        compute: Device, arithmetic and processes.

    Raises:
        HaloError: If loss, gradient or weights stop being finite, or if a checkpoint cannot be used.
        Stopped: If the process was asked to stop; everything is saved.
    """
    settings = training.settings
    training.shard(compute)
    groups = training.clip_groups()
    optimizer = torch.optim.AdamW(
        _decay_groups(training),
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=training.adam_eps,
        fused=True,
    )
    checkpoints = Checkpoints(directory / files.CHECKPOINTS, run.identity or settings.identity(), compute)
    resumed = checkpoints.load(training, optimizer) or {"step": 0, "seconds": 0.0}
    start = resumed["step"]
    if start and compute.main:
        say(f"{training.name}: continues after step {start}")
    source = run.batches(start)
    saved = time.monotonic()
    work = Work(settings.batch * settings.length, run.flops_per_token)
    metrics = Metrics(directory, compute, start, resumed["seconds"], work, run.tensorboard)
    progress = StageProgress(training.name, settings.steps, compute.main, start)
    with progress, metrics, StopRequest() as stop:
        for step in range(start, settings.steps):
            done = step + 1
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, settings)
            parts = next(source).to(compute.device).split(settings.micro_batch)
            sums = _accumulate(training, parts, compute, run.sync_every_micro_batch)
            norms = torch.stack([whole_tensor(_clip(group, settings.clip)) for group in groups])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            last = done == settings.steps
            measured = bool(run.held_out) and (last or done % (settings.held_out_every or settings.steps) == 0)
            if done % settings.log_every == 0 or last or done == 1 or measured:
                record = {"lr": learning_rate(step, settings), "grad_norm": float(norms.max())}
                record |= _logged(training, sums, compute)
                _require_finite(training, done, record, directory)
                if measured:
                    on_held_out = held_out_record(training, run.held_out, compute)
                    record |= {f"held_out_{name}": value for name, value in on_held_out.items()}
                line = metrics.log(done, record)
                progress.update(done, f"loss {line['loss']:.4f}  {line['tokens_per_second']:,.0f} tokens/s")
            due = settings.checkpoint_every is not None and done % settings.checkpoint_every == 0
            due |= compute.main and time.monotonic() - saved >= 60 * settings.checkpoint_minutes
            stopped, due = compute.agree(stop.requested, due)
            if stopped or due or last:
                _require_finite_gradients(training, done, norms, directory)
                state = {"step": done, "seconds": metrics.seconds}
                checkpoints.save(training, optimizer, state, wait=stopped or last)
                saved = time.monotonic()
                if stopped and not last:
                    raise Stopped(f"{training.name}: stopped and saved after step {done}; the same command continues")
            checkpoints.poll()


def learning_rate(step: int, settings: TrainingSettings) -> float:
    """Return the learning rate of a step, counted from 0: linear warm-up, then cosine to `final_learning_rate`."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(settings.steps - 1 - settings.warmup, 1)
    drop = settings.learning_rate - settings.final_learning_rate
    return settings.final_learning_rate + 0.5 * drop * (1 + math.cos(math.pi * min(progress, 1.0)))


@torch.no_grad()
def held_out_record(training: Training, held_out: list[Batch], compute: Compute) -> dict[str, Any]:
    """Measure on batches, each of which is shared out over the processes, what a step logs, without training."""
    share = [batch.share(compute.rank, compute.world).to(compute.device) for batch in held_out]
    sums = _accumulate(training, share, compute)
    reshard(training)
    return _logged(training, sums, compute)


def backward(loss: Tensor, scale: float) -> None:
    """Add the gradient of a loss, multiplied by `scale`, unless gradients are disabled; outside of autocast."""
    if torch.is_grad_enabled():
        with torch.autocast(loss.device.type, enabled=False):
            (loss * scale).backward()


def _accumulate(training: Training, parts: list[Batch], compute: Compute, sync: bool = False) -> dict[str, Tensor]:
    """Compute the gradient of micro-batches together, and return this process's share of what is logged."""
    count = compute.sum(torch.stack([training.units(part) for part in parts]).sum()).clamp(min=1)
    sums: dict[str, Tensor] = {}
    for number, part in enumerate(parts, 1):
        synchronise(training, wanted=sync or number == len(parts))
        with compute.autocast():
            # FSDP averages over the processes, and their sums are wanted.
            added = training.accumulate(part, count, float(compute.world))
        for key, value in added.items():
            sums[key] = sums[key] + value if key in sums else value
    return sums


def _logged(training: Training, sums: dict[str, Tensor], compute: Compute) -> dict[str, Any]:
    record = training.record({key: compute.sum(value) for key, value in sums.items()})
    return {key: value.tolist() for key, value in record.items()}


def _decay_groups(training: Training) -> list[dict[str, Any]]:
    """Return AdamW's groups: weight decay is for matrices, not for norms, biases and the parameters of decays."""
    trained = [parameter for parameter in training.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() > 1]
    vectors = [parameter for parameter in trained if parameter.dim() <= 1]
    groups = ((matrices, training.settings.weight_decay), (vectors, 0.0))
    return [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters]


def _clip(parameters: list[nn.Parameter], limit: float) -> Tensor:
    return nn.utils.clip_grad_norm_(parameters, limit)


def _require_finite(training: Training, step: int, record: dict[str, Any], directory: Path) -> None:
    if not (math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])):
        raise HaloError(
            f"{training.name}: loss and gradient must stay finite, got loss {record['loss']} and gradient norm "
            f"{record['grad_norm']} at step {step}; {_advice(training, directory)}"
        )


def _require_finite_gradients(training: Training, step: int, norms: Tensor, directory: Path) -> None:
    if not bool(torch.isfinite(norms).all()):
        raise HaloError(
            f"{training.name}: gradient must stay finite, got norm {norms.max()} at step {step}; "
            f"{_advice(training, directory)}"
        )


def _advice(training: Training, directory: Path) -> str:
    return f"delete {directory} and start the stage again with a lower {training.name}.learning_rate or clip"
