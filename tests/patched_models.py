"""Tiny models of the families that patch_transformers reaches, and how its tests compare them."""

import functools
import importlib

import pytest
import torch
from compare import assert_matches_reference

import hypenet_kernels
from bench.family_models import FAMILIES, build

GATED_DELTA = ["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "qwen4_exp_text"]
MAMBA2 = ["bamba", "falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h", "zamba2"]
ONE_OF_EACH = ["qwen3_next", "bamba"]
CONVOLUTION_ONLY = ["lfm2", "lfm2_moe"]
FORMS = {
    "cu_seq_lens": {"return_flash_attn_kwargs": True},
    "seq_idx": {"return_seq_idx": True},
    "both": {"return_flash_attn_kwargs": True, "return_seq_idx": True},
    "position_ids": {},
    "cu_seq_lens alone": {"return_flash_attn_kwargs": True, "return_position_ids": False},
    "seq_idx alone": {"return_seq_idx": True, "return_position_ids": False},
}
every_family = pytest.mark.parametrize("family", FAMILIES)
families_slow_but_two = pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f in ONE_OF_EACH else pytest.mark.slow) for f in FAMILIES]
)
one_of_each = pytest.mark.parametrize("family", ONE_OF_EACH)


@functools.cache
def model_of(family):
    """Return a model in float32, built once, before any patch."""
    return build(family)


def tokens(*shape, seed=0):
    return torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(seed))


def module_of(model):
    return importlib.import_module(type(model).__module__)


def mixers(model):
    """Return the recurrent layers of a model: those that have a convolution and an A_log."""
    return [layer for layer in model.modules() if hasattr(layer, "conv1d") and hasattr(layer, "A_log")]


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def assert_same(name, result, expected):
    assert_matches_reference(name, result, expected.double(), dtype=torch.float32)


class Counted:
    """Count the calls of ops of hypenet_kernels."""

    def __init__(self, monkeypatch, *names):
        self.calls = {}
        for name in names:
            monkeypatch.setattr(hypenet_kernels, name, self._counting(name, getattr(hypenet_kernels, name)))

    def _counting(self, name, op):
        def counting(*args, **kwargs):
            self.calls.setdefault(name, []).append(kwargs)
            return op(*args, **kwargs)

        return counting


def cache_layers(out):
    cache = out.cache_params if "cache_params" in out else out.past_key_values
    layers = [layer for layer in cache.layers if hasattr(layer, "recurrent_states")]
    return [layer for layer in layers if layer.recurrent_states[0] is not None]


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
