"""From a source's records to tasks: the pieces of text that make one shard, always the same for the same source."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from halo.data.encoding import REPLACEMENT, cut, problem_of, replace_surrogates
from halo.data.source import Source
from halo.data.tally import Tally

SHARD_CHARACTERS = 8_000_000
SHARD_DOCUMENTS = 65_536


@dataclass
class ShardTask:
    """The text of one shard, and the header values that are known before it is tokenised.

    A position is [position in the source, pieces of the next record that are used already].
    """

    index: int
    start: Any
    before: float = 0.0  # share of the source that is read at its start
    texts: list[str] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    fraction: float = 0.0
    tally: dict[str, Any] = field(default_factory=dict)
    characters: int = 0
    last: bool = False
    end: Any = None

    def __post_init__(self) -> None:
        self.end = self.start

    @property
    def full(self) -> bool:
        """Whether no more text belongs to it."""
        return self.characters >= SHARD_CHARACTERS or len(self.texts) >= SHARD_DOCUMENTS


def shard_tasks(source: Source, index: int, start: Any, max_document: int) -> Iterator[ShardTask]:
    """Yield the tasks from shard `index` on, which begins at position `start`; None is the beginning.

    Raises:
        HaloError: If the source cannot be read.
    """
    tally = Tally()
    task = ShardTask(index, start)
    for piece in _pieces(source, start, max_document, tally):
        if task.full:
            yield task
            task = ShardTask(task.index + 1, task.end, task.fraction)
        task.texts.append(piece.text)
        task.keys.append(piece.key)
        task.characters += len(piece.text)
        task.end, task.fraction = piece.end, piece.fraction
        if task.full:
            # Taken now, because the source counts what it skips while it looks for the next record.
            task.tally = tally.take()
    rest = tally.take()
    if task.full and rest["records"]:  # what was skipped at the end is counted in a shard of its own
        yield task
        task = ShardTask(task.index + 1, task.end, task.fraction)
    if not task.full:
        task.tally = rest
    task.fraction, task.last = 1.0, True
    yield task


@dataclass(frozen=True)
class _Piece:
    text: str
    key: int
    end: Any
    fraction: float


def _pieces(source: Source, start: Any, size: int, tally: Tally) -> Iterator[_Piece]:
    position, used = start or (None, 0)
    for record in source.read(position, tally):
        if used:
            tally.take()  # this record and what was skipped before it are in the tally of the shard before
        text = replace_surrogates(record.text)
        problem = problem_of(text)
        if problem:
            tally.skip(record.place, problem)
        elif text.strip():
            tally.replaced += REPLACEMENT in text
            parts = list(cut(text, size))
            for number, part in enumerate(parts[used:], used + 1):
                end = [record.next, 0] if number == len(parts) else [position, number]
                fraction = record.begun + number / len(parts) * (record.fraction - record.begun)
                yield _Piece(part, text_key(part) if record.key is None else record.key, end, fraction)
        position, used = record.next, 0


def text_key(text: str) -> int:
    """Return a hash of a text, below 2**64."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
