"""Models of transformers give the same with `attn_implementation="hypenet"`, on the kernel where it applies."""

import copy
import logging
import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
)

from hypenet_kernels.integrations import _attention, register_attention

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
CONFIGS = {
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "qwen2": Qwen2Config(**SIZES),
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "gpt2": GPT2Config(vocab_size=97, n_embd=48, n_layer=2, n_head=4, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
    "qwen3_next": Qwen3NextConfig(
        **SIZES | {"num_hidden_layers": 4}, head_dim=16, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16
    ),
}


@pytest.fixture(autouse=True)
def registered():
    register_attention()
    _attention._say_once.cache_clear()


@pytest.fixture
def calls(monkeypatch):
    """Count the calls of the kernels."""
    found = []
    for name in ("hype_attention", "hype_attention_decode"):
        kernel = getattr(_attention, name)

        def counted(*args, kernel=kernel, name=name, **kwargs):
            found.append((name, args[0].shape[1]))
            return kernel(*args, **kwargs)

        monkeypatch.setattr(_attention, name, counted)
    return found


def two(config):
    """Return a model with torch's attention, and one of the same weights with ours."""
    torch.manual_seed(0)
    theirs, ours = (
        AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=name).eval()
        for name in ("sdpa", "hypenet")
    )
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_and_gradients_are_those_of_sdpa(family, calls):
    theirs, ours = two(CONFIGS[family])
    ids = torch.randint(97, (2, 40))
    logits = [model(ids, labels=ids) for model in (theirs, ours)]
    torch.testing.assert_close(logits[1].logits, logits[0].logits, atol=2e-5, rtol=1e-4)
    assert calls and {name for name, _ in calls} == {"hype_attention"}
    for output in logits:
        output.loss.backward()
    for (name, expected), found in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad, atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "qwen3_next"])
def test_generation_decodes_on_the_kernel(family, calls):
    theirs, ours = two(CONFIGS[family])
    ids = torch.randint(1, 97, (2, 9))
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))
    assert ("hype_attention_decode", 1) in calls and ("hype_attention", 9) in calls


def test_prefill_in_chunks_runs_on_the_kernel(calls):
    theirs, ours = two(CONFIGS["qwen3"])
    ids = torch.randint(97, (2, 40))
    with torch.no_grad():
        cache = ours(ids[:, :17]).past_key_values
        logits = ours(ids[:, 17:], past_key_values=cache).logits
        torch.testing.assert_close(logits, theirs(ids).logits[:, 17:], atol=2e-5, rtol=1e-4)
    assert [T for _, T in calls] == [17, 17, 23, 23]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_low_precision(dtype, calls):
    theirs, ours = two(CONFIGS["qwen3"])
    ids = torch.randint(97, (2, 40))
    with torch.no_grad():
        exact = theirs(ids).logits
        with torch.autocast("cpu", dtype):
            found, expected = ours(ids).logits, theirs(ids).logits
        assert found.dtype == expected.dtype and len(calls) == 2
        assert (found - exact).abs().max() <= 1.5 * (expected - exact).abs().max()
        assert ours.to(dtype)(ids).logits.dtype == dtype


def packed(model):
    """Two documents in a row, told by their positions."""
    ids = torch.randint(97, (1, 30))
    return {"input_ids": ids, "position_ids": torch.cat([torch.arange(11), torch.arange(19)])[None], "use_cache": False}


def padded(model):
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :7] = 0
    return {"input_ids": torch.randint(97, (2, 30)), "attention_mask": mask}


@pytest.mark.parametrize("case", [packed, padded])
def test_what_has_a_mask_is_computed_by_torch(case, calls, caplog):
    theirs, ours = two(CONFIGS["qwen3"])
    inputs = case(ours)
    with torch.no_grad(), caplog.at_level(logging.INFO, "hypenet_kernels"):
        found, expected = ours(**inputs).logits, theirs(**inputs).logits
        ours(**inputs)
    seen = inputs.get("attention_mask", torch.ones(1, 30)).bool()
    torch.testing.assert_close(found[seen], expected[seen], atol=2e-5, rtol=1e-4)
    assert not calls
    assert len(caplog.messages) == 1 and "in place of hype_attention for mask (padding, packed" in caplog.messages[0]


