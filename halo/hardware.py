"""Hardware to plan for: GPUs by name, with what they can do at best, or this machine's CPU."""

import os
import re
import time
from dataclasses import dataclass

import torch

from halo.compute import Compute
from halo.settings import HaloError

GPUS_PER_NODE = 8
# Bytes of a GPU that a run cannot use: CUDA's context, communication buffers, fragmentation.
RESERVED = 4 * 2**30


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU: dense bf16 operations per second, and bytes of memory that torch reports."""

    flops: float
    memory: float


GPUS = {
    "A100": Gpu(312e12, 79 * 2**30),
    "A800": Gpu(312e12, 79 * 2**30),
    "H100": Gpu(989e12, 79 * 2**30),
    "H100-NVL": Gpu(835e12, 93 * 2**30),
    "H100-PCIe": Gpu(756e12, 79 * 2**30),
    "H200": Gpu(989e12, 139 * 2**30),
}


@dataclass(frozen=True)
class Machine:
    """What a conversion runs on.

    Attributes:
        processes: One for each GPU.
        shards: Processes over which weights are sharded: those of a node.
        memory: Bytes of each.
        peak: Floating-point operations per second of each; 0 if not known.
        width: Bytes of an element of the forward passes: 2 for bf16, 4 for float32.
        cuda: Whether these are GPUs.
    """

    processes: int
    shards: int
    memory: float
    peak: float
    width: int
    cuda: bool

    @property
    def available(self) -> float:
        """Bytes of a process' memory that a conversion can use."""
        return self.memory - (RESERVED if self.cuda else 0)


def parse_gpus(text: str) -> tuple[int, str, float | None]:
    """Return count, kind and stated TFLOP/s of hardware given as [COUNTx]KIND or cpu[@TFLOPS].

    Raises:
        HaloError: If it is neither.
    """
    names = {name.lower(): name for name in GPUS}
    match = re.fullmatch(r"(?:(\d+)x)?([a-z][\w-]*)(?:@(\d+(?:\.\d+)?))?", text.strip(), re.IGNORECASE)
    kind = match[2].lower() if match else ""
    if not match or (kind not in names and kind != "cpu") or (match[3] and kind != "cpu"):
        raise HaloError(f"--gpus: must be like 8xH100, of {', '.join(GPUS)}, or cpu or cpu@TFLOPS, got {text}")
    count, rate = int(match[1] or 1), float(match[3]) if match[3] else None
    if count < 1 or rate == 0:
        raise HaloError(f"--gpus: numbers must be positive, got {text}")
    if kind != "cpu" and count > GPUS_PER_NODE and count % GPUS_PER_NODE:
        raise HaloError(f"--gpus: more than {GPUS_PER_NODE} must be a multiple of it (whole nodes), got {count}")
    return count, names.get(kind, "cpu"), rate


def find_machine(text: str, precision: str, threads: int | None = None) -> Machine:
    """Return the hardware that a text names.

    Args:
        text: As for `parse_gpus`. The rate of a CPU that is not stated is measured, and its memory is this machine's.
        precision: "auto", "bf16" or "fp32", as in a configuration.
        threads: CPU threads; None for torch's choice.

    Raises:
        HaloError: If it names none, or has no kernels for this precision.
    """
    count, kind, rate = parse_gpus(text)
    if kind == "cpu":
        dtype = Compute.start("cpu", precision, threads).dtype
        memory = main_memory() / count
        peak = rate * 1e12 if rate else measured_flops(dtype) / count
        return Machine(count, count, memory, peak, dtype.itemsize, cuda=False)
    if precision == "fp32":
        raise HaloError("precision: must be bf16 or auto on CUDA, where the kernels take no float32, got fp32")
    gpu = GPUS[kind]
    return Machine(count, min(count, GPUS_PER_NODE), gpu.memory, gpu.flops, width=2, cuda=True)


def this_machine(compute: Compute) -> Machine:
    """Return the hardware that a run computes on. The peak of a CPU, which would have to be measured, is 0."""
    shards = compute.mesh.size(-1) if compute.mesh is not None else 1
    cuda = compute.device.type == "cuda"
    if cuda:
        memory = torch.cuda.get_device_properties(compute.device).total_memory
        peak = peak_flops(torch.cuda.get_device_name(compute.device)) or 0.0
    else:
        memory, peak = main_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 0.0
    return Machine(compute.world, shards, memory, peak, compute.dtype.itemsize, cuda)


def main_memory() -> int:
    """Return the bytes of this machine's main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 operations per second of a GPU, or None if it is not known.

    Args:
        device_name: As `torch.cuda.get_device_name()` returns it, such as "NVIDIA H100 80GB HBM3".

    Example:
        >>> from halo.hardware import peak_flops
        >>> peak_flops("NVIDIA A100-SXM4-80GB") / 1e12
        312.0
    """
    words = set(re.findall(r"\w+", device_name.upper()))
    known = [name for name in GPUS if set(name.upper().split("-")) <= words]
    return GPUS[max(known, key=len)].flops if known else None


def measured_flops(dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Measure the floating-point operations per second of matrix products on this CPU, with torch's threads."""
    size = 1024
    a, b = torch.randn(2, size, size).to(dtype)
    a @ b
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        a @ b
        done += 1
    return done * 2 * size**3 / (time.perf_counter() - began)
