"""The needle task works with every kind of tokenizer, and says what is wrong with one that cannot write a number."""

import numpy as np
import pytest
from tokenizer_kinds import KINDS, TEXT, gpt2, sentencepiece_bpe, three_digits, whitespace

from halo.evaluation.needle import NUM_DIGITS, NeedleTask, token_stream
from halo.evaluation.vocabulary import continuation, key_words, numbers
from halo.settings import HaloError


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def tokenizer(request):
    return request.param()


@pytest.fixture(scope="module")
def task(tokenizer):
    return NeedleTask(tokenizer, token_stream(tokenizer, TEXT))


def without_spaces(tokenizer, ids):
    return "".join(tokenizer.decode(ids).split())


def test_length_is_exact_and_the_shortest_is_named(task):
    least = task.min_length()
    for length in (least, least + 1, 500 + least):
        assert task.episode(np.random.default_rng(0), length).input_ids.shape == (length,)
    message = f"needle task: length must be at least {least} with this tokenizer, got {least - 1}$"
    with pytest.raises(HaloError, match=message):
        task.episode(np.random.default_rng(0), least - 1)


def test_answers_are_in_the_text(task, tokenizer):
    """Each answer reads as its digits, twice: in its needle and in the query, whose tokens are those of the needle."""
    for seed in range(10):
        episode = task.episode(np.random.default_rng(seed), task.min_length() + 200)
        value = np.arange(task.answer_length)
        answers = [without_spaces(tokenizer, ids) for ids in episode.input_ids[episode.answer_starts[:, None] + value]]
        needles = [without_spaces(tokenizer, ids) for ids in episode.input_ids[episode.needle_starts[:, None] + value]]
        assert tuple(answers) == episode.answers and all(len(answer) == NUM_DIGITS for answer in answers)
        assert len(needles) == 4 and set(answers) <= set(needles)
        text = without_spaces(tokenizer, episode.input_ids)
        for answer in answers:
            before = text[: text.rindex(f"is{answer}.")]
            sentence = before[before.rindex("magicnumberfor") :] + f"is{answer}."
            assert text.count(sentence) == 2


def test_a_query_is_its_needle(task):
    """Token for token, so that copying is enough."""
    episode = task.episode(np.random.default_rng(3), task.min_length() + 100)
    offset = task.answer_starts(task.query_length, 1)[0]
    needles = {tuple(episode.input_ids[start - offset :][: task.query_length]) for start in episode.needle_starts}
    assert len(needles) == 4
    for start in episode.answer_starts:
        assert tuple(episode.input_ids[start - offset :][: task.query_length]) in needles


def test_keys_of_an_episode_share_no_word(task):
    size = task.words.shape[1]
    for seed in range(10):
        episode = task.episode(np.random.default_rng(seed), task.min_length() + 100)
        first = episode.needle_starts - len(task.link) - 2 * size
        words = [tuple(episode.input_ids[start : start + size]) for start in [*first, *(first + size)]]
        assert len(set(words)) == 8


def test_values_are_various(task):
    assert len(task.values.texts) > 1000 and len(set(task.values.texts)) == len(task.values.texts)
    leading = np.bincount([int(text[0]) for text in task.values.texts], minlength=10)
    assert (leading > 0).all()


def test_llama_3_writes_numbers_in_tokens_of_three_digits():
    tokenizer = three_digits()
    task = NeedleTask(tokenizer, token_stream(tokenizer, TEXT))
    assert task.answer_length == 2
    spelled = tokenizer.encode(" " + str(task.values.texts[0]), add_special_tokens=False)
    assert spelled == [*task.values.lead, *task.values.tokens[0]]


def test_numbers_of_uneven_length_are_left_out():
    """Of the numbers that GPT-2's tokenizer writes in different numbers of tokens, the most common kind is used."""
    values = numbers(gpt2(), NUM_DIGITS)
    tokenizer = gpt2()
    for text, ids in zip(values.texts[:50], values.tokens, strict=False):
        assert continuation(tokenizer, f" {text}") == [*values.lead, *ids]


def test_words_of_one_token_are_found_behind_any_mark_of_a_space():
    """This decoder drops the space of the first token, so a token on its own does not read as a word with a space."""
    tokenizer = sentencepiece_bpe()
    words = key_words(tokenizer)
    assert words.shape[1] == 1 and all(tokenizer.convert_ids_to_tokens(int(i)).startswith("▁") for i in words[:, 0])


def test_a_tokenizer_that_cannot_write_numbers_is_refused():
    tokenizer = whitespace()
    with pytest.raises(HaloError, match=r"needle task: the tokenizer must be able to write (8 words|numbers)"):
        NeedleTask(tokenizer, token_stream(tokenizer, TEXT))


def test_an_empty_haystack_is_refused():
    with pytest.raises(HaloError, match="must hold at least one token, got none"):
        NeedleTask(gpt2(), np.zeros(0, np.int32))


def test_a_tokenizer_without_start_and_end_is_refused():
    tokenizer = gpt2()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(HaloError, match="must have a BOS or an EOS token, got neither"):
        NeedleTask(tokenizer, np.zeros(8, np.int32))
