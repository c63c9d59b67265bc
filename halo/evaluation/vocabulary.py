"""How a tokenizer writes words and numbers in the middle of a text, so that needles can be built from tokens.

All keys of a task have the same number of tokens, and so have all values. Episodes then have the same layout, whatever
the tokenizer: one token a word, a byte or a digit, or three digits.
"""

import re
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from halo.settings import HaloError

# Prefixes of tokens that begin with a space: byte-level BPE, SentencePiece, others.
SPACE_MARKS = "Ġ▁ "
MIN_WORD_LETTERS = 4
LEAST_WORDS = 8
MIN_WORDS = 16  # below this, a vocabulary's own words are too few to make keys of
# Text before a piece, so that it is tokenised as a continuation: at the start of a text, some tokenizers add a space.
ANCHORS = ("a", ".", "\n", "")
WORD = re.compile(rf"[a-z]{{{MIN_WORD_LETTERS},}}")

WORDS = """
amber anchor apple autumn badge bamboo basket beacon bishop blanket bottle branch breeze bridge bronze bucket butter
button cabin camera candle canyon carbon carpet castle cedar cherry circle clover coffee copper coral corner cotton
cradle crystal curtain desert dinner donkey dragon eagle engine fabric falcon feather fiddle finger flower forest
fountain garden garlic ginger glacier grape guitar hammer harbor hazel helmet honey island jacket jungle kettle kitten
ladder lantern leather lemon library linen lizard magnet mango maple marble market meadow mirror monkey mountain needle
nickel ocean olive onion orange orchard oyster paddle palace panther paper parrot pebble pencil pepper pigeon pillow
planet pocket potato prairie puzzle rabbit rainbow ribbon river rocket saddle salmon sandal scarf shadow silver spider
spring square summer sunset table temple thunder ticket tiger timber tomato tower tunnel turtle valley velvet violet
violin wagon walnut water willow window winter yellow zebra
""".split()  # noqa: SIM905


@dataclass(frozen=True)
class Numbers:
    """Numbers as a tokenizer writes them after a word.

    Attributes:
        texts: The digits.
        tokens: Their tokens, int64 [count, tokens per number].
        lead: Tokens before the first digit, such as a space of its own.
    """

    texts: np.ndarray
    tokens: np.ndarray
    lead: tuple[int, ...]


def continuations(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the tokens of each text as it is written inside a longer one."""
    if not texts:
        return []
    encode = lambda batch: tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]  # noqa: E731
    for anchor in ANCHORS:
        [head] = encode([anchor]) if anchor else [[]]
        encoded = encode([anchor + text for text in texts])
        if all(ids[: len(head)] == head for ids in encoded):
            return [ids[len(head) :] for ids in encoded]
    raise AssertionError("unreachable: every text begins with the empty anchor")


def continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens of one text as it is written inside a longer one."""
    return continuations(tokenizer, [text])[0]


def key_words(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Return the tokens of words to make keys of, all with the same number of tokens, int64 [words, tokens].

    These are the tokens that consist of a space and a lower-case word, or, in a vocabulary that has few of them, common
    words in several tokens each.

    Raises:
        HaloError: If the tokenizer cannot write as many words as the keys of four needles have.
    """
    single = [
        (index, token[1:])
        for token, index in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        if token[:1] in SPACE_MARKS and WORD.fullmatch(token[1:])
    ]
    written = continuations(tokenizer, [f" {word}" for _, word in single])
    ids = [index for (index, _), tokens in zip(single, written, strict=True) if tokens == [index]]
    if len(ids) >= MIN_WORDS:
        return np.array(ids, dtype=np.int64)[:, None]

    by_size: dict[int, list[list[int]]] = defaultdict(list)
    for word, tokens in zip(WORDS, continuations(tokenizer, [f" {word}" for word in WORDS]), strict=True):
        if _reads_as(tokenizer, tokens, word):
            by_size[len(tokens)].append(tokens)
    enough = [size for size, group in by_size.items() if len(group) >= MIN_WORDS]
    best = min(enough) if enough else max(by_size, key=lambda size: len(by_size[size]), default=0)
    words = by_size.get(best, [])
    if len(words) < LEAST_WORDS:
        raise HaloError(
            f"needle task: the tokenizer must be able to write {LEAST_WORDS} words, got one that writes {len(words)}"
        )
    return np.array(words, dtype=np.int64)


def numbers(tokenizer: PreTrainedTokenizerBase, digits: int, count: int = 2**14) -> Numbers:
    """Return distinct random numbers of `digits` digits, of the most common number of tokens; the same at each call.

    Raises:
        HaloError: If the tokenizer cannot write numbers.
    """
    total = 10**digits
    rng = np.random.default_rng(digits)
    drawn = rng.permutation(total)[:count] if total <= 2**20 else np.unique(rng.integers(0, total, size=count))
    texts = [f"{number:0{digits}d}" for number in drawn]
    layouts: dict[tuple[tuple[int, ...], int], list[int]] = defaultdict(list)
    encoded = continuations(tokenizer, [f" {text}" for text in texts])
    blank = {index for index in {index for ids in encoded for index in ids} if not _shows(tokenizer, index)}
    for place, ids in enumerate(encoded):
        lead = next((number for number, index in enumerate(ids) if index not in blank), len(ids))
        layouts[tuple(ids[:lead]), len(ids) - lead].append(place)
    usual, places = max(layouts.items(), key=lambda entry: len(entry[1]))
    lead_ids, size = usual
    sample = places[:: max(1, len(places) // 16)]
    if not size or not all(_reads_as(tokenizer, encoded[place], texts[place]) for place in sample):
        raise HaloError("needle task: the tokenizer must be able to write numbers, got one that reads back other text")
    tokens = np.array([encoded[place][len(lead_ids) :] for place in places], dtype=np.int64)
    return Numbers(np.array([texts[place] for place in places]), tokens, lead_ids)


def _shows(tokenizer: PreTrainedTokenizerBase, index: int) -> bool:
    """Return whether a token is more than spaces."""
    return bool(str(tokenizer.decode([index])).strip())


def _reads_as(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str) -> bool:
    """Return whether tokens decode to a text, apart from spaces."""
    return "".join(str(tokenizer.decode(ids)).split()) == text
