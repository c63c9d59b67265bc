"""How long a callable takes: median and quartiles, ours and peers in turns, so that a slow minute hits all alike."""

import statistics
import time
from dataclasses import dataclass

import torch

MIN_ROUNDS, MAX_ROUNDS = 7, 200
SHORTEST_SAMPLE = 2e-4  # seconds; shorter calls are timed several at once
GRAPH_BELOW_MS = 0.05  # on CUDA: below it a launch costs as much as the kernel


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
        return {name: _on_cuda(function) for name, function in functions.items()}
    return _on_cpu(functions, seconds)


def _on_cpu(functions, seconds):
    calls = {name: _calls_persample(function) for name, function in functions.items()}
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


def _calls_persample(function):
    function()  # the first call allocates and compiles
    return max(1, round(SHORTEST_SAMPLE / (1e-3 * sample(function, 1) + 1e-9)))


def summary(samples):
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, low, high, len(samples))


def _on_cuda(function):
    """Kernel time with a cold L2; short work replayed as a CUDA graph, beside its latency as a call."""
    from triton.testing import do_bench, do_bench_cudagraph

    quantiles = [0.5, 0.25, 0.75]
    median, low, high = do_bench(function, warmup=50, rep=200, quantiles=quantiles)
    if median >= GRAPH_BELOW_MS:
        return Timing(median, low, high, MIN_ROUNDS, median)
    latency = median
    median, low, high = do_bench_cudagraph(function, rep=50, quantiles=quantiles)
    return Timing(median, low, high, MIN_ROUNDS, latency)
