"""The shipped teacher is small, loads with transformers and recalls needles; its training resumes after a kill."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from halo.demo import corpus
from halo.demo.train_teacher import TRAINING_LENGTH, Recipe, Run
from halo.evaluation.needle import NeedleTask, recall, token_stream
from halo.evaluation.perplexity import bits_per_byte

TEACHER = Path(__file__).parents[1] / "halo" / "demo" / "teacher"
MAX_BYTES = 8_000_000
MIN_RECALL = 0.95


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TEACHER)


@pytest.fixture(scope="module")
def heldout(tokenizer):
    return token_stream(tokenizer, corpus.documents("heldout"))


def test_is_a_small_qwen3(model):
    assert isinstance(model, Qwen3ForCausalLM)
    assert model.config.max_position_embeddings == TRAINING_LENGTH
    assert sum(file.stat().st_size for file in TEACHER.iterdir()) <= MAX_BYTES


def test_recalls_at_its_training_length(model, tokenizer, heldout):
    score = recall(model, tokenizer, TRAINING_LENGTH, 24, seed=1234, haystack=heldout, batch_size=8)
    assert score["n"] == 72 and score["recall"] >= MIN_RECALL


def test_recall_is_greedy_decoding(model, tokenizer, heldout):
    task, rng, length = NeedleTask(tokenizer, heldout), np.random.default_rng(2), 300
    right = []
    for _ in range(4):
        episode = task.episode(rng, length, num_needles=4, num_queries=1)
        prompt = torch.from_numpy(episode.input_ids[None, : episode.answer_starts[0]])
        mask = torch.ones_like(prompt)
        output = model.generate(prompt, attention_mask=mask, max_new_tokens=task.answer_length, do_sample=False)
        right.append(tokenizer.decode(output[0, prompt.shape[1] :]).strip() == episode.answers[0])
    score = recall(model, tokenizer, length, 4, seed=2, haystack=heldout, num_queries=1)
    assert score["recall"] == np.mean(right)


def test_models_its_text(model, tokenizer, heldout):
    """The measured bits per byte agree with the recorded value, and the recorded recall is high enough."""
    recorded = json.loads((TEACHER / "metrics.json").read_text())
    measured = bits_per_byte(model, tokenizer, heldout, TRAINING_LENGTH, 16384, batch_size=8)
    expected = recorded[f"bits_per_byte_{TRAINING_LENGTH}"]["bits_per_byte"]
    assert measured["bits_per_byte"] == pytest.approx(expected, abs=4 * measured["stderr"])
    assert recorded[f"recall_{TRAINING_LENGTH}"]["recall"] >= MIN_RECALL
    assert {"tokens", "seed", "parameters", "versions"} <= recorded.keys()


def test_corpus_is_split_by_document():
    train, heldout = corpus.documents("train"), corpus.documents("heldout")
    assert not set(train) & set(heldout)
    assert len(heldout) > 10 and sum(map(len, train)) > 4_000_000
    assert train == corpus.documents("train")
    with pytest.raises(ValueError, match="split must be one of"):
        corpus.documents("test")


def test_a_killed_run_resumes(tmp_path, monkeypatch):
    sample = corpus.documents("heldout")[:6]
    monkeypatch.setattr(corpus, "documents", lambda split: sample)
    recipe = Recipe(num_tokens=6 * 512, batch_tokens=512)

    def start(run_dir: Path) -> Run:
        settings = {"seed": 3, "log_every": 1, "evaluate_every": 1000, "checkpoint_seconds": 0.0}
        return Run(argparse.Namespace(run_dir=run_dir, **settings), recipe)

    whole = start(tmp_path / "whole")
    whole.train()

    killed = start(tmp_path / "killed")
    batch = killed.batches.batch
    monkeypatch.setattr(killed.batches, "batch", lambda step, progress: batch(step, progress) if step < 4 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        killed.train()
    resumed = start(tmp_path / "killed")
    assert resumed.step == 4
    resumed.train()

    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=0, atol=0)
