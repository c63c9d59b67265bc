"""Where and how a run computes: device, arithmetic, and the processes that share the work.

One `Compute` serves every stage. Started by torchrun, several processes share each batch; otherwise there is one.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from halo.device import find_device
from halo.errors import HaloError

# Ranks wait for rank 0 while it tokenises or saves, which may take hours.
PATIENCE = timedelta(hours=24)


@dataclass(frozen=True)
class Compute:
    """Device, arithmetic and processes of a run.

    Attributes:
        device: Where the models are.
        dtype: Of the arithmetic in forward passes: float32 or bfloat16. Trained weights are always float32.
        rank, world: This process, and how many there are.
        mesh: The devices over which weights are sharded (last dimension) and replicated (first, if there are two); None
            for one process.
        control: Process group on the CPU for decisions and files; None for one process.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    rank: int = 0
    world: int = 1
    mesh: DeviceMesh | None = None
    control: Any = None

    @classmethod
    def start(cls, device: str = "auto", precision: str = "auto", threads: int | None = None) -> "Compute":
        """Choose the device and the arithmetic, and join the other processes, if any.

        Args:
            device: "auto", "cpu", "cuda" or "cuda:N".
            precision: "fp32", "bf16", or "auto": bf16 on CUDA and on CPUs that multiply it in hardware.
            threads: CPU threads; None for torch's choice.

        Raises:
            HaloError: If the machine does not have the device, or the device does not have the arithmetic.
        """
        if threads:
            torch.set_num_threads(threads)
        world = int(os.environ.get("WORLD_SIZE", "1"))
        chosen = _device(device, world)
        dtype = _dtype(precision, chosen)
        if world == 1:
            return cls(chosen, dtype)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        if not dist.is_initialized():
            dist.init_process_group("cuda:nccl,cpu:gloo" if chosen.type == "cuda" else "gloo")
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        nodes = world // local
        # Sharded within a node, replicated across nodes: gathers stay on the fast links.
        shape, names = ((world,), ("shard",)) if nodes == 1 else ((nodes, local), ("replicate", "shard"))
        mesh = init_device_mesh(chosen.type, shape, mesh_dim_names=names)
        control = dist.new_group(backend="gloo", timeout=PATIENCE)
        return cls(chosen, dtype, dist.get_rank(), world, mesh, control)

    @property
    def main(self) -> bool:
        """Whether this process writes the files and prints."""
        return self.rank == 0

    @property
    def precision(self) -> str:
        """The name of the arithmetic, "fp32" or "bf16"."""
        return "fp32" if self.dtype == torch.float32 else "bf16"

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context that every forward pass runs in."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def barrier(self) -> None:
        """Wait for the other processes."""
        if self.world > 1:
            dist.barrier(self.control)

    @staticmethod
    def leave() -> None:
        """End the communication with the other processes, if any; a thread of it may not outlive the interpreter."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def agree(self, *flags: bool) -> list[bool]:
        """Return for each flag whether any process raised it."""
        if self.world == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(raised, dist.ReduceOp.MAX, group=self.control)
        return raised.bool().tolist()

    def from_main(self, make: Callable[[], Any]) -> Any:
        """Run a function in the main process and return its result in all of them; its HaloError is raised in all."""
        if self.world == 1:
            return make()
        box: list[Any] = [None, None]
        if self.main:
            try:
                box[0] = make()
            except HaloError as error:
                box[1] = str(error)
        dist.broadcast_object_list(box, src=0, group=self.control, device=torch.device("cpu"))
        if box[1] is not None:
            raise HaloError(box[1])
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, in the order of their ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.control)
        return values


def _device(name: str, world: int) -> torch.device:
    device = find_device(name)
    if device.type == "cpu" or world == 1:
        return device
    if ":" in name:
        raise HaloError(f"device: must not name one device when torchrun starts several processes, got {name}")
    return find_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")


def _dtype(precision: str, device: torch.device) -> torch.dtype:
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" or _multiplies_bf16() else "fp32"
    if precision == "fp32" and device.type == "cuda":
        raise HaloError("precision: must be bf16 or auto on CUDA, where the kernels take no float32, got fp32")
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _multiplies_bf16() -> bool:
    """Return whether this CPU has instructions for products of bfloat16, which are 1.5 to 1.8 times as fast."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
