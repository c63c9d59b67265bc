"""patch_transformers: the models of every family compute the same as without it, and packed documents stay apart."""

import copy
import importlib
import logging
import subprocess
import sys

import causal_conv1d_stand_in
import pytest
import torch
from compare import assert_matches_reference, rms
from transformers import DataCollatorWithFlattening

import hypenet_kernels
from bench.family_models import FAMILIES, build
from hypenet_kernels.integrations import patch_transformers

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
one_of_each = pytest.mark.parametrize("family", ONE_OF_EACH)


@pytest.fixture(autouse=True)
def convolution(monkeypatch):
    for name in ("causal_conv1d_fn", "causal_conv1d_update"):
        if not hasattr(hypenet_kernels, name):
            monkeypatch.setattr(hypenet_kernels, name, getattr(causal_conv1d_stand_in, name), raising=False)


@pytest.fixture(scope="module")
def models():
    """Models in float32, each built once, before any patch."""
    return {family: build(family) for family in FAMILIES}


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


# ---- the same numbers


@every_family
def test_logits(models, family, monkeypatch):
    model, ids = models[family], tokens(2, 37)
    expected = logits(model, input_ids=ids)
    op = "chunk_gated_delta_rule" if family in GATED_DELTA else "chunk_simple_gla"
    counted = Counted(monkeypatch, op, "causal_conv1d_fn")
    with patch_transformers():
        result = logits(model, input_ids=ids)
    assert_same("logits", result, expected)
    assert len(counted.calls[op]) == len(counted.calls["causal_conv1d_fn"]) == len(mixers(model))


@every_family
def test_gradients(models, family):
    model, ids = copy.deepcopy(models[family]).train(), tokens(2, 37)
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
def test_chunked_prefill_continues_from_a_cache(models, family):
    model, ids = models[family], tokens(2, 40)
    expected = logits(model, input_ids=ids, use_cache=False)
    with patch_transformers(), torch.no_grad():
        first = model(input_ids=ids[:, :23], use_cache=True)
        second = model(input_ids=ids[:, 23:39], past_key_values=first.past_key_values, use_cache=True)
        third = model(input_ids=ids[:, 39:], past_key_values=second.past_key_values, use_cache=True)
    assert_same("logits", torch.cat([out.logits for out in (first, second, third)], 1), expected)


# ---- generation


def generated(model, batch=2, length=13, padding=5, new=8, **options):
    ids = tokens(batch, length)
    mask = torch.ones_like(ids)
    ids[0, :padding], mask[0, :padding] = 0, 0
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, **options)


@every_family
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generation(models, family, options):
    model = models[family]
    expected = generated(model, **options)
    with patch_transformers():
        assert torch.equal(generated(model, **options), expected)


STATIC = [family for family in FAMILIES if family not in ("falcon_h1", "zamba2", "qwen4_exp_text")]


