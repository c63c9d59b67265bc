"""Assisted generation: drafts of another model or of the prompt change no token, and save calls of the model."""

import pytest
import torch
from hypenet_models import MIXED, VOCABULARY, small_model, small_teacher, tokens

from hypenet import HypeNetCache

# Token 0 ends a text, which is not allowed here. Were it padding only, transformers would mask it in drafts.
NEW = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "eos_token_id": 0}


def calls_of(model):
    """Return a list to which every call of the model appends its number of tokens."""
    lengths = []
    model.model.register_forward_hook(
        lambda module, args, kwargs, output: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return lengths


@torch.no_grad()
def test_prompt_lookup_gives_the_greedy_output():
    model = small_model()
    for prompt in (tokens(1, 5), tokens(1, 6).repeat(1, 20), tokens(1, 150)):
        expected = model.generate(prompt, **NEW)
        for drafts in (3, 10, 100):
            assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=drafts, **NEW), expected)


@torch.no_grad()
def test_accepted_drafts_save_calls():
    """A model that repeats its input is easy to predict: most drafts are right."""
    model = small_model(MIXED)
    for layer in model.model.layers:  # the residual stream alone: the next token is a function of this one
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model.lm_head.weight.copy_(model.model.embed_tokens.weight.roll(1, dims=0))
    prompt = (torch.arange(VOCABULARY - 1) % 7 + 1)[None]
    expected = model.generate(prompt, **NEW)
    lengths = calls_of(model)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=10, **NEW), expected)
    assert len(lengths) < 20, lengths


@pytest.mark.parametrize("assistant", [MIXED, ["lightning-attn"], "qwen3"], ids=str)
@torch.no_grad()
def test_assistants(assistant):
    """The assistant's cache goes back too, where it is a HypeNet."""
    model = small_model()
    helper = small_teacher() if assistant == "qwen3" else small_model(assistant)
    prompt = tokens(1, 30)
    expected = model.generate(prompt, **NEW)
    assert torch.equal(model.generate(prompt, assistant_model=helper, **NEW), expected)
    same = small_model()
    same.load_state_dict(model.state_dict())
    lengths = calls_of(model)
    assert torch.equal(model.generate(prompt, assistant_model=same, **NEW), expected)
    assert len(lengths) < 25, lengths
    teacher = small_teacher()
    expected = teacher.generate(prompt, **NEW)
    assert torch.equal(teacher.generate(prompt, assistant_model=small_model(), **NEW), expected)


@torch.no_grad()
def test_a_given_cache_continues_after_assisted_generation():
    model, prompt = small_model(), tokens(1, 40)
    cache = HypeNetCache(model.config)
    first = model.generate(prompt, past_key_values=cache, prompt_lookup_num_tokens=5, **NEW)
    longer = torch.cat([first, tokens(1, 8)], dim=1)
    result = model.generate(longer, past_key_values=cache, **NEW)
    assert torch.equal(result, model.generate(longer, use_cache=False, **NEW))


@torch.no_grad()
def test_a_prefix_is_read_once():
    """Questions about one document: the cache goes back to its end, and only the question is read."""
    model, document = small_model(), tokens(1, 200)
    cache = HypeNetCache(model.config)
    model(document, past_key_values=cache)
    cache.snapshot()
    lengths = calls_of(model)
    for question in (tokens(1, 4), tokens(1, 9)):
        prompt = torch.cat([document, question], dim=1)
        answer = model.generate(prompt, past_key_values=cache, **NEW)
        assert sum(lengths) == question.shape[1] + 39
        cache.crop(-(cache.get_seq_length() - 200))
        assert torch.equal(answer, model.generate(prompt, **NEW))
        lengths.clear()
