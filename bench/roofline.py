"""Measure memory bandwidth and matrix-product rate in the same run as the kernels; no number is from a data sheet."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench import timing
from hypenet_kernels import _native

BUFFER_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
MATRIX = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Roofs:
    """Bytes per second of a copy (read and written) and of a sum (read); FLOP/s of a large matrix product per dtype."""

    copy: float
    read: float
    matmul: dict[str, float]

    def seconds(self, flops: float, size: float, dtype: str) -> float:
        """Return the least time for work of these FLOPs and bytes."""
        return max(flops / self.matmul[dtype], size / self.bandwidth)

    @property
    def bandwidth(self) -> float:
        """The faster of copy and read, an upper bound for any mixture of reads and writes."""
        return max(self.copy, self.read)

    def bound(self, flops: float, size: float, dtype: str) -> str:
        """Return the binding resource: "compute" or "memory"."""
        return "compute" if flops / self.matmul[dtype] > size / self.bandwidth else "memory"

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


def memory(device: str | torch.device, seconds: float) -> dict[str, float]:
    """Measure the bytes per second of a copy and of a sum, on buffers larger than any cache."""
    size = BUFFER_BYTES[torch.device(device).type]
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    functions: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source), "read": lambda: source.sum()}
    times = {name: 1e-3 * taken.median for name, taken in timing.measure(functions, device, seconds).items()}
    return {"copy": 2 * size / times["copy"], "read": size / times["read"]}


def measure(device: str | torch.device, seconds: float = 2.0) -> Roofs:
    """Measure the roofs of a device, on the CPU with all threads of torch."""
    device = torch.device(device)
    functions, size = {}, MATRIX[device.type]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,) if device.type == "cpu" else (torch.bfloat16, torch.float16)
    if device.type == "cpu" and _native.level() == "v4_bf16":
        dtypes += (torch.bfloat16,)
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        functions[str(dtype)] = lambda a=a, b=b: a @ b
    times = {name: 1e-3 * taken.median for name, taken in timing.measure(functions, device, seconds / 2).items()}
    matmul = {str(dtype).removeprefix("torch."): 2 * size**3 / times[str(dtype)] for dtype in dtypes}
    if device.type == "cpu":  # below level v4_bf16 our kernels widen bfloat16 and multiply in float32
        matmul.setdefault("bfloat16", matmul["float32"])
    return Roofs(**memory(device, seconds / 2), matmul=matmul)