@pytest.mark.parametrize("family", STATIC)
def test_generation_with_a_static_cache(models, family):
    model = models[family]
    options = {"cache_implementation": "static", "disable_compile": True}
    expected = generated(model, **options)
    with patch_transformers():
        assert torch.equal(generated(model, **options), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_continues_a_cache_of_the_other_kind(models, family):
    """A cache that transformers filled is taken over by ours, and the other way round."""
    model, ids = models[family], tokens(2, 13)
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


def cache_layers(out):
    cache = out.cache_params if "cache_params" in out else out.past_key_values
    layers = [layer for layer in cache.layers if hasattr(layer, "recurrent_states")]
    return [layer for layer in layers if layer.recurrent_states[0] is not None]


@every_family
def test_a_step_updates_the_state_of_the_cache_itself(models, family, monkeypatch):
    model, ids = models[family], tokens(2, 9)
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
def test_a_state_that_cannot_be_stepped_in_place_is_left_alone(models, kind):
    module = module_of(models["qwen3_next"])
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


def test_without_a_final_state_nothing_is_updated(models):
    state = torch.randn(2, 4, 16, 16)
    before = state.clone()
    with patch_transformers():
        _, new_state = delta_rule_step(module_of(models["qwen3_next"]), state, output_final_state=False)
    assert new_state is None and torch.equal(state, before)


def test_a_gradient_through_decoding_steps(models):
    """Teacher forcing through a cache: the gradient of the last token's inputs."""
    model, ids = models["bamba"], tokens(2, 9)

    def gradient():
        out = model(input_ids=ids[:, :8], use_cache=True)
        embedding = model.get_input_embeddings()(ids[:, 8:]).detach().requires_grad_()
        out = model(inputs_embeds=embedding, past_key_values=out.past_key_values, use_cache=True)
        return torch.autograd.grad(out.logits.logsumexp(-1).sum(), embedding)[0]

    expected = gradient()
    with patch_transformers():
        result = gradient()
    assert_same("gradient", 1e3 * result, 1e3 * expected)


# ---- packed documents


LENGTHS = (5, 1, 23, 2, 9)


def documents(lengths=LENGTHS):
    return [{"input_ids": tokens(length, seed=length).tolist()} for length in lengths]


def batch_of(form, lengths=LENGTHS):
    batch = DataCollatorWithFlattening(return_tensors="pt", **FORMS[form])(documents(lengths))
    del batch["labels"]
    return batch


def logits_of_each_alone(model, lengths=LENGTHS):
    ids = [torch.tensor([document["input_ids"]]) for document in documents(lengths)]
    return torch.cat([logits(model, input_ids=x, use_cache=False) for x in ids], 1)


@every_family
@pytest.mark.parametrize("form", FORMS)
def test_packed_documents_equal_each_alone(models, family, form):
    model = models[family]
    with patch_transformers():
        assert_same("logits", logits(model, **batch_of(form)), logits_of_each_alone(model))
    alone = logits_of_each_alone(model)  # and not only by our own measure
    with patch_transformers():
        assert_same("logits", logits(model, **batch_of(form)), alone)


@pytest.mark.parametrize("family", CONVOLUTION_ONLY)
@pytest.mark.parametrize("form", FORMS)
def test_packed_documents_of_convolution_layers(family, form):
    model = convolution_model(family)
    alone = logits_of_each_alone(model)
    with patch_transformers():
        assert_same("logits", logits(model, **batch_of(form)), alone)


def convolution_model(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_dense_layers": 1}
    config = AutoConfig.for_model(
        family,
        vocab_size=96,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv"],
        **(experts if family == "lfm2_moe" else {}),
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_two_packed_rows(models, family):
    """position_ids that restart in each of two rows of a batch."""
    model, lengths = models[family], (5, 12, 9, 8)
    alone = logits_of_each_alone(model, lengths).reshape(2, 17, -1)
    batch = batch_of("position_ids", lengths)
    rows = {name: x.reshape(2, 17) for name, x in batch.items()}
    with patch_transformers():
        assert_same("logits", logits(model, **rows), alone)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_gradients_of_packed_documents(models, family, form):
    model = copy.deepcopy(models[family]).train()
    weights = torch.randn(1, sum(LENGTHS), 96)

    def gradient(loss):
        model.zero_grad()
        loss.backward()
        return mixers(model)[0].conv1d.weight.grad.clone(), mixers(model)[0].A_log.grad.clone()

    ids = [torch.tensor([document["input_ids"]]) for document in documents()]
    alone = torch.cat([model(input_ids=x, use_cache=False).logits for x in ids], 1)
    expected = gradient((alone * weights).sum())
    model.gradient_checkpointing_enable()
    with patch_transformers():
        result = gradient((model(**batch_of(form)).logits * weights).sum())
    for name, one, other in zip(("conv1d.weight", "A_log"), result, expected, strict=True):
        assert rms(one - other) <= 2e-5 * rms(other), name


@every_family
@pytest.mark.parametrize("poison", [float("nan"), 1e30])
def test_a_poisoned_document_does_not_reach_another(models, family, poison):
    layer = mixers(models[family])[0]
    hidden = torch.randn(1, 30, 64)
    bounds = torch.tensor([0, 7, 20, 30], dtype=torch.int32)
    poisoned = hidden.clone()
    poisoned[:, 7:20] = poison
    with patch_transformers(), torch.no_grad():
        expected = layer(hidden, cu_seq_lens_q=bounds)
        result = layer(poisoned, cu_seq_lens_q=bounds)
    assert not torch.equal(result[:, 7:20], expected[:, 7:20])
    assert torch.equal(result[:, :7], expected[:, :7]) and torch.equal(result[:, 20:], expected[:, 20:])


@every_family
def test_a_row_of_one_document_may_have_a_cache(models, family):
    model, ids = models[family], tokens(1, 11)
    bounds = torch.tensor([0, 11], dtype=torch.int32)
    expected = logits(model, input_ids=ids)
    with patch_transformers(), torch.no_grad():
        out = model(input_ids=ids, cu_seq_lens_q=bounds, use_cache=True)
    assert_same("logits", out.logits, expected)
    assert cache_layers(out)


# ---- what is refused


@pytest.mark.parametrize("form", FORMS)
@one_of_each
def test_packed_documents_refuse_a_cache(models, family, form):
    with patch_transformers(), pytest.raises(ValueError, match="use_cache False for packed sequences, got a cache"):
        models[family](**batch_of(form), use_cache=True)


@one_of_each
def test_packed_documents_refuse_a_mask(models, family):
    batch = batch_of("seq_idx")
    with patch_transformers(), pytest.raises(ValueError, match="attention_mask must be None for packed sequences"):
        models[family](**batch, attention_mask=torch.ones_like(batch["input_ids"]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("off", ["causal_conv1d", "recurrence"])
@one_of_each
def test_half_a_patch_refuses_packed_documents(models, family, form, off):
    recurrence = "gated_delta_rule" if family in GATED_DELTA else "mamba2"
    with (
        patch_transformers(**{recurrence if off == "recurrence" else off: False}),
        pytest.raises(ValueError, match=r"needs \w+ to be replaced too for packed sequences"),
    ):
        models[family](**batch_of(form))


@pytest.mark.parametrize("keyword", ["cu_seq_lens_q", "seq_idx"])
@pytest.mark.parametrize("family", ["mamba", "jamba", "zamba", "falcon_mamba", "kimi_linear", "bailing_hybrid"])
def test_a_layer_whose_recurrence_cannot_pack_refuses(family, keyword):
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    documents = {"cu_seq_lens_q": torch.tensor([0, 3, 8]), "seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])}
    x, weight = torch.randn(1, 6, 8), torch.randn(6, 4)
    with patch_transformers():
        assert_same("y", module.causal_conv1d_fn(x, weight), module.causal_conv1d_fn.hypenet_site.original(x, weight))
        with pytest.raises(ValueError, match="cannot keep packed sequences apart; pass one sequence a row"):
            module.causal_conv1d_fn(x, weight, **{keyword: documents[keyword]})


def test_embeddings_of_ngrams_refuse_packed_documents():
    ngrams = {"ngram_vocab_size_base": 50, "split_ngram_parts": 1, "heads_per_ngram": 2, "ple_embed_dim": 64}
    model = build("qwen4_exp_text", ple_layer_ids=[1], make_ngram_vocab_size_divisible_by=8, **ngrams)
    expected = logits(model, input_ids=tokens(2, 11))
    with patch_transformers():
        assert_same("logits", logits(model, input_ids=tokens(2, 11)), expected)
        with pytest.raises(ValueError, match=r"config.ple_layer_ids must be empty for packed sequences"):
            model(**batch_of("seq_idx"))


# ---- keywords


@every_family
def test_keywords_of_a_caller_reach_no_op(models, family):
    model, ids = copy.deepcopy(models[family]).train(), tokens(2, 11)
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
def test_scan(models, left_out, limits, softplus):
    module = module_of(models["bamba"])
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
    A = -torch.linspace(0.05, 1, 4)[:, None, None].expand(4, 8, 16)
    D, bias = (torch.linspace(-1, end, 4)[:, None].expand(4, 8) for end in (1, 2))
    inputs = {"hidden_states": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": bias, "z": z}
    return torch.randn(2, 4, 8, 16, generator=generator), inputs | {"dt_softplus": True} | changes


@pytest.mark.parametrize("left_out", ["nothing", "D", "dt_bias", "z"])
@pytest.mark.parametrize("layout", ["N P", "P N"])
def test_selective_state_update(models, layout, left_out):
    module = module_of(models["bamba"])
    expected_state, inputs = step_inputs(**({} if left_out == "nothing" else {left_out: None}))
    state = expected_state.clone()
    if layout == "N P":
        state = state.transpose(-1, -2).contiguous().transpose(-1, -2)
    expected = module.mamba2_selective_state_update(expected_state, **inputs)
    with patch_transformers():
        result = module.mamba2_selective_state_update(state, **inputs)
    assert_same("y", result, expected)
    assert_same("state", state, expected_state)


def test_decays_that_differ_within_a_head_are_left_to_transformers(models, caplog):
    module = module_of(models["bamba"])
    expected_state, inputs = step_inputs(A=-torch.rand(4, 8, 16))
    state = expected_state.clone()
    expected = module.mamba2_selective_state_update(expected_state, **inputs)
    with patch_transformers(), caplog.at_level(logging.WARNING, "hypenet_kernels"):
        result = module.mamba2_selective_state_update(state, **inputs)
        module.mamba2_selective_state_update(state.clone(), **inputs)
    assert torch.equal(result, expected) and torch.equal(state, expected_state)
    assert caplog.text.count("not one number a head") == 1


@pytest.mark.parametrize("width, activation", [(5, "silu"), (4, "gelu")])
def test_convolutions_that_are_not_built_are_left_to_transformers(models, caplog, width, activation):
    module = module_of(models["bamba"])
    x, weight = torch.randn(2, 6, 9), torch.randn(6, width)
    expected = module.causal_conv1d_fn(x, weight, activation=activation)
    with patch_transformers(), caplog.at_level(logging.WARNING, "hypenet_kernels"):
        assert torch.equal(module.causal_conv1d_fn(x, weight, activation=activation), expected)
        with pytest.raises(NotImplementedError, match="packed sequences are not built for"):
            module.causal_conv1d_fn(x, weight, activation=activation, cu_seq_lens_q=torch.tensor([0, 4, 18]))
    assert "the function of transformers runs" in caplog.text


def test_another_device_is_left_to_transformers(models):
    module = module_of(models["qwen3_next"])
    q, g = torch.randn(1, 8, 2, 16, device="meta"), torch.randn(1, 8, 2, device="meta")
    with patch_transformers():
        o, _ = module.torch_chunk_gated_delta_rule(q, q, q, g=g, beta=g)
        assert o.shape == q.shape
        with pytest.raises(ValueError, match="packed"):
            module.torch_chunk_gated_delta_rule(q, q, q, g=g, beta=g, cu_seqlens=torch.tensor([0, 3, 8]))


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


def test_options_choose_what_is_replaced():
    for options, absent in (
        ({"gated_delta_rule": False}, {"torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"}),
        ({"mamba2": False}, {"mamba2_chunk_scan", "mamba2_selective_state_update"}),
        ({"causal_conv1d": False}, {"causal_conv1d_fn", "causal_conv1d_update", "mamba2_split_conv1d_scan_combined"}),
    ):
        with patch_transformers(**options) as patch:
            names = {name for _, name, _ in patch.replaced}
        assert names and not names & absent


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
def test_functions_of_other_packages_are_replaced_too(models, family, monkeypatch):
    """Where flash-linear-attention or mamba_ssm is installed, the globals lead to them."""
    model, module, ids = models[family], module_of(models[family]), tokens(2, 9)
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
    assert run.stdout.strip() == "patch_transformers: transformers must be installed, got none"


# ---- torch.compile


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@every_family
def test_compiled(models, family, fresh_dynamo):
    model, ids = models[family], tokens(2, 37)
    expected = logits(model, input_ids=ids, use_cache=False)
    with patch_transformers():
        compiled = torch.compile(model, backend="aot_eager")
        assert_same("logits", logits(compiled, input_ids=ids, use_cache=False), expected)
    assert_same("logits", logits(compiled, input_ids=ids, use_cache=False), expected)  # compiled anew, unpatched


@pytest.mark.slow
@every_family
def test_compiled_decoding(models, family, fresh_dynamo):
    model, ids = models[family], tokens(2, 12)
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
@pytest.mark.parametrize("form", FORMS)
@one_of_each
def test_compiled_packed_documents(models, family, form, fresh_dynamo):
    model = models[family]
    alone = logits_of_each_alone(model)
    with patch_transformers():
        compiled = torch.compile(model, backend="aot_eager")
        assert_same("logits", logits(compiled, **batch_of(form)), alone)


@pytest.mark.slow
@one_of_each
def test_compiled_training(models, family, fresh_dynamo):
    model, ids = copy.deepcopy(models[family]).train(), tokens(2, 37)

    def gradient(function):
        model.zero_grad()
        function(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return mixers(model)[0].in_proj_or_first_weight.grad if False else mixers(model)[0].conv1d.weight.grad.clone()

    expected = gradient(model)
    with patch_transformers():
        result = gradient(torch.compile(model, backend="aot_eager"))
    assert rms(result - expected) <= 2e-5 * rms(expected)
