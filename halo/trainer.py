"""The training loop of all stages. A stage defines the model, the trainable parameters and the loss.

A run that is interrupted and started again continues from its last checkpoint with the same batches, random numbers and
optimizer state, so its losses are bit for bit those of an uninterrupted run.
"""

import json
import math
import os
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torchdata.stateful_dataloader import StatefulDataLoader

from halo.config import HaloError, TrainingSettings
from halo.data import Batch
from halo.progress import StageProgress, say

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"

Autocast = AbstractContextManager[Any]


class Stage(Protocol):
    """The interface of a training stage."""

    name: ClassVar[str]

    @property
    def settings(self) -> TrainingSettings:
        """Hyperparameters of the stage."""

    def build(self) -> nn.Module:
        """Prepare the models and return the module whose trainable parameters are trained and checkpointed."""

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a scalar to differentiate, and detached tensors to log, of which one is named `loss`."""

    def clip_groups(self, module: nn.Module) -> list[list[nn.Parameter]]:
        """Return groups of parameters; the gradient norm of each group is clipped on its own."""


def train(
    stage: Stage,
    batches: StatefulDataLoader,
    directory: Path,
    device: torch.device,
    precision: str = "fp32",
    seed: int = 0,
) -> nn.Module:
    """Run all steps of a stage.

    Args:
        stage: What to train.
        batches: Loader of Batch.
        directory: Receives metrics.jsonl and, until the stage is finished, checkpoint.pt; a checkpoint in it is
            continued.
        device: Where the models are.
        precision: "fp32", or "bf16" to run the forward pass under autocast; weights and optimizer state are fp32.
        seed: Seed of all random numbers.

    Returns:
        The trained module.

    Raises:
        HaloError: If the loss is not finite when it is logged, or if the checkpoint belongs to other settings.
    """
    settings = stage.settings
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    directory.mkdir(parents=True, exist_ok=True)
    module = stage.build()
    groups = stage.clip_groups(module)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )
    start, elapsed = _resume(stage, directory, module, optimizer, batches)
    autocast: Autocast = nullcontext() if precision == "fp32" else torch.autocast(device.type, torch.bfloat16)
    source = iter(batches)
    last_step, last_time = start, time.monotonic()
    began = last_time - elapsed
    tokens = settings.batch * settings.length
    with StageProgress(stage.name, settings.steps) as progress, (directory / METRICS).open("a") as metrics:
        for step in range(start, settings.steps):
            rate = learning_rate(step, settings)
            for group in optimizer.param_groups:
                group["lr"] = rate
            logged = _backward(stage, next(source).to(device), settings.micro_batch, autocast)
            norms = torch.stack([_clip(group, settings.clip) for group in groups])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done = step + 1
            if done % settings.log_every == 0 or done == settings.steps or done == 1:
                record: dict[str, Any] = {"step": done, "lr": rate, "grad_norm": float(norms.max())}
                record |= {key: value.tolist() for key, value in logged.items()}
                _check_finite(stage, record)
                now = time.monotonic()
                speed = tokens * (done - last_step) / max(now - last_time, 1e-9)
                last_step, last_time = done, now
                record |= {"seconds": round(now - began, 3), "tokens_per_second": round(speed)}
                metrics.write(json.dumps(record) + "\n")
                metrics.flush()
                progress.update(done, f"loss {record['loss']:.4f}  {speed:,.0f} tokens/s")
            if done % settings.checkpoint_every == 0 and done < settings.steps:
                _save(stage, directory, module, optimizer, batches, done, time.monotonic() - began)
    return module


def learning_rate(step: int, settings: TrainingSettings) -> float:
    """Return the learning rate of a step, counted from 0: linear warm-up from 0, cosine to `final_learning_rate`."""
    if step < settings.warmup:
        return settings.learning_rate * step / settings.warmup
    progress = (step - settings.warmup) / max(settings.steps - 1 - settings.warmup, 1)
    drop = settings.learning_rate - settings.final_learning_rate
    return settings.final_learning_rate + 0.5 * drop * (1 + math.cos(math.pi * min(progress, 1.0)))


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file so that an interrupted process leaves either the old or the new content.

    Args:
        path: The file.
        write: Writes the content to the temporary path that it is given, which is then renamed.
    """
    partial = path.with_name(path.name + ".partial")
    write(partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def _backward(stage: Stage, batch: Batch, micro_batch: int | None, autocast: Autocast) -> dict[str, Tensor]:
    """Accumulate the gradients of the mean loss over micro-batches and return the mean of the logged tensors."""
    parts = batch.split(micro_batch)
    sums: dict[str, Tensor] = {}
    for part in parts:
        with autocast:
            loss, logged = stage.loss(part)
        (loss / len(parts)).backward()
        for key, value in logged.items():
            value = value.detach() / len(parts)
            sums[key] = sums[key] + value if key in sums else value
    return sums


def _clip(parameters: list[nn.Parameter], limit: float) -> Tensor:
    return nn.utils.clip_grad_norm_(parameters, limit)


def _check_finite(stage: Stage, record: dict[str, Any]) -> None:
    if not (math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])):
        raise HaloError(
            f"{stage.name}: loss and gradient must stay finite, got loss {record['loss']} and gradient norm "
            f"{record['grad_norm']} at step {record['step']}; lower {stage.name}.learning_rate or {stage.name}.clip"
        )


def _save(
    stage: Stage,
    directory: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: StatefulDataLoader,
    done: int,
    elapsed: float,
) -> None:
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    state = {
        "settings": stage.settings.model_dump(mode="json"),
        "step": done,
        "elapsed": elapsed,
        "model": {name: value for name, value in module.state_dict().items() if name in trained},
        "optimizer": optimizer.state_dict(),
        "data": batches.state_dict(),
        "random": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "metrics_bytes": (directory / METRICS).stat().st_size,
    }
    write_atomically(directory / CHECKPOINT, lambda path: torch.save(state, path))


def _resume(
    stage: Stage,
    directory: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: StatefulDataLoader,
) -> tuple[int, float]:
    """Restore the last checkpoint, if any, and return the number of finished steps and the seconds they took."""
    path = directory / CHECKPOINT
    if not path.is_file():
        (directory / METRICS).unlink(missing_ok=True)
        return 0, 0.0
    # We wrote this file; the generator states in it are not accepted by the restricted unpickler.
    state = torch.load(path, map_location="cpu", weights_only=False)
    if state["settings"] != stage.settings.model_dump(mode="json"):
        raise HaloError(
            f"{path}: must come from the same {stage.name} settings; give another --out or delete {directory}"
        )
    missing, unexpected = module.load_state_dict(state["model"], strict=False)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    if unexpected or trained.intersection(missing):
        raise HaloError(f"{path}: must hold this model's weights; give another --out or delete {directory}")
    optimizer.load_state_dict(state["optimizer"])
    batches.load_state_dict(state["data"])
    random.setstate(state["random"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    # Steps after the checkpoint are repeated, and so are their lines.
    os.truncate(directory / METRICS, state["metrics_bytes"])
    say(f"{stage.name}: continues after step {state['step']}")
    return state["step"], state["elapsed"]
