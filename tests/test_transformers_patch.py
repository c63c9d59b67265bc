"""patch_transformers: what it replaces, and that it puts everything back."""

import importlib
import logging
import subprocess
import sys

import pytest
from patched_models import (
    assert_same,
    logits,
    model_of,
    module_of,
    tokens,
)

from bench.family_models import build
from hypenet_kernels.integrations import patch_transformers

# ---- the patch itself


def current(patch):
    values = {}
    for module, name, _ in patch.replaced:
        path, _, last = module.rpartition(".")
        owner = getattr(importlib.import_module(path), last) if last[0].isupper() else importlib.import_module(module)
        values[module, name] = vars(owner)[name]
    return values


def test_restore_puts_every_original_back():
    with patch_transformers() as patch:
        replaced = current(patch)
    originals = current(patch)
    assert len(originals) == len(patch.replaced) > 70
    with patch_transformers() as again:
        assert all(value is not originals[place] for place, value in current(again).items())
        assert current(again).keys() == replaced.keys()
    assert all(value is originals[place] for place, value in current(again).items())
    again.restore()  # a second time does nothing
    assert all(value is originals[place] for place, value in current(again).items())


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_patches_nest_and_end_in_any_order(order):
    with patch_transformers() as patch:
        pass
    originals = current(patch)
    patches = [patch_transformers(mamba2=False), patch_transformers(), patch_transformers(causal_conv1d=False)]
    while_patched = current(patches[1])
    for index in order[:-1]:
        patches[index].restore()
    held = current(patches[order[-1]])
    assert all(value is while_patched[place] for place, value in held.items())
    patches[order[-1]].restore()
    assert all(value is originals[place] for place, value in current(patch).items())


def test_an_exception_restores():
    with patch_transformers() as patch:
        pass
    originals = current(patch)
    with pytest.raises(RuntimeError, match="mine"), patch_transformers():
        raise RuntimeError("mine")
    assert all(value is originals[place] for place, value in current(patch).items())


def test_a_patch_that_fails_leaves_nothing_behind(monkeypatch):
    with patch_transformers() as patch:
        pass
    originals = current(patch)
    monkeypatch.delattr("transformers.models.zamba2.modeling_zamba2.Zamba2Model")
    with pytest.raises(AttributeError):
        patch_transformers()
    monkeypatch.undo()
    assert all(value is originals[place] for place, value in current(patch).items())


def test_options_choose_what_is_replaced():
    for options, absent in (
        ({"gated_delta_rule": False}, {"torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"}),
        ({"mamba2": False}, {"mamba2_chunk_scan", "mamba2_selective_state_update"}),
        ({"causal_conv1d": False}, {"causal_conv1d_fn", "causal_conv1d_update", "mamba2_split_conv1d_scan_combined"}),
    ):
        with patch_transformers(**options) as patch:
            names = {name for _, name, _ in patch.replaced}
        assert names and not names & absent
    for options in ({"norms": False}, {"gated_delta_rule": False, "mamba2": False}):
        with patch_transformers(**options) as patch:
            assert not [by for _, _, by in patch.replaced if by.startswith("rms_norm")]


def test_it_says_once_what_it_replaced(caplog):
    with caplog.at_level(logging.INFO, "hypenet_kernels"), patch_transformers() as patch:
        said = caplog.text
        with patch_transformers():
            assert caplog.text == said
    lines = str(patch).splitlines()
    assert len(lines) == len(patch.replaced) + 1
    assert all(line in said for line in lines)
    row = "transformers.models.qwen3_next.modeling_qwen3_next", "torch_chunk_gated_delta_rule", "chunk_gated_delta_rule"
    assert row in patch.replaced


@pytest.mark.parametrize("family", ["qwen3_next", "bamba"])
def test_functions_of_other_packages_are_replaced_too(family, monkeypatch):
    """Where flash-linear-attention or mamba_ssm is installed, the globals lead to them."""
    model, module, ids = model_of(family), module_of(model_of(family)), tokens(2, 9)
    expected = logits(model, input_ids=ids)

    def must_not_run(*args, **kwargs):
        raise AssertionError("another package's function ran")

    names = [name for name in vars(module) if name.startswith(("torch_", "mamba2_", "causal_conv1d"))]
    for name in names:
        if callable(vars(module)[name]):
            monkeypatch.setattr(module, name, must_not_run)
    with patch_transformers():
        model.generate(ids, max_new_tokens=2, do_sample=False)
        assert_same("logits", logits(model, input_ids=ids), expected)
    assert all(vars(module)[name] is must_not_run for name in names if callable(vars(module)[name]))


def test_a_model_built_inside_works_outside():
    ids = tokens(2, 9)
    with patch_transformers():
        model = build("bamba")
        inside = logits(model, input_ids=ids)
    assert_same("logits", inside, logits(model, input_ids=ids))


def test_an_old_transformers_is_refused(monkeypatch):
    import transformers

    monkeypatch.setattr(transformers, "__version__", "5.15.1")
    with pytest.raises(ImportError, match=r"patch_transformers: transformers must be at least 5.16, got 5.15.1"):
        patch_transformers()


def test_hypenet_kernels_needs_no_transformers():
    program = """
import sys
sys.modules["transformers"] = None
import hypenet_kernels.integrations
try:
    hypenet_kernels.integrations.patch_transformers()
except ImportError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    line = 'patch_transformers: needs transformers; install with: pip install "transformers>=5.16"'
    assert run.stdout.strip() == line
