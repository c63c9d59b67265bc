"""Checkpoints of a training stage: whole or absent, the last two kept, bound to what they were made from.

Weights and optimizer state are written by torch.distributed.checkpoint into step-N.partial, in the background where
that saves time, and published by renaming it to step-N. Any number of processes can load it.
"""

import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

from halo import files
from halo.compute import PATIENCE, Compute
from halo.progress import warn
from halo.settings import HaloError

KEPT = 2
RECORD = "checkpoint.json"


class Checkpoints:
    """The checkpoints in one directory.

    Args:
        directory: Where they are; leftovers of interrupted writes in it are deleted.
        identity: Everything that the result depends on, as plain JSON.
        compute: The processes that write together.
    """

    def __init__(self, directory: Path, identity: dict[str, Any], compute: Compute) -> None:
        self.directory, self.identity, self.compute = directory, identity, compute
        self.writing: tuple[Future, Path, Path] | None = None
        # Collectives of a save run beside those of training, so they need a group of their own.
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if compute.world > 1 else None
        compute.from_main(lambda: files.remove_leftovers(directory))

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, ascending."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.directory.glob("step-*") if path.is_dir())

    def save(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, record: dict[str, Any], wait: bool = False
    ) -> None:
        """Save weights and optimizer state.

        Args:
            module: Its trainable parameters are saved.
            optimizer: AdamW over them.
            record: What else to keep, as plain JSON; its `step` names the checkpoint.
            wait: Whether to return only when it is published.

        Raises:
            HaloError: If a weight is not finite, in which case nothing is written, or if the disk is full.
        """
        self.finish()
        if not _is_finite(module, self.compute):
            raise HaloError(
                f"{self.directory.parent}: weights must stay finite, got infinity or NaN at step {record['step']}, "
                "which was not saved; delete it and start the stage again with a lower learning rate"
            )
        path = self.directory / f"step-{record['step']}"
        partial = path.with_name(path.name + files.PARTIAL)
        whole = record | {"identity": self.identity, "world": self.compute.world}
        self.compute.from_main(lambda: self._begin(partial, whole))
        state = _state(module, optimizer)
        background = self.compute.world > 1 or self.compute.device.type == "cuda"
        if background:
            future = dcp.async_save(
                state, checkpoint_id=partial, process_group=self.group, no_dist=self.compute.world == 1
            )
            self.writing = (_completion(future), partial, path)
            if wait:
                self.finish()
        else:
            with files.writing(path):
                try:
                    with _quiet(), _causes():
                        dcp.save(state, checkpoint_id=partial, no_dist=True)
                except (OSError, RuntimeError) as error:  # the second is torch's, of a file that is too short
                    files.remove(partial)
                    raise OSError(f"{next(iter(str(error).splitlines()), error)}") from None
                self._publish(partial, path)

    def poll(self) -> None:
        """Publish a save that has ended in the background."""
        if self.writing is not None and self.writing[0].done():
            self.finish()

    def finish(self) -> None:
        """Wait for the save in the background, if any, and publish it."""
        if self.writing is None:
            return
        future, partial, path = self.writing
        self.writing = None
        with files.writing(path):
            try:
                with _causes():
                    future.result()
            except Exception as error:
                raise OSError(str(error)) from None
            if self.compute.main:  # Its own save ends after those of all others.
                self._publish(partial, path)

    def load(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Restore the last checkpoint and return its record, or None if there is none.

        Raises:
            HaloError: If it is damaged, or was made from other settings or data.
        """
        step = self.compute.from_main(lambda: max(self.steps(), default=None))
        if step is None:
            return None
        path = self.directory / f"step-{step}"
        remedy = f"delete it to continue from the one before, or delete {self.directory.parent} to start again"
        record = files.read_json(path / RECORD, remedy)
        if not isinstance(record.get("identity"), dict) or not isinstance(record.get("world"), int):
            raise HaloError(f"{path / RECORD}: must hold identity and world, got {sorted(record)}; {remedy}")
        difference = first_difference(record["identity"], self.identity)
        if difference:
            raise HaloError(
                f"{path}: comes from another run ({difference}); give another --out or delete {self.directory.parent}"
            )
        _allocate(optimizer)
        state = _state(module, optimizer)
        with files.reading(path, remedy), _quiet(), _causes():
            dcp.load(state, checkpoint_id=path, process_group=self.group, no_dist=self.compute.world == 1)
        if record["world"] != self.compute.world and self.compute.main:
            warn(
                f"the checkpoint was written by {record['world']} processes and {self.compute.world} continue: the "
                "batches stay the same, sums are rounded differently"
            )
        return record

    def delete(self) -> None:
        """Delete all checkpoints, once the stage has its result."""
        self.finish()
        self.compute.barrier()
        if self.compute.main:
            files.remove(self.directory)

    def _begin(self, partial: Path, record: dict[str, Any]) -> None:
        with files.writing(partial):
            files.remove(partial)
            partial.mkdir(parents=True)
        files.write_json(partial / RECORD, record)

    def _publish(self, partial: Path, path: Path) -> None:
        files.publish_directory(partial, path)
        for step in self.steps()[:-KEPT]:
            shutil.rmtree(self.directory / f"step-{step}")


def first_difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str | None:
    """Describe the first value in which two nested dicts differ, or return None."""
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found = first_difference(before, after, f"{prefix}{key}.")
            if found:
                return found
        elif before != after:
            return f"{prefix}{key}: {before} there, {after} now"
    return None


def _is_finite(module: nn.Module, compute: Compute) -> bool:
    """Return whether every trainable parameter is finite in every process."""
    norms = [parameter.detach().float().abs().amax() for parameter in module.parameters() if parameter.requires_grad]
    largest = torch.stack([norm.to_local() if hasattr(norm, "to_local") else norm for norm in norms])
    return not compute.agree(not bool(torch.isfinite(largest).all()))[0]


def _state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return trainable weights and AdamW's state under flat names, as the tensors themselves."""
    names: dict[Tensor, str] = {weight: name for name, weight in module.named_parameters() if weight.requires_grad}
    state: dict[str, Tensor] = {f"model.{name}": weight.detach() for weight, name in names.items()}
    for parameter, values in optimizer.state.items():
        state |= {f"optimizer.{names[parameter]}.{key}": value for key, value in values.items()}
    return state


def _allocate(optimizer: torch.optim.Optimizer) -> None:
    """Give AdamW the state that its first step would create, so that there is something to load into."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from remarking each time that one process saves and loads without a process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


@contextmanager
def _causes() -> Iterator[None]:
    """Raise what went wrong in a process in place of CheckpointException, which is no Exception and ten lines long."""
    try:
        yield
    except dcp.api.CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from None


def _completion(response: Future | AsyncSaveResponse) -> Future:
    return response if isinstance(response, Future) else response.upload_completion
