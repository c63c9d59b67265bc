"""What the machine can do, measured beside the kernels: never taken from a data sheet."""

from dataclasses import asdict, dataclass

import torch

from bench import timing
from hypenet_kernels import _native

BUFFER_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
MATRIX = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Roofs:
    """Bytes a second of a copy (read and written) and of a sum (read only); FLOP/s of a large product per dtype."""

    copy: float
    read: float
    matmul: dict

    def seconds(self, flops, size, dtype):
        """The time below which work of these FLOPs and bytes cannot go."""
        return max(flops / self.matmul[dtype], size / self.bandwidth)

    @property
    def bandwidth(self):
        """The faster of both: what a mixture of reads and writes cannot exceed."""
        return max(self.copy, self.read)

    def bound(self, flops, size, dtype):
        return "compute" if flops / self.matmul[dtype] > size / self.bandwidth else "memory"

    def asdict(self):
        return asdict(self)


def memory(device, seconds):
    """Bytes a second of a copy and of a sum of what no cache holds."""
    size = BUFFER_BYTES[torch.device(device).type]
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    functions = {"copy": lambda: target.copy_(source), "read": lambda: source.sum()}
    times = {name: 1e-3 * taken.median for name, taken in timing.measure(functions, device, seconds).items()}
    return {"copy": 2 * size / times["copy"], "read": size / times["read"]}


def measure(device, seconds=2.0):
    """Roofs of a device, with all its threads."""
    device = torch.device(device)
    functions, size = {}, MATRIX[device.type]
    dtypes = (torch.float32,) if device.type == "cpu" else (torch.bfloat16, torch.float16)
    if device.type == "cpu" and _native.level() == "v4_bf16":
        dtypes += (torch.bfloat16,)
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        functions[str(dtype)] = lambda a=a, b=b: a @ b
    times = {name: 1e-3 * taken.median for name, taken in timing.measure(functions, device, seconds / 2).items()}
    matmul = {str(dtype).removeprefix("torch."): 2 * size**3 / times[str(dtype)] for dtype in dtypes}
    if device.type == "cpu":  # at lesser levels kernels widen bfloat16 to float32 and multiply there
        matmul.setdefault("bfloat16", matmul["float32"])
    return Roofs(**memory(device, seconds / 2), matmul=matmul)
