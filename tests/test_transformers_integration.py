"""patch_transformers: the models of every family compute the same as without it."""

import copy
import logging

import pytest
import torch
from compare import assert_matches_reference, rms
from patched_models import (
    GATED_DELTA,
    Counted,
    assert_same,
    cache_layers,
    every_family,
    families_slow_but_two,
    fresh_dynamo,  # noqa: F401, a fixture
    logits,
    mixers,
    model_of,
    module_of,
    one_of_each,
    tokens,
)

from bench.family_models import build
from hypenet_kernels.integrations import patch_transformers

# ---- the same numbers


@every_family
def test_logits(family, monkeypatch):
    model, ids = model_of(family), tokens(2, 37)
    expected = logits(model, input_ids=ids)
    op = "chunk_gated_delta_rule" if family in GATED_DELTA else "chunk_simple_gla"
    counted = Counted(monkeypatch, op, "causal_conv1d_fn")
    with patch_transformers():
        result = logits(model, input_ids=ids)
    assert_same("logits", result, expected)
    assert len(counted.calls[op]) == len(counted.calls["causal_conv1d_fn"]) == len(mixers(model))


@every_family
def test_gradients(family):
    model, ids = copy.deepcopy(model_of(family)).train(), tokens(2, 37)
    gradients = []
    for patched in (False, True):
        model.zero_grad()
        patch = patch_transformers() if patched else None
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if patch is not None:
            patch.restore()
        gradients.append({name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None})
    expected, result = gradients
    assert expected.keys() == result.keys()
    sizes = {name: rms(gradient) for name, gradient in expected.items()}
    assert all(size > 0 for name, size in sizes.items() if name.endswith(("A_log", "dt_bias", "conv1d.weight")))
    # One comparison for all: a gradient of a decay is a small difference of large terms in transformers' float32 too.
    for name, size in sizes.items():
        error = rms(result[name] - expected[name])
        assert error <= 2e-5 * size, f"{name}: RMS error {error:.1e} of a gradient of RMS {size:.1e}"


@every_family
def test_bfloat16_is_as_accurate_as_without(family):
    ids = tokens(2, 37)
    model = build(family)
    exact, narrow = logits(model, input_ids=ids).double(), model.to(torch.bfloat16)
    without = logits(narrow, input_ids=ids)
    with patch_transformers():
        result = logits(narrow, input_ids=ids)
    assert_matches_reference("logits", result, exact, eager=without, dtype=torch.bfloat16)


@one_of_each
def test_autocast(family):
    model, ids = model_of(family), tokens(2, 37)
    exact = logits(model, input_ids=ids).double()
    with torch.autocast("cpu", torch.bfloat16):
        without = logits(model, input_ids=ids)
        with patch_transformers():
            result = logits(model, input_ids=ids)
            assert generated(model).shape == (2, 21)
    assert_matches_reference("logits", result, exact, eager=without, dtype=torch.bfloat16)


@one_of_each
def test_chunked_prefill_continues_from_a_cache(family):
    model, ids = model_of(family), tokens(2, 40)
    expected = logits(model, input_ids=ids, use_cache=False)
    with patch_transformers(), torch.no_grad():
        first = model(input_ids=ids[:, :23], use_cache=True)
        second = model(
            input_ids=ids[:, 23:39],
            position_ids=torch.arange(23, 39)[None],
            past_key_values=first.past_key_values,
            use_cache=True,
        )
        third = model(
            input_ids=ids[:, 39:],
            position_ids=torch.tensor([[39]]),
            past_key_values=second.past_key_values,
            use_cache=True,
        )
    assert_same("logits", torch.cat([out.logits for out in (first, second, third)], 1), expected)


# ---- generation


def generated(model, batch=2, length=13, padding=5, new=8, **options):
    ids = tokens(batch, length)
    mask = torch.ones_like(ids)
    ids[0, :padding], mask[0, :padding] = 0, 0
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, **options)


@families_slow_but_two
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generation(family, options):
    model = model_of(family)
    expected = generated(model, **options)
    with patch_transformers():
        assert torch.equal(generated(model, **options), expected)


