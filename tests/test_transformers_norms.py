"""The norms that patch_transformers replaces compute what transformers' classes do, in one pass."""

import importlib

import pytest
import torch
from compare import rms

from hypenet_kernels.integrations import _norms, patch_transformers

CLASSES = [(family, name) for table in (_norms.CENTRED, _norms.PLAIN, _norms.GATED) for family, name in table.items()]


def class_of(family, name):
    return getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)


def inputs_for(name, dtype, D=48, seed=0):
    torch.manual_seed(seed)
    count = 2 if name.endswith("Gated") else 1
    return [torch.randn(2, 7, D).to(dtype).requires_grad_() for _ in range(count)]


def run(layer, inputs):
    """Return the output, and the gradients of inputs and weight."""
    y = layer(*inputs)
    torch.manual_seed(1)
    return [y, *torch.autograd.grad(y, [*inputs, layer.weight], torch.randn(y.shape).to(y.dtype))]


@pytest.fixture
def runs(monkeypatch):
    """The names of the ops that ran."""
    ran = []
    for name in ("rms_norm_rope", "rms_norm_gated"):
        op = getattr(_norms.hypenet_kernels, name)

        def recorded(*args, op=op, name=name, **kwargs):
            ran.append(name)
            return op(*args, **kwargs)

        monkeypatch.setattr(_norms.hypenet_kernels, name, recorded)
    return ran


def test_every_class_is_replaced():
    with patch_transformers() as patch:
        replaced = {module.rpartition(".")[2] for module, _, by in patch.replaced if by.startswith("rms_norm")}
    assert replaced == {name for _, name in CLASSES}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("family", "name"), CLASSES)
def test_norm_and_its_gradients(family, name, dtype, runs):
    layer = class_of(family, name)(48, eps=1e-3).double()
    torch.nn.init.normal_(layer.weight, std=0.5)
    layer.to(dtype)
    inputs = inputs_for(name, dtype)
    expected = run(layer, inputs)
    assert not runs
    with patch_transformers():
        found = run(layer, inputs)
    assert len(runs) == 1
    # transformers computes in float32 whatever the dtype, and most classes round to 16 bits twice.
    bound = 1e-6 if dtype in (torch.float32, torch.float64) else 3 * torch.finfo(dtype).eps
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert rms(ours.double() - theirs.double()) <= bound * rms(theirs.double())


def test_what_the_op_does_not_compute_is_left_to_transformers(runs):
    norm, gated = class_of("qwen4_exp", "Qwen4ExpTextRMSNorm"), class_of("qwen4_exp", "Qwen4ExpTextRMSNormGated")
    x, gate = inputs_for("Gated", torch.float32)
    cases = [
        (norm(48, group_size=16), (x,), {}),
        (norm(48), (), {"x": x}),
        (norm(48).to(torch.bfloat16), (x,), {}),
        (gated(48, activation="tanh"), (x, gate), {}),
        (gated(48), (x, gate.bfloat16()), {}),
        (gated(48).to(torch.bfloat16), (x, gate), {}),
    ]
    for layer, args, kwargs in cases:
        expected = layer(*args, **kwargs)
        with patch_transformers():
            found = layer(*args, **kwargs)
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    assert not runs
    with patch_transformers():
        assert torch.equal(gated(48, activation="sigmoid")(x, gate), gated(48, activation="sigmoid")(x, gate))
    assert runs == ["rms_norm_gated"] * 2


def test_a_transform_that_the_op_refuses_runs_in_transformers(caplog):
    layer, (x,) = class_of("olmo_hybrid", "OlmoHybridRMSNorm")(48), inputs_for("", torch.float32)
    expected = torch.func.vmap(layer)(x)
    with patch_transformers():
        assert torch.allclose(torch.func.vmap(layer)(x), expected)
    assert "OlmoHybridRMSNorm.forward" in caplog.text
