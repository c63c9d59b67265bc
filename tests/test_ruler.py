"""RULER's needle tasks: prompts have the stated contents, and generated answers are judged by them."""

import numpy as np
import pytest
import torch
from tokenizer_kinds import KINDS as TOKENIZERS
from tokenizer_kinds import TEXT, single_digits, whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from halo.demo import corpus
from halo.evaluation import ruler
from halo.evaluation.needle import token_stream
from halo.evaluation.ruler import KINDS, RulerTask, generated_recall
from halo.settings import HaloError


def without_spaces(tokenizer, ids):
    return "".join(tokenizer.decode(ids).split())


@pytest.fixture(scope="module", params=TOKENIZERS, ids=lambda kind: kind.__name__)
def any_tokenizer(request):
    return request.param()


@pytest.fixture(scope="module")
def tokenizer():
    return single_digits()


@pytest.fixture(scope="module")
def stream(tokenizer):
    return token_stream(tokenizer, TEXT)


@pytest.mark.parametrize("name", KINDS)
def test_prompts_have_one_length_and_hold_the_answer(any_tokenizer, name):
    task = RulerTask(name, any_tokenizer, token_stream(any_tokenizer, TEXT))
    least = task.min_length()
    for length in (least, least + 1, least + 500):
        for seed in range(3):
            sample = task.sample(np.random.default_rng(seed), length)
            assert sample.input_ids.shape == (length - task.max_new_tokens,)
            text = without_spaces(any_tokenizer, sample.input_ids)
            asked = f"magic{task.kind.value}for"
            key = text[text.rindex(asked) + len(asked) : text.rindex("is")]
            # The key is in its needle and twice in the question; the answer in the needle alone.
            assert text.count(f"{asked}{key}is{sample.answer}.") == text.count(sample.answer) == 1
            assert text.endswith(f"{asked}{key}is") and text.count(f"{asked}{key}") == 3
            assert task.is_right(sample.answer, task._write(f" {sample.answer}.")), "fits into the tokens generated"
            assert len(task._write(f" {sample.answer}")) <= task.max_new_tokens


@pytest.mark.parametrize("name", KINDS)
def test_least_length_is_named(tokenizer, stream, name):
    task = RulerTask(name, tokenizer, stream)
    least = task.min_length()
    message = f"needle task: length must be at least {least} with this tokenizer, got {least - 1}$"
    with pytest.raises(HaloError, match=message):
        task.sample(np.random.default_rng(0), least - 1)


def needles_in(tokenizer, sample):
    text = tokenizer.decode(sample.input_ids)
    return text[: text.rindex("What is")].count("The magic ")


@pytest.mark.parametrize(("name", "count"), [("s1", 1), ("s2", 1), ("s3", 1), ("multikey", 4)])
def test_number_of_needles(tokenizer, stream, name, count):
    task = RulerTask(name, tokenizer, token_stream(tokenizer, TEXT[-1:]))
    assert needles_in(tokenizer, task.sample(np.random.default_rng(0), 1500)) == count


@pytest.mark.parametrize("name", ["multikey2", "multikey3"])
def test_a_haystack_of_needles_is_full_of_them(tokenizer, stream, name):
    task = RulerTask(name, tokenizer, stream)
    room = 3000 - task.min_length()
    assert needles_in(tokenizer, task.sample(np.random.default_rng(0), 3000)) >= 1 + room // (task._needle_length + 1)


def test_noise_is_not_cut_by_the_needle(tokenizer, stream):
    """The needle is between two sentences, as in RULER."""
    text = tokenizer.decode(RulerTask("s1", tokenizer, stream).sample(np.random.default_rng(5), 1500).input_ids)
    before = text[: text.index("\nThe magic number for")]
    assert before.endswith("the path goes on.") or before.endswith("follows the text.")


def test_depths_and_keys_vary_with_the_seed(tokenizer, stream):
    task = RulerTask("s2", tokenizer, stream)
    places, answers = [], set()
    for seed in range(40):
        sample = task.sample(np.random.default_rng(seed), 2000)
        text = tokenizer.decode(sample.input_ids)
        places.append(text.index(f"is {sample.answer}") / len(text))
        answers.add(sample.answer)
    assert min(places) < 0.25 and max(places) > 0.75 and len(answers) == 40
    again = task.sample(np.random.default_rng(39), 2000)
    assert np.array_equal(again.input_ids, sample.input_ids)


class Echo:
    """Generates the answers that it is given, after some other text."""

    device, training = torch.device("cpu"), False
    generation_config = GenerationConfig()

    def __init__(self, tokenizer, task, wrong=()):
        self.tokenizer, self.task, self.wrong, self.made = tokenizer, task, wrong, 0

    def eval(self):
        return self

    def train(self, mode):
        return self

    def generate(self, input_ids, attention_mask, generation_config):
        assert not generation_config.do_sample and generation_config.max_new_tokens == self.task.max_new_tokens
        rows = []
        for ids in input_ids.tolist():
            text = self.tokenizer.decode(ids)
            key = text[text.rindex("for ") + 4 : text.rindex(" is")]
            start = text.index(f"for {key} is ") + len(f"for {key} is ")
            value = text[start : text.index(".", start)]
            if self.made in self.wrong:
                value = value[:-1] + ("1" if value[-1] == "0" else "0")
            self.made += 1
            rows.append(self.task._write(f" well, {value.upper()}. and"))
        width = max(map(len, rows))
        padded = [row + [self.tokenizer.pad_token_id] * (width - len(row)) for row in rows]
        return torch.cat([input_ids, torch.tensor(padded)], dim=1)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", KINDS)
def test_answers_are_judged_one_by_one(tokenizer, stream, name, batch_size):
    task = RulerTask(name, tokenizer, stream)
    model = Echo(tokenizer, task, wrong={1, 4})
    scores = generated_recall(model, task, task.min_length() + 100, 7, batch_size=batch_size)
    assert scores.tolist() == [1, 0, 1, 1, 0, 1, 1]


def test_what_cannot_be_measured_is_refused(tokenizer, stream):
    with pytest.raises(HaloError, match=r"ruler: task must be one of s1, s2, s3, multikey, .*, got s4"):
        RulerTask("s4", tokenizer, stream)
    with pytest.raises(HaloError, match="must hold at least one token, got none"):
        RulerTask("s2", tokenizer, stream[:0])
    assert RulerTask("s1", tokenizer, stream[:0]).min_length() > 0
    with pytest.raises(HaloError, match="the tokenizer must be able to write"):
        RulerTask("s1", whitespace(), stream)


def test_a_model_generates_through_its_cache(monkeypatch):
    """The demo's teacher was trained to copy the value of a needle, and finds it in text."""
    monkeypatch.setattr(ruler, "EXTRA_TOKENS", 2)
    folder = "halo/demo/teacher"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    task = RulerTask("s2", tokenizer, token_stream(tokenizer, corpus.documents("heldout")[:8]), digits=5)
    seen = []
    forward = model.forward
    model.forward = lambda *a, **k: seen.append(k["input_ids"].shape[1]) or forward(*a, **k)
    scores = generated_recall(model, task, 200, 4, seed=(0, 1), batch_size=4)
    assert seen[0] == 200 - task.max_new_tokens and set(seen[1:]) == {1}
    assert scores.mean() >= 0.5
