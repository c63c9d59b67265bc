"""Guaranteed accuracy of the gated delta rule's CUDA kernels in bfloat16, on the hardest keys for a chunk form."""

import itertools

import pytest
import torch
from compare import assert_within_guarantee
from recurrence_suite import Shape, cotangents, gradients, in_double, make_inputs
from test_cuda_gated_delta_bwd import results

from hypenet_kernels import chunk_gated_delta_rule, reference

BETAS = (1.0, "up to 1", 2.0, "up to 2")
# Without positive keys with a large beta: o is then a small difference of products with the rounded P.
HARD = [*itertools.product(("random", "identical", "periodic"), BETAS), ("positive", "up to 1")]


def hard_inputs(T, keys, beta, decay, K=64, V=64):
    """Return inputs with log decay `decay`. beta: a number, or "up to ..." for random ones up to that number."""
    inputs = make_inputs(Shape(1, T, 1, 2, K, V), True, torch.bfloat16)
    if keys == "positive":
        for name in "qk":
            positive = torch.nn.functional.normalize(torch.rand(inputs[name].shape), dim=-1)
            inputs[name] = positive.bfloat16()
        inputs["v"] = torch.rand(inputs["v"].shape).bfloat16()
    elif keys != "random":
        period = 1 if keys == "identical" else 4
        inputs["k"] = inputs["k"][:, :period].repeat(1, T, 1, 1)[:, :T]
    inputs["g"].fill_(decay)
    if isinstance(beta, str):
        inputs["beta"].mul_(float(beta.removeprefix("up to ")))
    else:
        inputs["beta"].fill_(beta)
    return inputs


def check(device, inputs, but=()):
    do, dfinal_state = cotangents(inputs)
    exact = gradients(reference.chunk_gated_delta_rule, in_double(inputs), do.double(), dfinal_state.double())
    for name, x in results(device, inputs, do, dfinal_state).items():
        if name not in but:
            assert_within_guarantee(f"d{name}", x, exact[name])
    on_device = {name: x.to(device) for name, x in inputs.items()}
    found = chunk_gated_delta_rule(**on_device, output_final_state=True)
    expected = reference.chunk_gated_delta_rule(**in_double(inputs), output_final_state=True)
    for name, x, y in zip(("o", "final_state"), found, expected, strict=True):
        assert_within_guarantee(name, x.cpu(), y)


@pytest.mark.parametrize("keys, beta", HARD)
def test_nothing_decays(device, keys, beta):
    check(device, hard_inputs(135, keys, beta, 0.0))


@pytest.mark.parametrize("decay", [-1e-4, -5.0, -21.0, -50.0])
@pytest.mark.parametrize("keys, beta", [("identical", 1.0), ("periodic", 2.0)])
def test_decay(device, keys, beta, decay):
    vanishing = ("g", "initial_state") if decay < -1 else ()
    check(device, hard_inputs(135, keys, beta, decay), but=vanishing)


@pytest.mark.parametrize("keys, beta", [("identical", "up to 1"), ("identical", "up to 2"), ("periodic", 2.0)])
def test_several_tiles_of_the_widest_keys(device, keys, beta):
    check(device, hard_inputs(135, keys, beta, 0.0, K=256, V=128))


@pytest.mark.parametrize("T", [15, 16, 17, 63, 64, 65, 127])
def test_lengths(device, T):
    check(device, hard_inputs(T, "identical", "up to 2", 0.0))


@pytest.mark.parametrize("keys, beta", [("random", 2.0), ("periodic", "up to 1")])
def test_many_chunks(device, keys, beta):
    check(device, hard_inputs(512, keys, beta, 0.0))
