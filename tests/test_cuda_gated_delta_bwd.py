"""The CUDA backward of the chunked recurrences against the reference, on the emulator or a GPU (-m cuda)."""

import math
from itertools import pairwise

import emulation
import pytest
import torch
from compare import assert_accurate_as_hi_lo, assert_matches_reference
from recurrence_suite import Shape, bounds, cotangents, gradients, in_double, make_inputs, raise_some_betas

from hypenet_kernels import chunk_gated_delta_rule, chunk_simple_gla, reference

BF16, FP16 = torch.bfloat16, torch.float16
SHAPES = {
    "one token": (Shape(1, 1, 1, 1, 64, 64), BF16),
    "one short of a chunk": (Shape(1, 63, 1, 1, 128, 64), FP16),
    "a chunk": (Shape(1, 64, 1, 1, 64, 64), BF16),
    "one more": (Shape(1, 65, 1, 1, 64, 64), FP16),
    "two chunks and 7, value heads in groups": (Shape(1, 135, 1, 3, 128, 64), BF16),
    "several batch rows, heads and tiles of V": (Shape(2, 71, 2, 4, 64, 128), BF16),
    "head dimensions that are padded": (Shape(1, 70, 1, 1, 40, 100), FP16),
    "the widest K, in two parts": (Shape(1, 135, 1, 2, 256, 64), BF16),
    "padded to it": (Shape(2, 65, 1, 1, 160, 128), FP16),
}
ORDINARY = Shape(1, 135, 1, 2, 64, 64)
both = pytest.mark.parametrize("delta", [True, False], ids=["delta", "gla"])


def results(device, inputs, do, dfinal_state, **options):
    """Return the kernels' gradients by input name; with dfinal_state = None, those of <o, do> alone."""
    op = chunk_gated_delta_rule if "beta" in inputs else chunk_simple_gla
    leaves = {name: x.detach().to(device).requires_grad_() for name, x in inputs.items()}
    options = {name: x.to(device) for name, x in options.items()}
    outputs = op(**leaves, output_final_state=True, **options)
    given = [dx.to(device) for dx in (do.to(inputs["q"]), dfinal_state) if dx is not None]
    values = torch.autograd.grad(outputs[: len(given)], list(leaves.values()), given)
    return {name: x.cpu() for name, x in zip(inputs, values, strict=True)}


def expected(inputs, do, dfinal_state, **options):
    op = reference.chunk_gated_delta_rule if "beta" in inputs else reference.chunk_simple_gla
    return gradients(op, inputs, do, dfinal_state, **options)


def check(device, inputs, eager=False, size=1.0, negligible=(), **options):
    """Compare all gradients; eager: bound by autograd through the reference in the kernel's dtype, else by rounding."""
    dtype, (do, dfinal_state) = inputs["q"].dtype, cotangents(inputs, size)
    found = results(device, inputs, do, dfinal_state, **options)
    exact = expected(in_double(inputs), do.double(), dfinal_state.double(), **options)
    low = expected({n: x.to(dtype) for n, x in inputs.items()}, do, dfinal_state) if eager else exact
    for name, x in found.items():
        if name in negligible:
            assert x.abs().max() < 1e-15 and exact[name].abs().max() < 1e-15
        else:
            assert_matches_reference(f"d{name}", x, exact[name], eager=low[name].to(dtype), dtype=dtype)


@both
@pytest.mark.parametrize("name", SHAPES)
def test_every_gradient(device, name, delta):
    shape, dtype = SHAPES[name]
    check(device, make_inputs(shape, delta, dtype))


@both
@pytest.mark.parametrize("kind", ["none", "strong", "lowest", "reset"])
def test_decay(device, kind, delta):
    negligible = ("g", "initial_state") if kind in ("lowest", "reset") else ()
    check(device, make_inputs(ORDINARY, delta, BF16, kind), size=1e3, negligible=negligible)


@both
def test_decay_below_the_lowest_has_no_gradient_and_no_nan(device, delta):
    inputs = make_inputs(ORDINARY, delta, BF16, "mixture")
    found = results(device, inputs, *cotangents(inputs))
    assert all(x.isfinite().all() for x in found.values())
    assert (found["g"][inputs["g"] < -50] == 0).all() and (found["g"][inputs["g"] > -1] != 0).any()


@pytest.mark.parametrize("beta", [1.0, 2.0])
@pytest.mark.parametrize("period", [1, 4])
def test_keys_that_repeat(device, period, beta):
    inputs = make_inputs(ORDINARY, True, FP16)  # bfloat16: test_cuda_accuracy.py
    inputs["k"] = inputs["k"][:, :period].repeat(1, ORDINARY.T, 1, 1)[:, : ORDINARY.T]
    inputs["beta"].fill_(beta)
    check(device, inputs, eager=True)


@pytest.mark.parametrize("K, V", [(64, 192), (256, 128)])
def test_chunks_with_and_without_beta_above_one(device, K, V):
    """Among the value heads of a group and their tiles of V, some have low parts of dB and some do not."""
    inputs = make_inputs(Shape(1, 200, 1, 2, K, V), True, BF16)
    raise_some_betas(inputs["beta"])
    check(device, inputs)