def test_a_window_is_kept(calls):
    config = MistralConfig(**SIZES, sliding_window=8)
    theirs, ours = two(config)
    ids = torch.randint(97, (1, 30))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=2e-5, rtol=1e-4)
    assert not calls


@pytest.mark.parametrize("padded", [False, True])
def test_static_cache_and_left_padding_generate_the_same(padded):
    theirs, ours = two(CONFIGS["qwen3"])
    ids, mask = torch.randint(1, 97, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    if padded:
        mask[0, :4] = 0
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    expected = theirs.generate(ids, **options)
    for cache in ("dynamic", "static"):
        found = ours.generate(ids, **options, cache_implementation=cache, disable_compile=True)
        assert torch.equal(found, expected)


def test_dropout_is_torchs(calls):
    config = Qwen3Config(**SIZES, head_dim=16, attention_dropout=0.5)
    _, ours = two(config)
    ids = torch.randint(97, (1, 20))
    assert not torch.equal(ours.train()(ids).logits, ours(ids).logits) and not calls
    assert torch.equal(ours.eval()(ids).logits, ours(ids).logits) and calls


def test_logit_scale(calls):
    """The scale of query t is ln(t + a) / ln(a), checked on torch's attention with queries that carry it."""
    base = 16.0
    assert register_attention("hype-16", logit_scale_base=base) == "hype-16"
    function = _functions()["hype-16"]
    q, k, v = torch.randn(2, 4, 30, 16), torch.randn(2, 2, 50, 16), torch.randn(2, 2, 50, 16)
    module = torch.nn.Module()
    found, weights = function(module, q, k, v, None, scaling=0.3)
    scale = torch.tensor([math.log(t + base) / math.log(base) for t in range(20, 50)])[:, None]
    mask = torch.ones(30, 50).tril(20).bool()
    expected = torch.nn.functional.scaled_dot_product_attention(
        q * scale, k, v, attn_mask=mask, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(found, expected.transpose(1, 2), atol=1e-5, rtol=1e-4)
    assert weights is None and calls == [("hype_attention", 30)]
    step = function(module, q[:, :, -1:], k, v, None, scaling=0.3)[0]
    torch.testing.assert_close(step, expected.transpose(1, 2)[:, -1:], atol=1e-5, rtol=1e-4)
    with pytest.raises(NotImplementedError, match="Module: attention with a logit scale must have no mask"):
        function(module, q, k, v, mask, scaling=0.3)


def test_compiled_without_graph_breaks(calls):
    theirs, ours = two(CONFIGS["qwen3"])
    ids = torch.randint(97, (2, 24))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, theirs(ids).logits, atol=2e-5, rtol=1e-4)
    assert calls


def test_what_is_refused():
    for name in ("sdpa", "eager", "flash_attention_2"):
        with pytest.raises(ValueError, match=f"name must not be one of transformers' own, got '{name}'"):
            register_attention(name)
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(NotImplementedError, match="must know s_aux"):
        _functions()["hypenet"](torch.nn.Module(), q, q, q, None, s_aux=torch.zeros(2))


def test_what_else_the_kernel_cannot_do_is_torchs():
    function, module = _functions()["hypenet"], torch.nn.Module()
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 3, 8)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    found = function(module, q, k, k, None, is_causal=False)[0]
    torch.testing.assert_close(found, sdpa(q, k, k).transpose(1, 2))
    wide = torch.randn(1, 2, 5, 12)
    found = function(module, q, q, wide, None)[0]
    torch.testing.assert_close(found, sdpa(q, q, wide, is_causal=True).transpose(1, 2))


def _functions():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS
