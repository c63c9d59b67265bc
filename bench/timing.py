"""How long a callable takes: median and quartiles.

On the CPU ours and peers in turns, so that a slow minute hits all alike.
"""

import ctypes
import functools
import statistics
import time
from dataclasses import dataclass, replace

import torch

MIN_ROUNDS, MAX_ROUNDS = 7, 200
SHORTEST_SAMPLE = 2e-4  # seconds; shorter calls are timed several at once
GRAPH_BELOW_MS = 0.05  # on CUDA: below it a launch costs as much as the kernel
GRAPH_MS = 1.0  # of calls in one graph: what a case rotates through is then larger than the L2
GRAPH_ROUNDS = 50
FLUSH_BYTES = 256 * 2**20  # at least twice the L2 of any GPU
MALLOPT = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_TOP_PAD": (-2, 2**28)}  # glibc's <malloc.h>


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: median and quartiles over `rounds` samples.

    On CUDA `latency` is what a caller waits, and `note` says why a short call was timed with its launches after all.
    """

    median: float
    low: float
    high: float
    rounds: int
    latency: float | None = None
    note: str | None = None


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
    latency = statistics.median(_waited_ms(function) for _ in range(5))
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, round(1e3 * seconds / (latency + 0.1))))
    taken = replace(summary(_event_ms(function, rounds)), latency=latency)
    return taken if taken.median >= GRAPH_BELOW_MS else _replayed(function, taken)


def _replayed(function, taken):
    """The time in a graph; `taken`, with a note, where the function cannot be captured."""
    calls = max(1, round(GRAPH_MS / taken.median))
    try:
        graph = _capture(function, calls)
    except Exception as error:
        while error.__context__ is not None:  # the end of a capture that failed fails too
            error = error.__context__
        _waited_ms(function)  # raises where the failure left more behind
        return replace(taken, note=f"failed in capture: {one_line(error)}")
    replays = summary([ms / calls for ms in _event_ms(graph.replay, GRAPH_ROUNDS)])
    return replace(replays, latency=taken.latency)


def _capture(function, calls):
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                function()
    finally:
        torch.cuda.set_stream(stream)  # torch leaves its own stream in place where a capture fails to end
    return graph


def _event_ms(function, rounds):
    """Reading empties the L2: writing would leave lines that the timed kernel has to write back. It also keeps the GPU
    busy while the call is prepared."""
    flush = torch.ones(FLUSH_BYTES // 4, device="cuda")
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in pairs:
        flush.sum()
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


def one_line(error):
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
