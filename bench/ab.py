"""Compare two builds of the kernels in one process, in turns, so that a change of clocks or of load affects both.

The other build is a checkout in which `python setup.py build_ext --inplace` was run. Only its native module is used:
the Python code, and so the fields that a kernel is given, are those of this checkout.
"""

import functools
import importlib.machinery
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench import cases, ops, timing
from hypenet_kernels import _native

HEADER = ["case", "this ms", "other ms", "speedup", "range", "same bits"]
TURNS = 5


@dataclass(frozen=True)
class Row:
    """A case: medians of both builds over the turns, `ratios` of the other's time to this one's in each turn."""

    name: str
    this_ms: float
    other_ms: float
    ratios: tuple[float, ...]
    same_bits: bool

    def cells(self) -> list[str]:
        """Return the cells of HEADER."""
        low, middle, high = min(self.ratios), statistics.median(self.ratios), max(self.ratios)
        times = f"{self.this_ms:.4g}", f"{self.other_ms:.4g}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}"
        return [self.name, *times, "yes" if self.same_bits else "no"]


def run(
    other: Path,
    names: list[str],
    device: str,
    quick: bool = False,
    seconds: float = ops.SECONDS,
    on_case: Callable[[int, int, str], None] = lambda index, count, name: None,
) -> Iterator[Row]:
    """Yield a row for every case of the ops `names` (empty: all).

    Args:
        other: Root of the other checkout.
        seconds: For a case.
        on_case: Called as on_case(index, count, name) before each case.

    Raises:
        ValueError: If the other checkout has no module of this kind, or an op is unknown.
    """
    modules = {"this": own_module(device), "other": load(other, own_module(device))}
    chosen = ops.select(names, device, quick)
    with _switch(modules) as use:
        for index, case in enumerate(chosen):
            on_case(index, len(chosen), case.name)
            workload = cases.build(case, device)

            def call(build: str, workload: cases.Workload = workload) -> tuple[torch.Tensor, ...]:
                use(build)
                return workload.run()

            runs = {build: functools.partial(call, build) for build in modules}
            same = all(torch.equal(a, b) for a, b in zip(*(run() for run in runs.values()), strict=True))
            turns = [timing.measure(runs, device, seconds / TURNS) for _ in range(TURNS)]
            this, others = ([turn[build].median for turn in turns] for build in runs)
            ratios = tuple(b / a for a, b in zip(this, others, strict=True))
            yield Row(case.name, statistics.median(this), statistics.median(others), ratios, same)


def own_module(device: str) -> ModuleType:
    """Return this checkout's module for a device."""
    if torch.device(device).type == "cpu":
        return _native.cpu()
    return _native.cuda_for(torch.cuda.get_device_capability(device))


def load(other: Path, own: ModuleType) -> ModuleType:
    """Return another checkout's module of the same name as `own`."""
    assert own.__file__ is not None
    path = other / "hypenet_kernels" / Path(own.__file__).name
    if not path.is_file():
        raise ValueError(f"bench: OTHER must be a checkout with a built {path.name}, got {other}")
    if path.resolve() == Path(own.__file__).resolve():
        raise ValueError(f"bench: OTHER must be another checkout than this one, got {other}")
    name = f"other.{own.__name__.rpartition('.')[2]}"  # by its full name pybind11 would find the module that is loaded
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@contextmanager
def _switch(modules: dict[str, ModuleType]) -> Iterator[Callable[[str], None]]:
    """Within the context, ops run the kernels of the module that was last chosen by calling the yielded function."""
    chosen = [modules["this"]]
    before = _native.kernel

    def kernel(op: str, name: str, device: torch.device) -> Callable[[dict[str, Any]], None]:
        launch = getattr(chosen[0], name)
        return launch if device.type == "cpu" else functools.partial(_native._on_current_stream, launch, device)

    def use(build: str) -> None:
        chosen[0] = modules[build]

    _native.kernel = kernel  # type: ignore[assignment]
    try:
        yield use
    finally:
        _native.kernel = before
