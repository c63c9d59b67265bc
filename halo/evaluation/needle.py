"""Key-value recall in the style of RULER's needle tasks.

An episode is text with needles at random depths and queries at its end:

    ... text ...
    The magic number for quiet river is 48213.
    ... text ...
    The magic number for quiet river is 48213.      <- a query: the model has to predict the digits

One generator serves the training of the demo's teacher, the choice of layers and the evaluation at any length. It
inserts needles between two tokens of the text, so an episode has exactly the requested length, but its decoded text may
be tokenised differently at the cuts. A key is two words of one token each, drawn from all such words of the vocabulary;
the keys of an episode have no word in common.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

NUM_DIGITS = 5
NEEDLE_PREFIX = "\nThe magic number for"
NEEDLE_LINK = " is"
NEEDLE_END = "."
MIN_WORD_LETTERS = 4


@dataclass(frozen=True)
class Episode:
    """One recall episode."""

    input_ids: np.ndarray  # [length], int64
    needle_starts: np.ndarray  # [num_needles], position of the first digit of each needle's value
    answer_starts: np.ndarray  # [num_queries], position of the first digit of each answer
    answers: tuple[str, ...]  # the digits, in the order of the queries


class NeedleTask:
    """Makes episodes from one token stream.

    Args:
        tokenizer: The tokenizer of the stream.
        haystack: The text, as `token_stream` returns it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, haystack: np.ndarray) -> None:
        self.haystack = haystack
        self.bos = _bos(tokenizer)

        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

        self.prefix, self.link, self.end = encode(NEEDLE_PREFIX), encode(NEEDLE_LINK), encode(NEEDLE_END)
        self.newline = encode("\n")
        # A value follows a space, which a byte-level BPE merges with the first digit or keeps as a token of its own.
        spaced = [encode(f" {digit}") for digit in range(10)]
        self.link += spaced[0][:-1]
        self.first_digit = np.array([ids[-1] for ids in spaced])
        self.next_digit = np.array([encode(str(digit))[-1] for digit in range(10)])
        self.words = key_words(tokenizer)
        self.query_length = len(self.prefix) + 2 + len(self.link) + NUM_DIGITS + len(self.end)
        self.needle_length = self.query_length + len(self.newline)
        self._answer_offset = len(self.prefix) + 2 + len(self.link)

    def min_length(self, num_needles: int, num_queries: int) -> int:
        """Return the smallest number of tokens of an episode."""
        return 1 + num_needles * self.needle_length + num_queries * self.query_length

    def episode(self, rng: np.random.Generator, length: int, num_needles: int = 4, num_queries: int = 3) -> Episode:
        """Make an episode of exactly `length` tokens, which begins with the start-of-text token.

        Raises:
            ValueError: If the needles and queries do not fit, or there are more queries than needles.
        """
        num_text = length - self.min_length(num_needles, num_queries)
        if num_text < 0 or not 1 <= num_queries <= num_needles:
            raise ValueError(
                f"NeedleTask.episode: {num_needles} needles and {num_queries} queries need 1 <= queries <= needles "
                f"and at least {self.min_length(num_needles, num_queries)} tokens, got {length}"
            )
        start = rng.integers(0, max(1, len(self.haystack) - num_text + 1))
        text = np.resize(self.haystack[start : start + num_text], num_text)
        depths = np.sort(rng.integers(0, num_text + 1, size=num_needles))
        words = rng.choice(self.words, size=(num_needles, 2), replace=False)
        digits = rng.integers(0, 10, size=(num_needles, NUM_DIGITS))
        sentences = [self._sentence(words[i], digits[i]) for i in range(num_needles)]

        pieces: list[Any] = [[self.bos]]
        needle_starts, position, cut = [], 1, 0
        for sentence, depth in zip(sentences, depths, strict=True):
            pieces += [text[cut:depth], sentence, self.newline]
            needle_starts.append(position + depth - cut + self._answer_offset)
            position += depth - cut + self.needle_length
            cut = depth
        pieces.append(text[cut:])
        asked = rng.permutation(num_needles)[:num_queries]
        pieces += [sentences[i] for i in asked]
        return Episode(
            input_ids=np.concatenate(pieces).astype(np.int64),
            needle_starts=np.array(needle_starts),
            answer_starts=self.answer_starts(length, num_queries),
            answers=tuple("".join(map(str, digits[i])) for i in asked),
        )

    def answer_starts(self, length: int, num_queries: int) -> np.ndarray:
        """Return where the answers begin, which is the same in all episodes of this length and number of queries."""
        return length - self.query_length * np.arange(num_queries, 0, -1) + self._answer_offset

    def _sentence(self, words: np.ndarray, digits: np.ndarray) -> np.ndarray:
        value = [self.first_digit[digits[0]], *self.next_digit[digits[1:]]]
        return np.array([*self.prefix, *words, *self.link, *value, *self.end])