@families_slow_but_two
def test_generation_with_a_static_cache(family):
    model = model_of(family)
    options = {"cache_implementation": "static", "disable_compile": True}
    expected = generated(model, **options)
    with patch_transformers():
        assert torch.equal(generated(model, **options), expected)


@families_slow_but_two
def test_generation_continues_a_cache_of_the_other_kind(family):
    """A cache that transformers filled is taken over by ours, and the other way round."""
    model, ids = model_of(family), tokens(2, 13)
    cache_name = "cache_params" if family == "mamba2" else "past_key_values"

    def steps(prefill_patched, decode_patched):
        with torch.no_grad():
            patch = patch_transformers() if prefill_patched else None
            out = model(input_ids=ids[:, :8], use_cache=True)
            if patch is not None:
                patch.restore()
            patch, result = patch_transformers() if decode_patched else None, []
            for position in range(8, 13):
                cache = {cache_name: out[cache_name]}
                if family != "mamba2":
                    cache["position_ids"] = torch.full((2, 1), position)
                out = model(input_ids=ids[:, position : position + 1], use_cache=True, **cache)
                result.append(out.logits)
            if patch is not None:
                patch.restore()
        return torch.cat(result, 1)

    expected = steps(False, False)
    for prefill_patched, decode_patched in ((True, True), (True, False), (False, True)):
        assert_same("logits", steps(prefill_patched, decode_patched), expected)


# ---- decoding in place


@every_family
def test_a_step_updates_the_state_of_the_cache_itself(family, monkeypatch):
    model, ids = model_of(family), tokens(2, 9)
    op = "gated_delta_step" if family in GATED_DELTA else "simple_gla_step"
    with patch_transformers(), torch.no_grad():
        out = model(input_ids=ids[:, :8], use_cache=True)
        layers = cache_layers(out)
        addresses = [layer.recurrent_states[0].data_ptr() for layer in layers]
        counted = Counted(monkeypatch, op)
        cache = {"cache_params": out.cache_params} if family == "mamba2" else {"past_key_values": out.past_key_values}
        model(input_ids=ids[:, 8:], use_cache=True, **cache)
    assert len(layers) == len(mixers(model))
    assert [call["state"].data_ptr() for call in counted.calls[op]] == addresses
    assert [layer.recurrent_states[0].data_ptr() for layer in layers] == addresses


def delta_rule_step(module, state, **changes):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 1, 2, 16, generator=generator) for _ in range(2))
    v = torch.randn(2, 1, 4, 16, generator=generator)
    g, beta = -torch.rand(2, 1, 4, generator=generator), torch.rand(2, 1, 4, generator=generator)
    inputs = {"q": q, "k": k, "v": v, "g": g, "beta": beta} | changes
    return module.torch_recurrent_gated_delta_rule(
        *(inputs[name] for name in ("q", "k", "v")),
        g=inputs["g"],
        beta=inputs["beta"],
        initial_state=state,
        output_final_state=changes.get("output_final_state", True),
        use_qk_l2norm_in_kernel=True,
    )


