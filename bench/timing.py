"""How long a callable takes: median and quartiles, ours and peers in turns, so that a slow minute hits all alike."""

import ctypes
import functools
import statistics
import time
from dataclasses import dataclass, replace

import torch

MIN_ROUNDS, MAX_ROUNDS = 7, 200
SHORTEST_SAMPLE = 2e-4  # seconds; shorter calls are timed several at once
GRAPH_BELOW_MS = 0.05  # on CUDA: below it a launch costs as much as the kernel
GRAPH_MS = 1.0  # of calls in one graph: what they rotate through is then larger than the L2
FLUSHED_BYTES = 256 * 2**20
MALLOPT = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_TOP_PAD": (-2, 2**28)}  # glibc's <malloc.h>


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: median and quartiles over `rounds` samples. `latency`: what a caller waits, on CUDA."""

    median: float
    low: float
    high: float
    rounds: int
    latency: float | None = None


def measure(functions, device, seconds):
    """name -> Timing of every callable, in `seconds` for all together."""
    if torch.device(device).type == "cuda":
        return {name: _on_cuda(function, seconds / len(functions)) for name, function in functions.items()}
    return _on_cpu(functions, seconds)


@functools.cache
def keep_buffers():
    """Makes glibc keep freed memory, as torch does on CUDA: else large outputs, ours and peers', cost more time in page
    faults than in arithmetic. Elsewhere nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for parameter, value in MALLOPT.values() if mallopt else ():
        mallopt(parameter, value)


def _on_cpu(functions, seconds):
    keep_buffers()
    calls = {name: _calls_per_sample(function) for name, function in functions.items()}
    samples = {name: [] for name in functions}
    started = time.perf_counter()
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() - started > seconds:
            break
        for name, function in functions.items():
            samples[name].append(sample(function, calls[name]))
    return {name: summary(taken) for name, taken in samples.items()}


def sample(function, calls):
    started = time.perf_counter()
    for _ in range(calls):
        function()
    return 1e3 * (time.perf_counter() - started) / calls


def _calls_per_sample(function):
    function()  # the first call allocates and compiles
    return max(1, round(SHORTEST_SAMPLE / (1e-3 * sample(function, 1) + 1e-9)))


def summary(samples):
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, low, high, len(samples))


def _on_cuda(function, seconds):
    """Kernel time from a cold L2, and what a caller waits; work shorter than a launch is replayed as a graph."""
    for _ in range(3):
        function()
    flush = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda")
    latency = statistics.median(_waited_ms(function) for _ in range(5))
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, round(1e3 * seconds / (latency + 0.1))))
    taken = summary(_event_ms(function, flush, rounds))
    if taken.median < GRAPH_BELOW_MS:
        calls = max(1, round(GRAPH_MS / taken.median))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                function()
        taken = summary([ms / calls for ms in _event_ms(graph.replay, flush, MIN_ROUNDS)])
        latency = statistics.median(_waited_ms(function) for _ in range(MIN_ROUNDS))
    return replace(taken, latency=latency)


def _event_ms(function, flush, rounds):
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in pairs:
        flush.zero_()  # empties the L2, and keeps the GPU busy while the call is prepared
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def _waited_ms(function):
    torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)
