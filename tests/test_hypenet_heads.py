"""Interfaces that programs of transformers expect: attention implementations, other heads, weight decay, caches."""

import pytest
import torch
from halo_tiny import tiny_tokenizer
from hypenet_models import MIXED, small_config, small_model, tokens
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    StaticCache,
    Trainer,
    pipeline,
)
from transformers.distributed import DistributedConfig

from hypenet import HypeNetCache, HypeNetForSequenceClassification
from hypenet import modeling_hypenet as modeling

PAD = 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    small_model(dtype=torch.float32, pad_token_id=PAD).save_pretrained(path)
    return path


@pytest.fixture
def said(monkeypatch):
    """Return the list of lines that the model warns with; a line that was given before is given again."""
    lines = []
    monkeypatch.setattr(modeling.logger, "warning_once", lines.append)
    return lines


@pytest.mark.parametrize("name", ["sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "owner/kernel"])
@torch.no_grad()
def test_other_attention_implementations_change_nothing_and_say_so(folder, said, name):
    ids = tokens(2, 9)
    expected = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    assert not said
    models = [AutoModelForCausalLM.from_pretrained(folder, attn_implementation=name)]
    models.append(AutoModelForCausalLM.from_pretrained(folder))
    models[1].set_attn_implementation(name)
    for model in models:
        assert torch.equal(model(ids).logits, expected)
        assert model.config._attn_implementation == "eager"
    assert said and all(f"attn_implementation='{name}' has no effect" in line for line in said)


def test_attention_implementations_that_mean_nothing_new(folder, said):
    for name in (None, "eager"):
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation=name)
        AutoModelForCausalLM.from_config(small_config(), attn_implementation=name)
    assert not said
    with pytest.raises(ValueError, match="attn_implementation must be None or a name that transformers has, got 'sdp'"):
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdp")


# ---- heads


@pytest.mark.parametrize("side", ["left", "right"])
def test_sequence_classification_of_a_padded_batch(folder, side):
    model, report = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, output_loading_info=True)
    assert type(model) is HypeNetForSequenceClassification
    assert {*report["missing_keys"]} == {"score.weight"}
    documents = [tokens(1, n) for n in (4, 9)]
    pads = torch.full((1, 5), PAD)
    first = torch.cat([pads, documents[0]] if side == "left" else [documents[0], pads], dim=1)
    ids, labels = torch.cat([first, documents[1]]), torch.tensor([2, 0])
    outputs = model(ids, attention_mask=(ids != PAD).long(), labels=labels)
    alone = torch.cat([model(x).logits for x in documents])
    assert_close(outputs.logits, alone)
    assert_close(outputs.loss, torch.nn.functional.cross_entropy(alone, labels))
    outputs.loss.backward()
    assert all(x.grad is not None for x in model.parameters())


def test_the_pipeline_of_sequence_classification(tmp_path):
    """It takes the class from transformers by the name in the configuration."""
    tokenizer = tiny_tokenizer()
    config = small_config(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, num_labels=3)
    model = HypeNetForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = "river stone quiet morning"
    [scores] = pipeline("text-classification", model=str(tmp_path), top_k=None)([text])
    with torch.no_grad():
        expected = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(0)
    assert {x["label"]: x["score"] for x in scores} == pytest.approx(
        {f"LABEL_{i}": float(p) for i, p in enumerate(expected)}, rel=1e-5
    )


def test_token_classification_and_question_answering(folder, tmp_path):
    ids = tokens(2, 7)
    hidden = AutoModelForCausalLM.from_pretrained(folder).model(ids).last_hidden_state
    tagger = AutoModelForTokenClassification.from_pretrained(folder, num_labels=5)
    assert_close(tagger(ids, labels=ids % 5).logits, tagger.score(hidden))
    reader = AutoModelForQuestionAnswering.from_pretrained(folder)
    outputs = reader(ids, start_positions=torch.tensor([1, 2]), end_positions=torch.tensor([3, 6]))
    assert_close(torch.stack([outputs.start_logits, outputs.end_logits], dim=-1), reader.qa_outputs(hidden))
    outputs.loss.backward()
    tagger.save_pretrained(tmp_path)
    again = AutoModelForTokenClassification.from_pretrained(tmp_path)
    assert_close(again(ids).logits, tagger(ids).logits)


# ---- several devices


@pytest.mark.parametrize("name", ["tp_plan", "tp_size", "distributed_config"])
def test_tensor_parallelism_is_refused(folder, name):
    """transformers would load the whole model into every process."""
    value = {"tp_plan": "auto", "tp_size": 2, "distributed_config": DistributedConfig(tp_size=2, tp_plan="auto")}[name]
    with pytest.raises(ValueError, match=r"^HypeNetForCausalLM: tp_(plan|size) must be None \(there is no plan"):
        AutoModelForCausalLM.from_pretrained(folder, **{name: value})


# ---- training


def test_the_trainer_decays_neither_norms_nor_decays():
    model = small_model(MIXED)
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    for name, parameter in model.named_parameters():
        assert (name in decayed) == (parameter.dim() > 1), name
    assert any(name.endswith("A_log") for name, _ in model.named_parameters())


# ---- what a HypeNet has not


def test_caches_of_other_models_are_refused():
    model = small_model()
    ids = tokens(1, 5)
    for cache in (StaticCache(config=model.config, max_cache_len=16), ((ids, ids),)):
        with pytest.raises(TypeError, match=f"must be a HypeNetCache, got {type(cache).__name__}"):
            model(ids, past_key_values=cache)
    with pytest.raises(TypeError, match="must be a HypeNetCache, got StaticCache"):
        model.generate(ids, past_key_values=StaticCache(config=model.config, max_cache_len=16), max_new_tokens=2)
    for name in ("static", "offloaded", "offloaded_static", "quantized"):
        with pytest.raises(ValueError, match=f"cache_implementation must be None, got '{name}'"):
            model.generate(ids, cache_implementation=name, max_new_tokens=2)
    assert model.generate(ids, past_key_values=HypeNetCache(model.config), max_new_tokens=2, min_new_tokens=2).numel()


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig", "LoraConfig"])
def test_peft(kind):
    """LoRA and prompts of virtual tokens work; prefixes are keys and values, which recurrent layers do not have."""
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["q_proj"]} if kind == "LoraConfig" else {"num_virtual_tokens": 3}
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(small_model(dtype=torch.float32), config)
    ids = tokens(2, 5)
    if kind == "PrefixTuningConfig":
        with pytest.raises(TypeError, match="past_key_values must be a HypeNetCache, got DynamicCache"):
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    else:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        assert any(x.grad is not None and x.grad.abs().max() > 0 for x in model.parameters())
