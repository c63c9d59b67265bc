"""Bits per byte against closed forms."""

import math

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from halo.demo import corpus
from halo.demo.train_teacher import train_tokenizer
from halo.evaluation import perplexity
from halo.evaluation.needle import token_stream
from halo.evaluation.perplexity import bits_per_byte, position_edges


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
    stream = token_stream(tokenizer, [text])[1:]  # begins with text, as a corpus' stream does
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
    stream = token_stream(tokenizer, corpus.documents("heldout")[:4])[5:]
    length, num_windows = 100, 7
    measured = bits_per_byte(model, tokenizer, stream, length, length * num_windows, batch_size=3)
    total = num_bytes = 0
    for start in np.linspace(0, len(stream) - length, num_windows).astype(int):
        window = stream[start : start + length]
        ids = torch.tensor([[tokenizer.bos_token_id, *window]], dtype=torch.long)
        total += model(input_ids=ids, labels=ids).loss.item() * length / math.log(2)
        num_bytes += len(tokenizer.decode(window, skip_special_tokens=True).encode())
    assert measured["num_windows"] == num_windows and measured["num_bytes"] == num_bytes
    assert measured["bits_per_byte"] == pytest.approx(total / num_bytes, rel=1e-5)
    assert 0 < measured["stderr"] < measured["bits_per_byte"]


def test_too_little_text_is_an_error(model, tokenizer):
    with pytest.raises(ValueError, match="length 512 needs as many tokens of text"):
        bits_per_byte(model, tokenizer, ["short"], 512)


def test_positions_double():
    assert position_edges(100) == [0, 100]
    assert position_edges(256) == [0, 256]
    assert position_edges(1500) == [0, 256, 512, 1024, 1500]


def test_bits_by_position_add_up(model, tokenizer):
    stream = token_stream(tokenizer, corpus.documents("heldout")[:8])
    measured = bits_per_byte(model, tokenizer, stream, 700, 2100)
    parts = measured["by_position"]
    assert [(part["start"], part["stop"]) for part in parts] == [(0, 256), (256, 512), (512, 700)]
    bits = 0.0
    for start in np.linspace(0, len(stream) - 700, 3).astype(int):
        window = stream[start : start + 700]
        sizes = [len(tokenizer.decode(window[:edge], skip_special_tokens=True).encode()) for edge in (256, 512, 700)]
        bits += sum(part["bits_per_byte"] * size for part, size in zip(parts, np.diff([0, *sizes]), strict=True))
    assert bits / measured["num_bytes"] == pytest.approx(measured["bits_per_byte"], rel=0.01)
    assert all(0 < part["stderr"] < part["bits_per_byte"] for part in parts)


def test_a_model_that_fails_beyond_its_training_length_shows_it(model, tokenizer, monkeypatch):
    """Hidden states at position 32 and beyond are those of nonsense."""
    monkeypatch.setattr(perplexity, "FIRST_EDGE", 32)
    stream = token_stream(tokenizer, ["river stone quiet morning " * 40])
    trained = Qwen3ForCausalLM(model.config)
    optimizer = torch.optim.Adam(trained.parameters(), lr=2e-2)
    ids = torch.from_numpy(stream[:33].astype(np.int64))[None]
    for _ in range(10):
        optimizer.zero_grad()
        trained(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    def spoiled(module, args, output):
        output.last_hidden_state[:, 32:] = output.last_hidden_state[:, 32:].flip(-1)

    trained.model.register_forward_hook(spoiled)
    near, far = bits_per_byte(trained, tokenizer, stream, 64, 128)["by_position"]
    assert far["bits_per_byte"] > 1.5 * near["bits_per_byte"]


@pytest.mark.parametrize("change", ["bias", "scale", "cap"])
def test_logits_that_are_not_those_of_the_head_are_refused(model, tokenizer, change):
    other = Qwen3ForCausalLM(model.config)
    with torch.no_grad():
        other.lm_head.weight.mul_(50)
    if change == "bias":
        other.lm_head.bias = torch.nn.Parameter(torch.randn(len(tokenizer)) * 30)
    else:
        function = (lambda x: x / 2) if change == "scale" else (lambda x: 2 * torch.tanh(x / 2))
        other.lm_head.register_forward_hook(lambda module, args, output: function(output))
    stream = token_stream(tokenizer, corpus.documents("heldout")[:2])
    with pytest.raises(NotImplementedError, match="must be the output embeddings times the hidden states, got a Qwen3"):
        bits_per_byte(other, tokenizer, stream, 64, 64)
