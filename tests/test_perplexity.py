"""Bits per byte against closed forms."""

import math

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from halo.demo import corpus
from halo.demo.train_teacher import train_tokenizer
from halo.evaluation.needle import token_stream
from halo.evaluation.perplexity import bits_per_byte


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(corpus.documents("heldout"), seed=0)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            tie_word_embeddings=False,
        )
    )


def test_uniform_model_costs_log_vocabulary_per_token(model, tokenizer):
    text = "def quiet_river(value):\n    return value\n" * 20
    stream = token_stream(tokenizer, [text])[1:]
    head = model.lm_head.weight
    kept = head.detach().clone()
    with torch.no_grad():
        head.zero_()
    measured = bits_per_byte(model, tokenizer, stream, len(stream))
    with torch.no_grad():
        head.copy_(kept)
    assert measured["num_windows"] == 1 and measured["num_bytes"] == len(text.encode())
    assert measured["bits_per_byte"] == pytest.approx(len(stream) * math.log2(len(tokenizer)) / len(text.encode()))


def test_windows_agree_with_the_models_own_loss(model, tokenizer):
    stream = token_stream(tokenizer, corpus.documents("heldout")[:4])
    length, num_windows = 100, 7
    measured = bits_per_byte(model, tokenizer, stream, length, length * num_windows, batch_size=3)
    total = num_bytes = 0
    for start in np.linspace(0, len(stream) - length, num_windows).astype(int):
        window = stream[start : start + length]
        ids = torch.tensor([[stream[0], *window]], dtype=torch.long)
        total += model(input_ids=ids, labels=ids).loss.item() * length / math.log(2)
        num_bytes += len(tokenizer.decode(window, skip_special_tokens=True).encode())
    assert measured["num_windows"] == num_windows and measured["num_bytes"] == num_bytes
    assert measured["bits_per_byte"] == pytest.approx(total / num_bytes, rel=1e-5)
    assert 0 < measured["stderr"] < measured["bits_per_byte"]


def test_too_little_text_is_an_error(model, tokenizer):
    with pytest.raises(ValueError, match="length 512 needs as many tokens of text"):
        bits_per_byte(model, tokenizer, ["short"], 512)
