"""Key-value recall in the style of RULER's needle tasks.

An episode is text with needles at random depths and queries at its end:

    ... text ...
    The magic number for quiet river is 48213.
    ... text ...
    The magic number for quiet river is 48213.      <- a query: the model has to predict the digits

One generator serves the training of the demo's teacher, the choice of layers and the evaluation at any length. It
inserts needles between two tokens of the text, so an episode has exactly the requested length, but its decoded text may
be tokenised differently at the cuts. A key is two words, the value is written as the tokenizer writes a number; the
keys of an episode have no word in common. `halo.evaluation.ruler` has tasks with free generation.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halo.evaluation.vocabulary import continuation, key_words, numbers
from halo.settings import HaloError

NUM_DIGITS = 5
NUM_NEEDLES, NUM_QUERIES = 4, 3
NEEDLE_PREFIX = "\nThe magic number for"
NEEDLE_LINK = " is"
NEEDLE_END = "."


@dataclass(frozen=True)
class Episode:
    """One recall episode."""

    input_ids: np.ndarray  # [length], int64
    needle_starts: np.ndarray  # [num_needles], position of the first token of each needle's value
    answer_starts: np.ndarray  # [num_queries], position of the first token of each answer
    answers: tuple[str, ...]  # the digits, in the order of the queries


class TooShort(HaloError, ValueError):
    """The needles of a task do not fit into the length asked for."""

    def __init__(self, least: int, length: int) -> None:
        super().__init__(f"needle task: length must be at least {least} with this tokenizer, got {length}")


class NeedleTask:
    """Makes episodes from one token stream. Once made, it needs no tokenizer.

    Args:
        tokenizer: The tokenizer of the stream.
        haystack: The text, as `token_stream` returns it.

    Attributes:
        answer_length: Tokens of a value.
        query_length: Tokens of a query.
        needle_length: Tokens of a needle.

    Raises:
        HaloError: If the haystack is empty, or the tokenizer cannot write words and numbers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, haystack: np.ndarray) -> None:
        self.haystack = _some_text(haystack)
        self.bos = start_token(tokenizer)
        self.words = key_words(tokenizer)
        self.values = numbers(tokenizer, NUM_DIGITS)
        self.prefix, self.end = continuation(tokenizer, NEEDLE_PREFIX), continuation(tokenizer, NEEDLE_END)
        self.link = [*continuation(tokenizer, NEEDLE_LINK), *self.values.lead]
        self.newline = continuation(tokenizer, "\n")
        self.answer_length = self.values.tokens.shape[1]
        self._answer_offset = len(self.prefix) + 2 * self.words.shape[1] + len(self.link)
        self.query_length = self._answer_offset + self.answer_length + len(self.end)
        self.needle_length = self.query_length + len(self.newline)

    def of(self, haystack: np.ndarray) -> "NeedleTask":
        """Return this task with other text; the keys and values, which take time to find, are shared."""
        other = copy.copy(self)
        other.haystack = _some_text(haystack)
        return other

    def min_length(self, num_needles: int = NUM_NEEDLES, num_queries: int = NUM_QUERIES) -> int:
        """Return the smallest number of tokens of an episode."""
        return 1 + num_needles * self.needle_length + num_queries * self.query_length

    def episode(
        self,
        rng: np.random.Generator,
        length: int,
        num_needles: int = NUM_NEEDLES,
        num_queries: int = NUM_QUERIES,
    ) -> Episode:
        """Make an episode of exactly `length` tokens, which begins with the start-of-text token.

        Raises:
            ValueError: If there are more queries than needles, or more needles than the vocabulary has words for.
            TooShort: If the needles and queries do not fit.
        """
        if not 1 <= num_queries <= num_needles <= len(self.words) // 2:
            raise ValueError(
                f"needle task: needles must be from the number of queries ({num_queries}) to {len(self.words) // 2}, "
                f"half of this tokenizer's words, got {num_needles}"
            )
        least = self.min_length(num_needles, num_queries)
        num_text = length - least
        if num_text < 0:
            raise TooShort(least, length)
        start = rng.integers(0, max(1, len(self.haystack) - num_text + 1))
        text = np.resize(self.haystack[start : start + num_text], num_text)
        depths = np.sort(rng.integers(0, num_text + 1, size=num_needles))
        words = rng.choice(self.words, size=(num_needles, 2), replace=False)
        values = rng.choice(len(self.values.texts), size=num_needles, replace=False)
        sentences = [self._sentence(words[i], values[i]) for i in range(num_needles)]

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
            answers=tuple(str(self.values.texts[values[i]]) for i in asked),
        )

    def answer_starts(self, length: int, num_queries: int) -> np.ndarray:
        """Return where the answers begin, which is the same in all episodes of this length and number of queries."""
        return length - self.query_length * np.arange(num_queries, 0, -1) + self._answer_offset

    def _sentence(self, words: np.ndarray, value: int) -> np.ndarray:
        return np.array([*self.prefix, *words.flatten(), *self.link, *self.values.tokens[value], *self.end])


def token_stream(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str]) -> np.ndarray:
    """Tokenise documents into one array, each preceded by a start-of-text token."""
    encoded = tokenizer(list(documents), add_special_tokens=False)["input_ids"]
    return np.concatenate([np.array([start_token(tokenizer), *ids], dtype=np.int32) for ids in encoded])


@torch.no_grad()
def recall_per_episode(
    model: PreTrainedModel,
    task: NeedleTask,
    length: int,
    num_samples: int,
    seed: int | Sequence[int] = 0,
    *,
    num_needles: int = NUM_NEEDLES,
    num_queries: int = NUM_QUERIES,
    batch_size: int = 1,
) -> np.ndarray:
    """Measure, for each episode, the share of answers that greedy decoding gets right in all digits.

    One forward pass per batch is enough: greedy decoding gets an answer right exactly if each of its tokens is the
    argmax after the true text before it.

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
    positions = torch.from_numpy(starts[:, None] + np.arange(task.answer_length))  # [num_queries, answer_length]
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
    seed: int | Sequence[int] = 0,
    *,
    haystack: np.ndarray | None = None,
    num_needles: int = NUM_NEEDLES,
    num_queries: int = NUM_QUERIES,
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
    value, stderr = mean_and_error(scores)
    return {"recall": value, "stderr": stderr, "n": num_samples * num_queries}


def mean_and_error(scores: np.ndarray) -> tuple[float, float]:
    """Return the mean of scores and its standard error, NaN for a single one."""
    error = float(np.std(scores, ddof=1)) / math.sqrt(len(scores)) if len(scores) > 1 else math.nan
    return float(np.mean(scores)), error


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that begins a text: BOS, or EOS where there is none."""
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if bos is None:
        raise HaloError("needle task: the tokenizer must have a BOS or an EOS token, got neither")
    return bos


def _some_text(haystack: np.ndarray) -> np.ndarray:
    if not len(haystack):
        raise HaloError("needle task: the text around the needles must hold at least one token, got none")
    return haystack
