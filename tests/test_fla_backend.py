"""Our ops as a backend of flash-linear-attention, where fla-core is installed."""

import importlib.metadata
import importlib.util

import pytest
import torch
from compare import assert_matches_reference
from recurrence_suite import ORDINARY, forward, gradients, in_double, make_inputs

import hypenet_kernels
from hypenet_kernels import reference
from hypenet_kernels.integrations import register_fla_backend

needs_fla = pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="fla-core is not installed")


@pytest.fixture
def backend():
    with register_fla_backend() as registered:
        yield registered


@needs_fla
def test_functions_that_fla_dispatches(backend):
    assert backend.functions == ("chunk_gated_delta_rule", "fused_recurrent_simple_gla")


@needs_fla
@pytest.mark.filterwarnings("ignore")
def test_fla_runs_on_our_kernels(backend):
    """On CPU tensors, where fla has no kernels of its own; forward and every gradient."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.simple_gla import fused_recurrent_simple_gla

    for delta, theirs, ours, exact in (
        (True, chunk_gated_delta_rule, hypenet_kernels.chunk_gated_delta_rule, reference.chunk_gated_delta_rule),
        (False, fused_recurrent_simple_gla, hypenet_kernels.fused_recurrent_simple_gla, reference.chunk_simple_gla),
    ):
        inputs = make_inputs(ORDINARY, delta)
        for a, b in zip(forward(theirs, inputs), forward(ours, inputs), strict=True):
            assert a.equal(b)
        do, dstate = torch.randn_like(inputs["v"]), torch.randn_like(inputs["initial_state"])
        expected = gradients(exact, in_double(inputs), do.double(), dstate.double())
        for name, x in gradients(theirs, inputs, do, dstate).items():
            assert_matches_reference(f"d{name}", x, expected[name])


@needs_fla
@pytest.mark.filterwarnings("ignore")
def test_retention_and_lightning_lead_to_ours(backend):
    from fla.ops.lightning_attn import fused_recurrent_lightning_attn
    from fla.ops.retention import fused_recurrent_retention

    q, k, v = torch.randn(3, 1, 20, 4, 16)
    o, _ = fused_recurrent_retention(q, k, v, reverse=False)
    assert_matches_reference("o", o, hypenet_kernels.chunk_retention(q, k, v)[0].double())
    o, _ = fused_recurrent_lightning_attn(q, k, v, 1, 4)
    assert_matches_reference("o", o, hypenet_kernels.chunk_lightning_attn(q, k, v, 1, 4)[0].double())


@needs_fla
def test_the_verifier_takes_what_is_built(backend):
    from fla import backends

    ours = backends._operation_registries["gated_delta_rule"]._backends["hypenet"]
    q = torch.zeros(1, 4, 1, 8)
    assert ours.verify("chunk_gated_delta_rule", q, q, q, None, None) == (True, None)
    taken, why = ours.verify("chunk_gated_delta_rule", q, q, q, None, None, cp_context=object())
    assert not taken and "context parallelism" in why
    meta = q.to("meta")
    assert ours.verify("chunk_gated_delta_rule", meta, meta, meta, None, None) == (False, "no kernels for meta")


@needs_fla
def test_restored_registry_has_no_trace():
    from fla import backends

    registry = backends._operation_registries["gated_delta_rule"]
    before = dict(registry._backends)
    backend = register_fla_backend()
    assert set(registry._backends) - set(before) == {"hypenet"}
    backend.restore()
    backend.restore()
    assert registry._backends == before


def test_what_is_missing_or_too_old_is_one_line(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(
        ImportError, match=r'^register_fla_backend: needs fla-core; install with: pip install "fla-core'
    ):
        register_fla_backend()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.5.2")
    with pytest.raises(ImportError, match=r"^register_fla_backend: fla-core must be at least 0\.6, got 0\.5\.2"):
        register_fla_backend()
