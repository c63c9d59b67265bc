"""float16 on the CPU: elements are widened and rounded as IEEE 754 has it, at every level of the instruction set."""

import os
import subprocess
import sys

import pytest
import torch
from test_report import AVAILABLE

from hypenet_kernels import chunk_simple_gla, fused_recurrent_simple_gla, hype_attention


def hostile_floats():
    """float32 [256, 320]: every float16, the values around it and halfway to its neighbours, and random bits."""
    half = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.float16).float()
    ties = (half + half.roll(-1)) / 2
    near = [torch.nextafter(x, torch.full_like(x, side)) for x in (half, ties) for side in (-torch.inf, torch.inf)]
    random = torch.randint(-(2**31), 2**31, (1 << 16,)).to(torch.int32).view(torch.float32)
    limits = torch.tensor([65504.0, 65519.99, 65520.0, 65536.0, 3e38, 2**-24, 2**-25, 1.001 * 2**-25, 1e-45, 0.0])
    return torch.cat([half, ties, *near, random, limits, -limits]).view(-1, 1)[: 7 << 16].view(-1, 256)


def assert_equal_bits(x, y):
    """Zeros of either sign, and all NaNs, are equal: the ops add the values to 0."""
    assert torch.equal(x.isnan(), y.isnan())
    known = ~x.isnan()
    assert torch.equal((x[known] + 0.0).view(torch.int16), (y[known] + 0.0).view(torch.int16))


def test_every_value_is_widened_and_rounded_back():
    """A single key has weight one: its value is the output."""
    v = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.float16).view(256, 1, 1, 256)
    q, k = torch.randn(2, 256, 1, 1, 256).half()
    assert_equal_bits(hype_attention(q, k, v), v)


@pytest.mark.parametrize("op", [fused_recurrent_simple_gla, chunk_simple_gla])
def test_outputs_are_rounded_to_nearest_even(op):
    """With v = 0 and q = 1 the output is the float32 state."""
    state = hostile_floats()
    state = state[state.isfinite().all(1)] if op is chunk_simple_gla else state  # there 0 * infinity is added
    B, V = state.shape
    q, k, v = (torch.full((B, 1, 1, width), value).half() for width, value in ((1, 1.0), (1, 0.0), (V, 0.0)))
    g = torch.zeros(B, 1, 1)
    o, _ = op(q, k, v, g, scale=1.0, initial_state=state.view(B, 1, 1, V), output_final_state=True)
    assert B > 500
    assert_equal_bits(o.view(B, V), state.half())


@pytest.mark.parametrize("capability", AVAILABLE[:-1] or AVAILABLE)
def test_lower_levels_too(capability):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", "not lower_levels"]
    ran = subprocess.run(command, env=os.environ | {"ATEN_CPU_CAPABILITY": capability}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
