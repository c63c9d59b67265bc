"""Agreement with the float64 reference, the condition for timing an op, and between our op and a peer."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from bench import cases
from bench.records import one_line
from hypenet_kernels import reference

# Largest relative RMS difference: of a peer from our op, and of our op from the float64 reference.
AGREEMENT = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}


def check(case: cases.Case, device: str | torch.device) -> str | None:
    """Compare an op, or its gradients, with the float64 reference on the shrunk case.

    Returns:
        None if they agree, else one line that says what is wrong.
    """
    try:
        small = cases.shrunk(case)
        workload = cases.build(small, device)
        exact = {name: _double(value) for name, value in workload.tensors.items()}
        with _one_thread():
            expected = cases.runner(small, _reference(small.op, workload.options), exact, workload.names)()
        return difference(workload.run(), expected, small.dtype)
    except Exception as error:  # an op that raises is reported, and the other ops are still measured
        return one_line(error)


def difference(results: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], dtype: str) -> str | None:
    """Return None if all results are within AGREEMENT[dtype] of the expected ones, else the largest difference."""
    errors = [relative_error(result, other) for result, other in zip(results, expected, strict=True)]
    worst = max(errors, key=lambda error: float("inf") if error != error else error)
    return None if worst <= AGREEMENT[dtype] else f"relative difference {worst:.1e}, at most {AGREEMENT[dtype]:.0e}"


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Return RMS(result - expected) / RMS(expected)."""
    expected = expected.double()
    return ((result.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Run the reference on one thread: its products are too small to gain from several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _double(x: Any) -> Any:
    """Convert floating-point tensors, in nested lists too, to float64."""
    if not torch.is_tensor(x):
        return [_double(one) for one in x]
    return x.double() if x.is_floating_point() else x


def _reference(op: str, options: dict[str, Any]) -> cases.Forward:
    """Return the reference of an op as the `forward` of cases.runner."""

    def forward(t: cases.Tensors) -> tuple[torch.Tensor, ...]:
        if op == "hype_attention":
            return (reference.hype_attention(t["q"], t["k"], t["v"], gate=t.get("gate"), **options),)
        if op == "hype_attention_decode":
            k, v = t["caches"][0]
            return (reference.hype_attention(t["q"], k, v, query_offset=k.shape[1] - t["q"].shape[1]),)
        initial_state = t["states"][0] if "states" in t else None
        if "gla" in op:
            return reference.chunk_simple_gla(t["q"], t["k"], t["v"], t["g"], initial_state=initial_state)
        q, k, v, g, beta = (t[name] for name in ("q", "k", "v", "g", "beta"))
        return reference.chunk_gated_delta_rule(q, k, v, g, beta, initial_state=initial_state)

    return forward
