"""Time callables: median and quartiles.

On the CPU, ours and the peers are interleaved, so that a slow minute of the machine affects all of them alike.
"""

import ctypes
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch

from bench import gpu_state
from bench.gpu_state import State
from bench.records import Times, one_line

MIN_ROUNDS, MAX_ROUNDS = 7, 200
SHORTEST_SAMPLE = 2e-4  # seconds; shorter calls are timed several at once
GRAPH_BELOW_MS = 1.0  # on CUDA: shorter calls are replayed from a graph, if they can be captured
HOLD = 1.5  # times the host's time for a call: for so long the GPU is kept busy before a timed call begins
GRAPH_MS = 1.0  # of calls per CUDA graph: the copies that a case rotates through then exceed the L2
GRAPH_ROUNDS = 50
FLUSH_BYTES = 256 * 2**20  # at least twice the L2 of any GPU
MALLOPT = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_TOP_PAD": (-2, 2**28)}  # glibc's <malloc.h>

Function = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call: median and quartiles over `rounds` samples.

    On CUDA, `latency` is the time until the caller has the result, `note` says why a short call could not be captured
    in a graph, so that its time includes the gaps between its launches, and `gpu` is the GPU's state while it was timed
    (gpu_state.State).
    """

    median: float
    low: float
    high: float
    rounds: int
    latency: float | None = None
    note: str | None = None
    gpu: State | None = None

    def asdict(self) -> Times:
        return cast(Times, asdict(self))


def measure(functions: Mapping[str, Function], device: str | torch.device, seconds: float) -> dict[str, Timing]:
    """Time every function, in `seconds` for all of them together."""
    if torch.device(device).type == "cuda":
        return {name: _on_cuda(function, seconds / len(functions)) for name, function in functions.items()}
    return _on_cpu(functions, seconds)


@functools.cache
def keep_buffers() -> None:
    """Make glibc keep freed memory, as torch's allocator does on CUDA; does nothing with another C library.

    Otherwise page faults in large outputs, ours and the peers', cost more time than the arithmetic.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in MALLOPT.values():
            mallopt(parameter, value)


def _on_cpu(functions: Mapping[str, Function], seconds: float) -> dict[str, Timing]:
    keep_buffers()
    calls = {name: _calls_per_sample(function) for name, function in functions.items()}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    started = time.perf_counter()
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() - started > seconds:
            break
        for name, function in functions.items():
            samples[name].append(sample(function, calls[name]))
    return {name: summary(taken) for name, taken in samples.items()}


def sample(function: Function, calls: int) -> float:
    """Return the mean milliseconds of `calls` calls."""
    started = time.perf_counter()
    for _ in range(calls):
        function()
    return 1e3 * (time.perf_counter() - started) / calls


def _calls_per_sample(function: Function) -> int:
    function()  # the first call allocates and compiles
    return max(1, round(SHORTEST_SAMPLE / (1e-3 * sample(function, 1) + 1e-9)))


def summary(samples: list[float]) -> Timing:
    """Return median and quartiles of samples in milliseconds."""
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, low, high, len(samples))


def _on_cuda(function: Function, seconds: float) -> Timing:
    """Time a kernel from a cold L2, and its latency; replay short calls from a CUDA graph if they can be captured."""
    for _ in range(3):
        function()
    latency = statistics.median(_latency_ms(function) for _ in range(5))
    host = statistics.median(_host_ms(function) for _ in range(5))
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, round(1e3 * seconds / (latency + HOLD * host + 0.1))))
    samples, state = _event_ms(function, rounds, HOLD * host)
    taken = replace(summary(samples), latency=latency, gpu=state)
    return taken if taken.median >= GRAPH_BELOW_MS else _replayed(function, taken)


def _replayed(function: Function, taken: Timing) -> Timing:
    """Time calls in a CUDA graph; return `taken`, with a note, if the function cannot be captured."""
    calls = max(1, round(GRAPH_MS / taken.median))
    try:
        graph = _capture(function, calls)
    except Exception as caught:
        error: BaseException = caught
        while error.__context__ is not None:  # ending a failed capture raises a second error; report the first
            error = error.__context__
        _latency_ms(function)  # raises if the failed capture left the device in an error state
        return replace(taken, note=f"failed in capture: {one_line(error)}")
    samples, state = _event_ms(graph.replay, GRAPH_ROUNDS, HOLD * _host_ms(graph.replay))
    return replace(summary([ms / calls for ms in samples]), latency=taken.latency, gpu=state)


def _capture(function: Function, calls: int) -> torch.cuda.CUDAGraph:
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                function()
    finally:
        torch.cuda.set_stream(stream)  # after a failed capture, torch leaves its capture stream current
    return graph


def _event_ms(function: Function, rounds: int, hold_ms: float) -> tuple[list[float], State | None]:
    """Time calls with CUDA events, each after the L2 was flushed; also return the GPU's state meanwhile.

    The flush is a read: a write would leave dirty lines that the timed kernel has to write back. Then the GPU waits for
    `hold_ms`, in which the host prepares the call: otherwise the start event would pass before the first kernel is
    launched, and Python's time would be charged to the kernel, more to implementations with more Python.
    """
    flush = torch.ones(FLUSH_BYTES // 4, device="cuda")
    cycles = round(hold_ms * _cycles_per_ms())
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in pairs:
        flush.sum()
        torch.cuda._sleep(cycles)
        start.record()
        function()
        end.record()
    state = gpu_state.read()  # while the last calls run
    torch.cuda.synchronize()
    samples = [start.elapsed_time(end) for start, end in pairs]
    return samples, state


@functools.cache
def _cycles_per_ms() -> float:
    """Return how many of torch.cuda._sleep's cycles take a millisecond."""
    cycles, samples = 2_000_000, []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end))
    return cycles / min(samples)


def _host_ms(function: Function) -> float:
    """Return the milliseconds for which the call keeps the host, which then need not wait for the GPU."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    taken = time.perf_counter() - started
    torch.cuda.synchronize()
    return 1e3 * taken


def _latency_ms(function: Function) -> float:
    """Return the milliseconds from the call until the GPU is idle again."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)