@pytest.mark.parametrize("K", [64, 256])
def test_gradient_through_states_with_beta_above_one(device, K):
    """Every factor between the final and the initial state's gradient is a hi/lo split."""
    inputs = make_inputs(Shape(1, 135, 1, 2, K, 64), True, BF16, "none")
    inputs["beta"] *= 2
    do, dfinal_state = cotangents(inputs)
    do.zero_()
    exact = expected(in_double(inputs), do.double(), dfinal_state.double())["initial_state"]
    assert_accurate_as_hi_lo("dinitial_state", results(device, inputs, do, dfinal_state)["initial_state"], exact, BF16)


def test_gradient_of_beta_above_one(device):
    """With a zero state before the chunk and a gradient of the final state only, all factors are hi/lo splits."""
    inputs = make_inputs(Shape(1, 64, 1, 2, 64, 192), True, BF16)
    inputs["beta"] *= 2
    inputs["initial_state"].zero_()
    do, dfinal_state = cotangents(inputs)
    do.zero_()
    exact = expected(in_double(inputs), do.double(), dfinal_state.double())["beta"]
    assert_accurate_as_hi_lo("dbeta", results(device, inputs, do, dfinal_state)["beta"], exact, BF16)


def test_values_that_the_state_predicts(device):
    inputs = make_inputs(ORDINARY, True, FP16)
    inputs["v"] = (30 * inputs["k"].float() @ torch.randn(64, 64)).to(FP16).expand(inputs["v"].shape)
    check(device, inputs)


def test_beta_of_zero_writes_nothing(device):
    inputs = make_inputs(ORDINARY, True, BF16)
    inputs["beta"].zero_()
    found = results(device, inputs, *cotangents(inputs))
    assert (found["v"] == 0).all() and (found["beta"] != 0).all()


@both
@pytest.mark.parametrize("K", [64, 256])
def test_packed_sequences_are_each_alone(device, K, delta):
    lengths = (5, 0, 64, 1, 65, 0)
    inputs = make_inputs(Shape(1, sum(lengths), 1, 2, K, 64), delta, BF16, N=len(lengths))
    if delta:
        inputs["beta"][:, 5:69] *= 2  # above 1 in the third sequence only
    do, dfinal_state = cotangents(inputs)
    cu_seqlens = bounds(*lengths)
    found = results(device, inputs, do, dfinal_state, cu_seqlens=cu_seqlens)
    for n, (start, stop) in enumerate(pairwise(cu_seqlens)):
        alone = {name: x[:, start:stop] for name, x in inputs.items()}
        alone["initial_state"] = inputs["initial_state"][n : n + 1]
        found_alone = results(device, alone, do[:, start:stop], dfinal_state[n : n + 1])
        for name, x in found_alone.items():
            part = found[name][n : n + 1] if name == "initial_state" else found[name][:, start:stop]
            assert part.equal(x), name


@both
def test_any_strides_and_nothing_read_past_the_end(device, delta):
    s = ORDINARY
    contiguous = make_inputs(s, delta, BF16)
    do, dfinal_state = cotangents(contiguous)
    strided = dict(contiguous)
    for name, pad in (("q", 8), ("k", 3), ("v", 16)):  # one of them not aligned to 16 bytes
        x = contiguous[name]
        wide = x.new_full((s.B, s.T + 70, x.shape[2], x.shape[3] + pad), math.nan)
        strided[name] = wide[:, : s.T, :, pad:].copy_(x)
    strided["g"] = contiguous["g"].transpose(1, 2).contiguous().transpose(1, 2)
    strided_do = do.transpose(1, 2).contiguous().transpose(1, 2)
    same = results(device, strided, strided_do, dfinal_state)
    for name, x in results(device, contiguous, do, dfinal_state).items():
        assert same[name].equal(x), name


def test_without_gradient_of_the_final_state(device):
    inputs = make_inputs(ORDINARY, True, BF16)
    do, dfinal_state = cotangents(inputs)
    zero = results(device, inputs, do, torch.zeros_like(dfinal_state))
    assert all(zero[name].equal(x) for name, x in results(device, inputs, do, None).items())


@both
def test_bitwise_the_same_in_any_order_of_threads(delta):
    inputs = make_inputs(Shape(1, 100, 1, 2, 128, 128), delta, BF16)
    do, dfinal_state = cotangents(inputs)
    runs = []
    for seed in emulation.SEEDS:
        with emulation.emulated(seed):
            runs.append(results("cpu", inputs, do, dfinal_state))
    assert all(runs[0][name].equal(x) for run in runs[1:] for name, x in run.items())


@pytest.mark.parametrize("B, T", [(0, 5), (2, 0)])
def test_empty_problems(device, B, T):
    inputs = make_inputs(Shape(B, T, 1, 2, 64, 64), True, BF16)
    do, dfinal_state = cotangents(inputs)
    found = results(device, inputs, do, dfinal_state)
    assert all(found[name].shape == x.shape for name, x in inputs.items())
    assert found["initial_state"].equal(dfinal_state)
