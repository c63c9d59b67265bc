"""cu_seqlens on a GPU, whose values the host does not read: whatever they are, no kernel leaves its tensors.

On the emulator every access is checked.
"""

import contextlib

import pytest
import torch
from recurrence_suite import Shape, cotangents, make_inputs

from hypenet_kernels import (
    _checks,
    _recurrence_cuda,
    causal_conv1d_fn,
    chunk_gated_delta_rule,
    chunk_simple_gla,
    hype_attention,
)

T, HUGE = 150, 2**62
RISING = {  # hostile bounds -> the legal ones as which they count
    (-70, 64, 1000): (0, 64, T),
    (70, 90, HUGE): (70, 90, T),
    (-HUGE, -5, 0, 149): (0, 0, 0, 149),
    (HUGE, HUGE, HUGE): (T, T, T),
}
FALLING = {
    (0, 100, 20, T): (0, 100, 100, T),
    (HUGE, -HUGE, 5): (T, T, T),
    (0, T, 0, T, 0, T): (0, T, T, T, T, T),
    (140, 3, 149, 20): (140, 140, 149, 149),
}


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    monkeypatch.setattr(_checks, "cu_seqlens", lambda *_, **__: None)


def gradients(op, device, inputs, given, bounds, **options):
    """Return the results of an op and the gradients of all inputs."""
    leaves = {name: x.to(device).requires_grad_() for name, x in inputs.items()}
    results = op(**leaves, cu_seqlens=torch.tensor(bounds, device=device), **options)
    results = results if isinstance(results, tuple) else (results,)
    found = torch.autograd.grad(results, list(leaves.values()), [x.to(device) for x in given])
    return [x.detach().cpu() for x in (*results, *found)]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("op", [chunk_gated_delta_rule, chunk_simple_gla])
@pytest.mark.parametrize("hostile", RISING | FALLING, ids=str)
def test_recurrences_raise_and_limit_them(device, monkeypatch, op, hostile, split):
    monkeypatch.setattr(_recurrence_cuda, "MIN_SEGMENT", 1)  # segments of one chunk
    delta, legal = op is chunk_gated_delta_rule, (RISING | FALLING)[hostile]
    inputs = make_inputs(Shape(1, T, 1, 1, 64, 64), delta, torch.bfloat16, N=len(hostile) - 1)
    do, dfinal_state = cotangents(inputs)
    options = {"output_final_state": True, "split_sequence": split}
    found, expected = (
        gradients(op, device, inputs, (do, dfinal_state), bounds, **options) for bounds in (hostile, legal)
    )
    covered = slice(legal[0], T)  # rows before the first sequence are not written
    for x, y in zip(found, expected, strict=True):
        rows = x.shape[1] == T
        assert (x[:, covered] if rows else x).equal(y[:, covered] if rows else y)


@contextlib.contextmanager
def race_of_sequences():
    """Allow what the emulator says if sequences overlap; that they leave their tensors it would say first."""
    try:
        yield
    except RuntimeError as error:
        if "race: another block of the launch wrote it" not in str(error):
            raise


@pytest.mark.parametrize("hostile", RISING | FALLING, ids=str)
def test_attention(device, hostile):
    inputs = {name: torch.randn(1, T, heads, 64).bfloat16() for name, heads in (("q", 2), ("k", 1), ("v", 1))}
    inputs["gate"], given = torch.randn(1, T, 2, 64).bfloat16(), [torch.randn(1, T, 2, 64).bfloat16()]
    with contextlib.nullcontext() if hostile in RISING else race_of_sequences():
        found = gradients(hype_attention, device, inputs, given, hostile, logit_scale_base=100.0)
    if hostile in RISING:
        legal = RISING[hostile]
        expected = gradients(hype_attention, device, inputs, given, legal, logit_scale_base=100.0)
        assert all(x[:, legal[0] :].equal(y[:, legal[0] :]) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("offsets", [(-5, HUGE, 3), (300, -HUGE, 200), (60, 61, 62)], ids=str)
@pytest.mark.parametrize("hostile", [(0, 64, 100, T), (-70, 64, 1000, HUGE)], ids=str)
def test_attention_that_continues_caches(device, monkeypatch, hostile, offsets):
    """Each access is checked; offsets that fit give what they should."""
    monkeypatch.setattr(_checks, "has_values", lambda x: False)
    q, k, v = (torch.randn(*size, 64).bfloat16() for size in ((1, T, 2), (3, 120, 1), (3, 120, 1)))
    q, k, v = q.to(device), k.to(device), v.to(device)
    o = hype_attention(
        q, k, v, cu_seqlens=torch.tensor(hostile).to(device), query_offset=torch.tensor(offsets).to(device)
    )
    if hostile[0] == 0 and offsets[1] == 61:
        expected = hype_attention(q[:, 64:100], k[1:2, :97], v[1:2, :97], query_offset=61)
        assert o[:, 64:100].equal(expected)


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("hostile", RISING | FALLING, ids=str)
def test_convolution(device, hostile, width):
    inputs = {"x": torch.randn(1, 16, T).bfloat16(), "weight": torch.randn(16, width)}
    given = [torch.randn(1, 16, T).bfloat16()]
    found = gradients(causal_conv1d_fn, device, inputs, given, hostile)
    if hostile in RISING:
        expected = gradients(causal_conv1d_fn, device, inputs, given, RISING[hostile])
        assert all(x.equal(y) for x, y in zip(found, expected, strict=True))