STATES = {
    "wanted gradient": lambda state: state.clone().requires_grad_(),
    "transposed": lambda state: state.transpose(-1, -2).contiguous().transpose(-1, -2),
    "bfloat16": lambda state: state.bfloat16(),
    "shared by all rows": lambda state: state[:1].expand(2, -1, -1, -1),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_state_that_cannot_be_stepped_in_place_is_left_alone(kind):
    module = module_of(model_of("qwen3_next"))
    state = STATES[kind](torch.randn(2, 4, 16, 16))
    before = state.detach().clone()
    expected_o, expected_state = delta_rule_step(module, state.detach())
    with patch_transformers():
        o, new_state = delta_rule_step(module, state)
    assert torch.equal(state.detach(), before) and new_state is not state
    assert_same("o", o, expected_o)
    assert_same("state", new_state, expected_state)
    if state.requires_grad:
        new_state.sum().backward()
        assert rms(state.grad) > 0


def test_without_a_final_state_nothing_is_updated():
    state = torch.randn(2, 4, 16, 16)
    before = state.clone()
    with patch_transformers():
        _, new_state = delta_rule_step(module_of(model_of("qwen3_next")), state, output_final_state=False)
    assert new_state is None and torch.equal(state, before)


# ---- keywords


@every_family
def test_keywords_of_a_caller_reach_no_op(family):
    model, ids = copy.deepcopy(model_of(family)).train(), tokens(2, 11)
    keywords = {"shift_labels": ids, "num_items_in_batch": torch.tensor(20), "of_my_own": 3, "max_length_q": 11}
    expected = model(input_ids=ids, labels=ids, use_cache=False, output_hidden_states=True, **keywords).loss
    with patch_transformers():
        loss = model(input_ids=ids, labels=ids, use_cache=False, output_hidden_states=True, **keywords).loss
    assert_same("loss", loss[None], expected[None])


# ---- functions by themselves


def scan_inputs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 21, 4, 8, generator=generator)
    B, C = (torch.randn(2, 21, 2, 16, generator=generator) for _ in range(2))
    dt, A = torch.randn(2, 21, 4, generator=generator), -torch.linspace(0.05, 1, 4)
    state = torch.randn(2, 4, 8, 16, generator=generator)
    return x, dt, A, B, C, {"D": torch.linspace(-1, 1, 4), "dt_bias": torch.linspace(-2, 1, 4), "initial_states": state}


@pytest.mark.parametrize("left_out", ["nothing", "D", "dt_bias", "initial_states"])
@pytest.mark.parametrize("limits", [(0.0, float("inf")), (0.1, 0.5)])
@pytest.mark.parametrize("softplus", [True, False])
def test_scan(left_out, limits, softplus):
    module = module_of(model_of("bamba"))
    x, dt, A, B, C, options = scan_inputs()
    options.pop(left_out, None)
    dt = dt if softplus else dt.abs()
    if not softplus and "dt_bias" in options:
        options["dt_bias"] = options["dt_bias"].abs()
    options |= {"dt_softplus": softplus, "dt_limit": limits, "return_final_states": True, "chunk_size": 8}
    expected = module.mamba2_chunk_scan(x, dt, A, B, C, **options)
    with patch_transformers():
        result = module.mamba2_chunk_scan(x, dt, A, B, C, **options)
    for name, one, other in zip(("y", "state"), result, expected, strict=True):
        assert one.dtype == other.dtype
        assert_same(name, one, other)