def key_words(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Return the ids of all tokens that consist of a space and a lower-case word."""
    words = []
    for index in range(len(tokenizer)):
        text = str(tokenizer.decode([index]))
        word = text[1:]
        if text[:1] == " " and len(word) >= MIN_WORD_LETTERS and word.isascii() and word.isalpha() and word.islower():
            words.append(index)
    return np.array(words)


def token_stream(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str]) -> np.ndarray:
    """Tokenise documents into one array, each preceded by a start-of-text token."""
    encoded = tokenizer(list(documents), add_special_tokens=False)["input_ids"]
    return np.concatenate([np.array([_bos(tokenizer), *ids], dtype=np.int32) for ids in encoded])


@torch.no_grad()
def recall_per_episode(
    model: PreTrainedModel,
    task: NeedleTask,
    length: int,
    num_samples: int,
    seed: int = 0,
    *,
    num_needles: int = 4,
    num_queries: int = 3,
    batch_size: int = 1,
) -> np.ndarray:
    """Measure, for each episode, the share of answers that greedy decoding gets right in all digits.

    One forward pass per batch is enough: greedy decoding gets an answer right exactly if each digit is the argmax after
    the true text before it.

    Args:
        model: A causal language model whose forward takes `logits_to_keep`.
        task: Makes the episodes.
        length: Tokens per episode.
        num_samples: Number of episodes.
        seed: Seed of the episodes.
        num_needles: Needles per episode.
        num_queries: Queries per episode.
        batch_size: Episodes per forward pass.

    Returns:
        float64 [num_samples].
    """
    rng = np.random.default_rng(seed)
    num_logits = num_queries * task.query_length
    starts = task.answer_starts(length, num_queries) - (length - num_logits)
    positions = torch.from_numpy(starts[:, None] + np.arange(NUM_DIGITS))  # [num_queries, NUM_DIGITS]
    was_training = model.training
    model.eval()
    scores = []
    for first in range(0, num_samples, batch_size):
        count = min(batch_size, num_samples - first)
        episodes = [task.episode(rng, length, num_needles, num_queries).input_ids for _ in range(count)]
        input_ids = torch.from_numpy(np.stack(episodes)).to(model.device)
        logits = model(input_ids=input_ids, use_cache=False, logits_to_keep=num_logits).logits
        # The logits at position i are about token i + 1.
        predicted = logits.argmax(-1)[:, positions - 1].cpu()
        expected = input_ids[:, -num_logits:][:, positions].cpu()
        scores.append((predicted == expected).all(-1).double().mean(-1))
    model.train(was_training)
    return torch.cat(scores).numpy()


def recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    num_samples: int = 50,
    seed: int = 0,
    *,
    haystack: np.ndarray | None = None,
    num_needles: int = 4,
    num_queries: int = 3,
    batch_size: int = 1,
) -> dict[str, float]:
    """Measure recall at `length` tokens; arguments are those of `recall_per_episode`, and:

    Args:
        tokenizer: The model's tokenizer.
        haystack: A token stream; by default the held-out text of the standard library.

    Returns:
        recall; stderr over episodes, because answers of one episode are not independent; n, the number of answers.
    """
    if haystack is None:
        from halo.demo.corpus import documents

        haystack = token_stream(tokenizer, documents("heldout"))
    task, counts = NeedleTask(tokenizer, haystack), {"num_needles": num_needles, "num_queries": num_queries}
    scores = recall_per_episode(model, task, length, num_samples, seed, **counts, batch_size=batch_size)
    stderr = float(np.std(scores, ddof=1)) / math.sqrt(num_samples) if num_samples > 1 else float("nan")
    return {"recall": float(np.mean(scores)), "stderr": stderr, "n": num_samples * num_queries}


def _bos(tokenizer: PreTrainedTokenizerBase) -> int:
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if bos is None:
        raise ValueError("needle: the tokenizer needs a bos or an eos token, got neither")
    return bos
