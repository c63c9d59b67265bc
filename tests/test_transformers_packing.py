"""patch_transformers: documents packed into one row stay apart, however they are named, or are refused."""

import copy
import importlib

import pytest
import torch
from compare import rms
from patched_models import (
    CONVOLUTION_ONLY,
    FORMS,
    GATED_DELTA,
    ONE_OF_EACH,
    assert_same,
    cache_layers,
    every_family,
    fresh_dynamo,  # noqa: F401, a fixture
    logits,
    mixers,
    model_of,
    one_of_each,
    tokens,
)
from transformers import DataCollatorWithFlattening

from bench.family_models import build
from hypenet_kernels.integrations import patch_transformers

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
def test_packed_documents_equal_each_alone(family, form):
    model = model_of(family)
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
def test_two_packed_rows(family):
    """position_ids that restart in each of two rows of a batch."""
    model, lengths = model_of(family), (5, 12, 9, 8)
    alone = logits_of_each_alone(model, lengths).reshape(2, 17, -1)
    batch = batch_of("position_ids", lengths)
    rows = {name: x.reshape(2, 17) for name, x in batch.items()}
    with patch_transformers():
        assert_same("logits", logits(model, **rows), alone)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_gradients_of_packed_documents(family, form):
    model = copy.deepcopy(model_of(family)).train()
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
def test_a_poisoned_document_does_not_reach_another(family, poison):
    layer = mixers(model_of(family))[0]
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
def test_a_row_of_one_document_may_have_a_cache(family):
    model, ids = model_of(family), tokens(1, 11)
    bounds = torch.tensor([0, 11], dtype=torch.int32)
    expected = logits(model, input_ids=ids)
    with patch_transformers(), torch.no_grad():
        out = model(input_ids=ids, cu_seq_lens_q=bounds, use_cache=True)
    assert_same("logits", out.logits, expected)
    assert cache_layers(out)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("form", FORMS)
@one_of_each
def test_compiled_packed_documents(family, form):
    model = model_of(family)
    alone = logits_of_each_alone(model)
    with patch_transformers():
        compiled = torch.compile(model, backend="aot_eager")
        assert_same("logits", logits(compiled, **batch_of(form)), alone)


# ---- what is refused


@pytest.mark.parametrize("form", FORMS)
@one_of_each
def test_packed_documents_refuse_a_cache(family, form):
    with patch_transformers(), pytest.raises(ValueError, match="use_cache False for packed sequences, got a cache"):
        model_of(family)(**batch_of(form), use_cache=True)


@pytest.mark.parametrize("name", ["past_key_values", "cache", "cache_params"])
@one_of_each
def test_packed_documents_refuse_a_cache_under_any_name(family, name):
    with patch_transformers(), pytest.raises(ValueError, match=f"{name} must be None and use_cache False for packed"):
        model_of(family).model(**batch_of("seq_idx"), **{name: object()})


@one_of_each
def test_packed_documents_refuse_a_mask(family):
    batch = batch_of("seq_idx")
    with patch_transformers(), pytest.raises(ValueError, match="attention_mask must be None for packed sequences"):
        model_of(family)(**batch, attention_mask=torch.ones_like(batch["input_ids"]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("off", ["causal_conv1d", "recurrence"])
@one_of_each
def test_half_a_patch_refuses_packed_documents(family, form, off):
    recurrence = "gated_delta_rule" if family in GATED_DELTA else "mamba2"
    with (
        patch_transformers(**{recurrence if off == "recurrence" else off: False}),
        pytest.raises(ValueError, match=r"packed sequences"),
    ):
        model_of(family)(**batch_of(form))


@pytest.mark.parametrize("keyword", ["cu_seq_lens_q", "seq_idx"])
@pytest.mark.parametrize(
    "family", ["mamba", "jamba", "zamba", "falcon_mamba", "kimi_linear", "bailing_hybrid", "inkling"]
)
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
