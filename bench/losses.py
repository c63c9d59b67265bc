"""Memory and time of the losses over the vocabulary, forward and backward: `python -m bench losses`.

The memory is the most that is needed at a time beyond the inputs, in bf16, and the weight's gradient, in fp32. It is
traced by running the loss as on a GPU, but on fake tensors, which have shapes and no contents, so that the sizes of
real models can be checked on any machine. On a GPU the allocator's own count is shown beside it.
"""

import weakref
from collections.abc import Callable
from typing import Any, TypedDict
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import timing
from halo import losses

LOSSES = ("kl_divergence", "next_token_loss")
HEADER = ("loss", "tokens", "traced", "allocated", "time")


class Row(TypedDict):
    """Bytes beyond inputs and gradients, traced and as allocated (on a GPU), and milliseconds (if measured)."""

    loss: str
    tokens: int
    traced_bytes: int
    allocated_bytes: int | None
    ms: float | None


class AllocatedBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside the context and alive at the same time, at the most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen = weakref.WeakSet[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten.mm.dtype_out, torch.ops.aten.addmm.dtype_out):
            return kwargs["out"]  # CUDA only; the result needs no memory of its own
        known = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **kwargs)
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and id(x.untyped_storage()) not in known:
                self._add(x.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self.seen:
            self.seen.add(storage)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._remove, storage.nbytes())

    def _remove(self, size: int) -> None:
        self.live -= size


def traced_bytes(loss: str, tokens: int, vocabulary: int, hidden: int, chunk: int, dtype: torch.dtype) -> int:
    """Return the most bytes that the loss needs beyond inputs and the fp32 gradient of the weight, as on a GPU."""
    exact = patch.object(losses, "_accumulates_bfloat16", lambda device_type: True)
    unchecked = patch.object(losses, "_check_labels", lambda *_: None)
    with FakeTensorMode(), exact, unchecked:
        run, weight = workload(loss, tokens, vocabulary, hidden, chunk, dtype, "cpu")
        with AllocatedBytes() as allocated:
            run()
    return allocated.peak - 4 * weight.numel()


def workload(
    loss: str, tokens: int, vocabulary: int, hidden: int, chunk: int, dtype: torch.dtype, device: str
) -> tuple[Callable[[], None], Tensor]:
    """Return a function that runs forward and backward, and the weight whose gradient it computes."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    h = normal(tokens, hidden).requires_grad_()
    weight = normal(vocabulary, hidden).mul_(hidden**-0.5).requires_grad_()
    teacher = normal(tokens, hidden), normal(vocabulary, hidden).mul_(hidden**-0.5)
    labels = torch.randint(vocabulary, (tokens,), device=device)

    def run() -> None:
        h.grad = weight.grad = None
        if loss == "kl_divergence":
            losses.kl_divergence(h, weight, *teacher, chunk).backward()
        else:
            losses.next_token_loss(h, weight, labels, chunk).backward()

    return run, weight


def run(device: str, tokens: int, vocabulary: int, hidden: int, chunk: int, seconds: float) -> list[Row]:
    """Trace both losses, and time them unless `seconds` is 0."""
    kind = torch.device(device).type
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    rows: list[Row] = []
    for loss in LOSSES:
        traced = traced_bytes(loss, tokens, vocabulary, hidden, chunk, torch.bfloat16)
        allocated = ms = None
        if seconds:
            call, weight = workload(loss, tokens, vocabulary, hidden, chunk, dtype, device)
            if kind == "cuda":
                allocated = _cuda_bytes(call, weight)
            ms = timing.measure({loss: call}, device, seconds)[loss].median
        rows.append({"loss": loss, "tokens": tokens, "traced_bytes": traced, "allocated_bytes": allocated, "ms": ms})
    return rows


def cells(row: Row) -> list[str]:
    """Format a row of the table."""
    sizes = [
        f"{size / 1e6:.0f} MB" if size is not None else "" for size in (row["traced_bytes"], row["allocated_bytes"])
    ]
    return [row["loss"], f"{row['tokens']:,}", *sizes, "" if row["ms"] is None else f"{row['ms']:.0f} ms"]


def _cuda_bytes(call: Callable[[], None], weight: Tensor) -> int:
    call()
    weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before - 4 * weight.numel()
