"""Needle episodes have the stated contents and length, and recall counts exactly the answers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from halo.settings import HaloError
from halo.demo import corpus
from halo.demo.train_teacher import train_tokenizer
from halo.evaluation.needle import NUM_DIGITS, NeedleTask, recall, recall_per_episode, token_stream


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(corpus.documents("heldout"), seed=0)


@pytest.fixture(scope="module")
def stream(tokenizer):
    return token_stream(tokenizer, corpus.documents("heldout")[:8])


@pytest.fixture(scope="module")
def task(tokenizer, stream):
    return NeedleTask(tokenizer, stream)


class Oracle:
    """Predicts the next token, except at `num_wrong` of the answers' positions."""

    device = torch.device("cpu")
    training = False

    def __init__(self, vocab_size: int, wrong_from_end: int | None = None):
        self.vocab_size, self.wrong_from_end = vocab_size, wrong_from_end

    def eval(self):
        return self

    def train(self, mode: bool):
        return self

    def __call__(self, input_ids, use_cache, logits_to_keep):
        targets = input_ids.roll(-1, dims=1)
        if self.wrong_from_end is not None:
            targets[:, -self.wrong_from_end - 1] += 1
        logits = torch.nn.functional.one_hot(targets % self.vocab_size, self.vocab_size)[:, -logits_to_keep:]
        return SimpleNamespace(logits=logits.float())


def test_same_seed_same_episode(task):
    first, second = (task.episode(np.random.default_rng(7), 256) for _ in range(2))
    other = task.episode(np.random.default_rng(8), 256)
    assert np.array_equal(first.input_ids, second.input_ids) and first.answers == second.answers
    assert first.answers != other.answers


@pytest.mark.parametrize(
    ("length", "num_needles", "num_queries"),
    [(128, 4, 3), (257, 1, 1), (1000, 8, 8), (200_000, 4, 3)],  # the last is longer than the haystack
)
def test_length_is_exact(task, length, num_needles, num_queries):
    episode = task.episode(np.random.default_rng(0), length, num_needles, num_queries)
    assert episode.input_ids.shape == (length,)
    assert len(episode.needle_starts) == num_needles
    assert len(episode.answers) == num_queries


def test_shortest_episode_is_all_needles(task):
    length = task.min_length(4, 3)
    assert len(task.episode(np.random.default_rng(0), length).input_ids) == length
    message = f"needle task: length must be at least {length} with this tokenizer, got {length - 1}$"
    with pytest.raises(HaloError, match=message):
        task.episode(np.random.default_rng(0), length - 1)


def test_more_queries_than_needles_is_an_error(task):
    with pytest.raises(ValueError, match=r"needles must be from the number of queries \(3\) to \d+, .* got 2"):
        task.episode(np.random.default_rng(0), 512, num_needles=2, num_queries=3)


def test_answers_are_in_the_text(task, tokenizer):
    rng = np.random.default_rng(3)
    for _ in range(20):
        episode = task.episode(rng, 400)
        digits = np.arange(NUM_DIGITS)
        answers = [tokenizer.decode(ids).strip() for ids in episode.input_ids[episode.answer_starts[:, None] + digits]]
        needles = [tokenizer.decode(ids).strip() for ids in episode.input_ids[episode.needle_starts[:, None] + digits]]
        assert tuple(answers) == episode.answers
        assert set(answers) <= set(needles) and len(needles) == 4
        # The whole sentence, with its key, occurs twice: as a needle and as the query.
        text = tokenizer.decode(episode.input_ids)
        for answer in answers:
            sentence = next(line for line in text.splitlines() if line.endswith(f" is {answer}."))
            assert sentence.startswith("The magic number for ") and text.count(sentence) == 2


def test_spliced_sentence_tokenises_to_itself(task, tokenizer):
    episode = task.episode(np.random.default_rng(5), task.min_length(4, 3), 4, 3)
    text = tokenizer.decode(episode.input_ids[1:])
    assert tokenizer.encode(text, add_special_tokens=False) == episode.input_ids[1:].tolist()


def test_depths_cover_the_text(task):
    rng = np.random.default_rng(0)
    starts = np.concatenate([task.episode(rng, 1000).needle_starts for _ in range(50)])
    assert starts.min() < 100 and starts.max() > 800 and 350 < starts.mean() < 600


@pytest.mark.parametrize("batch_size", [1, 4])
def test_oracle_recalls_everything(tokenizer, stream, batch_size):
    score = recall(Oracle(len(tokenizer)), tokenizer, 256, 10, haystack=stream, batch_size=batch_size)
    assert score == {"recall": 1.0, "stderr": 0.0, "n": 30}


@pytest.mark.parametrize(("wrong_from_end", "expected"), [(2, 2 / 3), (1, 1.0), (NUM_DIGITS + 1, 2 / 3), (7, 1.0)])
def test_one_wrong_digit_spoils_its_answer_only(tokenizer, stream, wrong_from_end, expected):
    """Counted from the end of an episode: the full stop is token 1, the last answer's digits are tokens 2 to 6."""
    model = Oracle(len(tokenizer), wrong_from_end)
    scores = recall_per_episode(model, NeedleTask(tokenizer, stream), 256, 5)
    assert scores.tolist() == pytest.approx([expected] * 5)


def test_random_model_recalls_nothing(tokenizer, stream):
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        )
    )
    assert recall(model, tokenizer, 256, 20, haystack=stream, batch_size=20)["recall"] == 0.0
    assert model.training  # unchanged
