"""Retrieval with free generation, after RULER's needle tasks (arXiv 2404.06654), on local text and at any length.

A prompt is an instruction, a haystack with one or more needles, and a question whose answer is generated greedily
through the cache. An answer counts if the text contains the value.

    task         haystack                 key         value      needles
    s1           one repeated sentence    two words   number     1
    s2           text                     two words   number     1
    s3           text                     two words   UUID       1
    multikey     text                     two words   number     4
    multikey2    other needles            two words   number     as many as fit
    multikey3    other needles            UUID        UUID       as many as fit

The wording is our own, so scores compare with each other and not with published ones; for those use the tasks niah_*
of lm-evaluation-harness (`halo.evaluation.harness`).
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from halo.evaluation.needle import TooShort, start_token
from halo.evaluation.vocabulary import continuation, key_words
from halo.settings import HaloError

NUM_DIGITS = 7  # RULER's
EXTRA_TOKENS = 16  # generated beyond those of the value, for models that do not answer with it at once
NOISE = " The rain falls on the hill, the wind moves the reeds, and the path goes on."


@dataclass(frozen=True)
class Kind:
    """One line of the table above."""

    haystack: Literal["noise", "text", "needles"]
    key: Literal["words", "uuid"]
    value: Literal["number", "uuid"]
    needles: int = 1


KINDS = {
    "s1": Kind("noise", "words", "number"),
    "s2": Kind("text", "words", "number"),
    "s3": Kind("text", "words", "uuid"),
    "multikey": Kind("text", "words", "number", needles=4),
    "multikey2": Kind("needles", "words", "number"),
    "multikey3": Kind("needles", "uuid", "uuid"),
}


@dataclass(frozen=True)
class Sample:
    """A prompt [T], int64, and the text that the answer must contain."""

    input_ids: np.ndarray
    answer: str


class RulerTask:
    """Makes the prompts of one task.

    Args:
        name: A key of KINDS.
        tokenizer: The model's tokenizer.
        haystack: The text, as `token_stream` returns it; not used by the tasks that have none.
        digits: Digits of a number.

    Attributes:
        max_new_tokens: Tokens to generate for an answer; a prompt is shorter than its length by as many.

    Raises:
        HaloError: If there is no such task, the haystack is empty, or the tokenizer cannot write words.
    """

    def __init__(
        self, name: str, tokenizer: PreTrainedTokenizerBase, haystack: np.ndarray, digits: int = NUM_DIGITS
    ) -> None:
        if name not in KINDS:
            raise HaloError(f"ruler: task must be one of {', '.join(KINDS)}, got {name}")
        self.name, self.kind, self.tokenizer, self.haystack = name, KINDS[name], tokenizer, haystack
        self.digits = digits
        if self.kind.haystack == "text" and not len(haystack):
            raise HaloError("needle task: the text around the needles must hold at least one token, got none")
        self.bos = start_token(tokenizer)
        self.words = key_words(tokenizer) if self.kind.key == "words" else None
        self.noise = self._write(NOISE)
        self.newline = self._write("\n")
        noun = self.kind.value
        self.instruction = self._write(
            f"The text below mentions the magic {noun} for one or several names. A question about it follows the text."
        )
        # Keys and values differ by a few tokens: the longest of some are the limit for all.
        self._needle_length = self._question_length = 10**9
        rng = np.random.default_rng(0)
        written = [self._pair(rng) for _ in range(64)]
        self._needle_length = max(len(self._needle(*pair)) for pair in written)
        self._question_length = max(len(self._question(key)) for key, _ in written)
        self.max_new_tokens = max(len(self._write(f" {value}")) for _, value in written) + EXTRA_TOKENS
        if not self.is_right(written[0][1], self._write(f" {written[0][1]}")):
            raise HaloError(f"needle task: the tokenizer must be able to write a {noun}, got one that cannot")

    def min_length(self) -> int:
        """Return the smallest number of tokens of a prompt with its answer."""
        fixed = 1 + len(self.instruction) + 2 * len(self.newline) + self._question_length + self.max_new_tokens
        return fixed + self.kind.needles * (self._needle_length + len(self.newline))

    def sample(self, rng: np.random.Generator, length: int) -> Sample:
        """Make a prompt of exactly `length - max_new_tokens` tokens.

        Raises:
            TooShort: If the needles and the question do not fit.
        """
        if length < self.min_length():
            raise TooShort(self.min_length(), length)
        pairs = self._pairs(rng, self.kind.needles)
        key, value = pairs[0]
        question = self._question(key)
        head = [self.bos, *self.instruction, *self.newline]
        num_text = length - self.max_new_tokens - len(head) - len(question) - len(self.newline)
        body = self._body(rng, pairs, num_text)
        return Sample(np.array([*head, *body, *self.newline, *question], dtype=np.int64), value)

    def is_right(self, answer: str, generated: Sequence[int]) -> bool:
        """Return whether generated tokens contain the answer, regardless of spaces and case."""
        text = str(self.tokenizer.decode(list(generated), skip_special_tokens=True))
        return "".join(answer.split()).lower() in "".join(text.split()).lower()

    def _body(self, rng: np.random.Generator, pairs: list[tuple[str, str]], size: int) -> list[int]:
        """Return `size` tokens of haystack with needles at random depths."""
        needles = [[*self.newline, *self._needle(*pair)] for pair in pairs]
        if self.kind.haystack == "needles":
            return self._distractors(rng, needles, {key for key, _ in pairs}, size)
        room = size - sum(map(len, needles))
        text, step = self._text(rng, room)
        depths = np.sort(rng.integers(0, room // step + 1, size=len(needles))) * step
        body, cut = [], 0
        for place, depth in zip(rng.permutation(len(needles)), depths, strict=True):
            body += [*text[cut:depth], *needles[place]]
            cut = depth
        return [*body, *text[cut:]]

    def _text(self, rng: np.random.Generator, size: int) -> tuple[list[int], int]:
        """Return `size` tokens, and the distance of the places where a needle may be put."""
        if self.kind.haystack == "noise":
            return np.resize(self.noise, size).tolist(), len(self.noise)
        start = rng.integers(0, max(1, len(self.haystack) - size + 1))
        return np.resize(self.haystack[start : start + size], size).tolist(), 1

    def _distractors(self, rng: np.random.Generator, needles: list[list[int]], keys: set[str], size: int) -> list[int]:
        lines = list(needles)
        filled = sum(map(len, lines))
        while True:
            key, value = self._pair(rng)
            line = [*self.newline, *self._needle(key, value)]
            if filled + len(line) > size:
                break
            if key not in keys:
                keys.add(key)
                lines.append(line)
                filled += len(line)
        body = [token for place in rng.permutation(len(lines)) for token in lines[place]]
        return [*body, *np.resize(self.noise, size - filled).tolist()]

    def _pairs(self, rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
        pairs: dict[str, str] = {}
        while len(pairs) < count:
            key, value = self._pair(rng)
            pairs.setdefault(key, value)
        return list(pairs.items())

    def _pair(self, rng: np.random.Generator) -> tuple[str, str]:
        """Return a key and a value that fit into the least length."""
        while True:
            key, value = self._key(rng), _random_uuid(rng)
            if self.kind.value == "number":
                value = str(rng.integers(10 ** (self.digits - 1), 10**self.digits))
            fits = len(self._needle(key, value)) <= self._needle_length
            if fits and len(self._question(key)) <= self._question_length:
                return key, value

    def _key(self, rng: np.random.Generator) -> str:
        if self.words is None:
            return _random_uuid(rng)
        chosen = rng.choice(self.words, size=2, replace=False)
        return " ".join(str(self.tokenizer.decode(ids.tolist())).strip() for ids in chosen)

    def _needle(self, key: str, value: str) -> list[int]:
        return self._write(f"The magic {self.kind.value} for {key} is {value}.")

    def _question(self, key: str) -> list[int]:
        noun = self.kind.value
        return self._write(f"What is the magic {noun} for {key}, according to the text?\nThe magic {noun} for {key} is")

    def _write(self, text: str) -> list[int]:
        return continuation(self.tokenizer, text)


@torch.no_grad()
def generated_recall(
    model: PreTrainedModel,
    task: RulerTask,
    length: int,
    num_samples: int,
    seed: int | Sequence[int] = 0,
    batch_size: int = 1,
) -> np.ndarray:
    """Generate the answers of prompts at `length` tokens and return which are right, float64 [num_samples].

    Args:
        model: A causal language model with `generate`.
        task: Makes the prompts.
        length: Tokens of prompt and answer.
        num_samples: Number of prompts.
        seed: Seed of the prompts.
        batch_size: Prompts that are generated from at a time.
    """
    rng = np.random.default_rng(seed)
    was_training = model.training
    model.eval()
    right: list[bool] = []
    while len(right) < num_samples:
        samples = [task.sample(rng, length) for _ in range(min(batch_size, num_samples - len(right)))]
        input_ids = torch.from_numpy(np.stack([sample.input_ids for sample in samples])).to(model.device)
        output = model.generate(  # type: ignore[operator]  # a method that transformers mixes in
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), generation_config=_greedy(model, task)
        )
        answers = output[:, input_ids.shape[1] :].tolist()
        right += [task.is_right(sample.answer, ids) for sample, ids in zip(samples, answers, strict=True)]
    model.train(was_training)
    return np.array(right, dtype=np.float64)


def _greedy(model: PreTrainedModel, task: RulerTask) -> GenerationConfig:
    saved = model.generation_config
    eos = saved.eos_token_id if saved.eos_token_id is not None else task.tokenizer.eos_token_id
    pad = task.tokenizer.pad_token_id
    if pad is None:
        pad = eos[0] if isinstance(eos, list) else eos
    return GenerationConfig(
        max_new_tokens=task.max_new_tokens, do_sample=False, use_cache=True, eos_token_id=eos, pad_token_id=pad
    )


def _random_uuid(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))
