"""Which part of which document is trained on, which is held out: by a hash, the same in every run.

A document whose key is below half the held-out share belongs to `choose`, below the whole share to `judge`, else to
`train`. A small corpus that leaves too little to one of them is cut into passages, and the passages with the lowest
hashes are held out until there is enough.
"""

from typing import NamedTuple

import numpy as np

LEAST_TOKENS = 32_768  # of `choose` and of `judge`, but at most
LEAST_SHARE = 1 / 16  # of all tokens
# A passage is a quarter of what a side must have, but at least this many tokens or this share of the text.
MIN_PASSAGE = 512
MIN_SHARE = 1 / 8
TRAIN, CHOOSE, JUDGE = range(3)


class Parts(NamedTuple):
    """Parts of documents, in the order of the text.

    Attributes:
        document: Number of the document, int64 [parts].
        start: First token in the document, int64 [parts].
        length: Tokens, int64 [parts].
        side: 0 train, 1 choose, 2 judge; int8 [parts].
    """

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    side: np.ndarray


def split_documents(keys: np.ndarray, lengths: np.ndarray, share: float, fixed: bool = False) -> Parts:
    """Assign documents to the sides.

    Args:
        keys: Hashes, uint64 [documents].
        lengths: Tokens, int64 [documents].
        share: Share that is held out.
        fixed: Whether the keys alone decide, however little a side gets.

    Returns:
        Whole documents, or in a small corpus passages; neighbours on the same side are one part.
    """
    side = _side(keys, share)
    whole = Parts(np.arange(len(keys)), np.zeros(len(keys), np.int64), lengths, side)
    total = int(lengths.sum())
    least = min(LEAST_TOKENS, int(total * LEAST_SHARE))
    if fixed or all(lengths[side == wanted].sum() >= least for wanted in (CHOOSE, JUDGE)):
        return whole
    wanted = max(least, int(total * share / 2))
    size = max(wanted // 4, min(MIN_PASSAGE, int(total * MIN_SHARE)), 1)
    parts, hashes = _passages(keys, lengths, size)
    order = np.argsort(hashes, kind="stable")
    reached = np.cumsum(parts.length[order])
    first = int(np.searchsorted(reached, wanted)) + 1
    second = int(np.searchsorted(reached, (reached[first - 1] if first <= len(reached) else total) + wanted)) + 1
    parts.side[:] = TRAIN
    parts.side[order[:first]] = CHOOSE
    parts.side[order[first:second]] = JUDGE
    return _joined(parts)


def _side(keys: np.ndarray, share: float) -> np.ndarray:
    place = keys.astype(np.float64) / 2.0**64
    return np.where(place < share / 2, CHOOSE, np.where(place < share, JUDGE, TRAIN)).astype(np.int8)


def _passages(keys: np.ndarray, lengths: np.ndarray, size: int) -> tuple[Parts, np.ndarray]:
    """Cut documents into passages of about `size` tokens, and return them with a hash of each."""
    counts = np.maximum(1, lengths // size)
    document = np.repeat(np.arange(len(keys)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    # Nearly equal passages: passage i of n begins at i * length // n.
    start = number * lengths[document] // counts[document]
    length = (number + 1) * lengths[document] // counts[document] - start
    hashes = _mixed(keys[document] + number.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    hashes = np.where(counts[document] == 1, keys[document], hashes)
    return Parts(document, start, length, np.zeros(len(document), np.int8)), hashes


def _mixed(values: np.ndarray) -> np.ndarray:
    """Return the finaliser of SplitMix64 of 64-bit values."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _joined(parts: Parts) -> Parts:
    same = (parts.document[1:] == parts.document[:-1]) & (parts.side[1:] == parts.side[:-1])
    first = np.flatnonzero(np.concatenate([[True], ~same]))
    length = np.add.reduceat(parts.length, first) if len(first) else parts.length
    return Parts(parts.document[first], parts.start[first], length, parts.side[first])
