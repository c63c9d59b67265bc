"""What the machine can do, measured beside the kernels: never taken from a data sheet."""

from dataclasses import asdict, dataclass, replace

import torch

from bench import timing
from hypenet_kernels import native

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

    def at(self, times):
        """These roofs with the memory's taken from the times of memory_calls, which it removes."""
        size = BUFFER_BYTES["cpu"]
        copy, read = (1e3 / times.pop(name).median for name in ("copy", "read"))
        return replace(self, copy=2 * size * copy, read=size * read)

    def asdict(self):
        return asdict(self)


def memory_calls(device):
    """A copy and a sum of BUFFER_BYTES, which no cache holds."""
    source = torch.ones(BUFFER_BYTES[torch.device(device).type] // 4, device=device)
    target = torch.empty_like(source)
    return {"copy": lambda: target.copy_(source), "read": lambda: source.sum()}


def measure(device, seconds=2.0):
    """Roofs of a device, with all its threads."""
    device = torch.device(device)
    functions, size = memory_calls(device), MATRIX[device.type]
    dtypes = (torch.float32,) if device.type == "cpu" else (torch.bfloat16, torch.float16)
    if device.type == "cpu" and native.level() == "v4_bf16":
        dtypes += (torch.bfloat16,)
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        functions[str(dtype)] = lambda a=a, b=b: a @ b
    times = {name: 1e-3 * taken.median for name, taken in timing.measure(functions, device, seconds).items()}
    num_bytes = BUFFER_BYTES[device.type]
    matmul = {str(dtype).removeprefix("torch."): 2 * size**3 / times[str(dtype)] for dtype in dtypes}
    if device.type == "cpu":  # at lesser levels kernels widen bfloat16 to float32 and multiply there
        matmul.setdefault("bfloat16", matmul["float32"])
    return Roofs(2 * num_bytes / times["copy"], num_bytes / times["read"], matmul)