def step_inputs(**changes):
    generator = torch.Generator().manual_seed(0)
    x, B, C = (torch.randn(2, *size, generator=generator) for size in ((4, 8), (2, 16), (2, 16)))
    dt, z = torch.randn(2, 4, 1, generator=generator).expand(2, 4, 8), torch.randn(2, 4, 8, generator=generator)
    A = torch.linspace(-1, -0.05, 4)[:, None, None].expand(4, 8, 16)
    D, bias = (torch.linspace(-1, end, 4)[:, None].expand(4, 8) for end in (1, 2))
    inputs = {"hidden_states": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": bias, "z": z}
    return torch.randn(2, 4, 8, 16, generator=generator), inputs | {"dt_softplus": True} | changes


@pytest.mark.parametrize("left_out", ["nothing", "D", "dt_bias", "z"])
@pytest.mark.parametrize("layout", ["N P", "P N"])
def test_selective_state_update(layout, left_out, monkeypatch):
    counted = Counted(monkeypatch, "simple_gla_step", "fused_recurrent_simple_gla")
    module = module_of(model_of("bamba"))
    expected_state, inputs = step_inputs(**({} if left_out == "nothing" else {left_out: None}))
    state = expected_state.clone()
    if layout == "N P":
        state = state.transpose(-1, -2).contiguous().transpose(-1, -2)
    expected = module.mamba2_selective_state_update(expected_state, **inputs)
    with patch_transformers():
        result = module.mamba2_selective_state_update(state, **inputs)
    assert_same("y", result, expected)
    assert_same("state", state, expected_state)
    assert list(counted.calls) == ["simple_gla_step" if layout == "N P" else "fused_recurrent_simple_gla"]


def test_decays_that_differ_within_a_head_are_left_to_transformers(caplog):
    module = module_of(model_of("bamba"))
    expected_state, inputs = step_inputs(A=-torch.rand(4, 8, 16))
    state = expected_state.clone()
    expected = module.mamba2_selective_state_update(expected_state, **inputs)
    with patch_transformers(), caplog.at_level(logging.WARNING, "hypenet_kernels"):
        result = module.mamba2_selective_state_update(state, **inputs)
        module.mamba2_selective_state_update(state.clone(), **inputs)
    assert torch.equal(result, expected) and torch.equal(state, expected_state)
    assert caplog.text.count("not one number a head") == 1


@pytest.mark.parametrize("width, activation", [(5, "silu"), (4, "gelu")])
def test_convolutions_that_are_not_built_are_left_to_transformers(caplog, width, activation):
    module = module_of(model_of("bamba"))
    x, weight = torch.randn(2, 6, 9), torch.randn(6, width)
    expected = module.causal_conv1d_fn(x, weight, activation=activation)
    with patch_transformers(), caplog.at_level(logging.WARNING, "hypenet_kernels"):
        assert torch.equal(module.causal_conv1d_fn(x, weight, activation=activation), expected)
        with pytest.raises(NotImplementedError, match="packed sequences are not built for"):
            module.causal_conv1d_fn(x, weight, activation=activation, cu_seq_lens_q=torch.tensor([0, 4, 18]))
    assert "the function of transformers runs" in caplog.text


def test_another_device_is_left_to_transformers():
    module = module_of(model_of("qwen3_next"))
    q, g = torch.randn(1, 8, 2, 16, device="meta"), torch.randn(1, 8, 2, device="meta")
    with patch_transformers():
        o, _ = module.torch_chunk_gated_delta_rule(q, q, q, g=g, beta=g)
        assert o.shape == q.shape
        with pytest.raises(ValueError, match="packed"):
            module.torch_chunk_gated_delta_rule(q, q, q, g=g, beta=g, cu_seqlens=torch.tensor([0, 3, 8]))


# ---- torch.compile


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@every_family
def test_compiled(family):
    model, ids = model_of(family), tokens(2, 37)
    expected = logits(model, input_ids=ids, use_cache=False)
    with patch_transformers():
        compiled = torch.compile(model, backend="aot_eager")
        assert_same("logits", logits(compiled, input_ids=ids, use_cache=False), expected)
    assert_same("logits", logits(compiled, input_ids=ids, use_cache=False), expected)  # compiled anew, unpatched


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@every_family
def test_compiled_decoding(family):
    model, ids = model_of(family), tokens(2, 12)
    cache_name = "cache_params" if family == "mamba2" else "past_key_values"
    expected = logits(model, input_ids=ids, use_cache=False)[:, 8:]
    with patch_transformers(), torch.no_grad():
        out, result = model(input_ids=ids[:, :8], use_cache=True), []
        addresses = [layer.recurrent_states[0].data_ptr() for layer in cache_layers(out)]
        compiled = torch.compile(model, backend="aot_eager")
        for position in range(8, 12):
            positions = {} if family == "mamba2" else {"position_ids": torch.full((2, 1), position)}
            inputs = {cache_name: out[cache_name], "use_cache": True} | positions
            out = compiled(input_ids=ids[:, position : position + 1], **inputs)
            result.append(out.logits)
    assert_same("logits", torch.cat(result, 1), expected)
    assert [layer.recurrent_states[0].data_ptr() for layer in cache_layers(out)] == addresses


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@one_of_each
def test_compiled_training(family):
    model, ids = copy.deepcopy(model_of(family)).train(), tokens(2, 37)

    def gradient(function):
        model.zero_grad()
        function(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return mixers(model)[0].conv1d.weight.grad.clone()

    expected = gradient(model)
    with patch_transformers():
        result = gradient(torch.compile(model, backend="aot_eager"))
    assert rms(result - expected) <= 2e-5 * rms(expected)
