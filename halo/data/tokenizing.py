"""Tokenise a source into shards, in worker processes, so that a process that is killed at any moment continues.

Shard i holds the same documents whoever writes it. What is missing or damaged is made again from the position at which
the shard before it ends; the others stay.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from halo import files
from halo.data.encoder import Encoder
from halo.data.pieces import ShardTask, shard_tasks
from halo.data.shards import VERSION, Header, read_header, shard_path
from halo.data.source import Source
from halo.data.tally import Tally
from halo.data.workers import Workers
from halo.progress import say
from halo.settings import HaloError

EARLY_CHECK = 1000  # records after which too many skipped ones are an error before all are read


class Progress(NamedTuple):
    """How far tokenising is.

    Attributes:
        source: Name of the source.
        tokens: Tokens that are ready.
        total: Estimated number of tokens in all, or None if it is not known.
        tokens_per_second: Since this process began.
        remaining: Estimated seconds, or None.
    """

    source: str
    tokens: int
    total: int | None
    tokens_per_second: float
    remaining: float | None


class TokenizedSource:
    """The shards of one source.

    Args:
        source: The text.
        tokenizer: Its fast form is used in the worker processes.
        cache: Directory of tokenised text; the source gets a directory of its own in it.
        max_document: Characters of a document, at most.
        tokens: Tokens that are needed of a streamed source; None for all.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: PreTrainedTokenizerBase,
        cache: Path,
        max_document: int,
        tokens: int | None,
    ) -> None:
        self.source, self.tokenizer, self.max_document = source, tokenizer, max_document
        self.tokens = tokens if source.streamed else None
        parts = [VERSION, source.identity(), tokenizer_identity(tokenizer), max_document]
        self.directory = cache / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def headers(self, check: bool = False) -> list[Header] | None:
        """Return the headers of the shards that are used, or None if any is missing.

        Args:
            check: Whether to compare the checksums of all arrays.
        """
        found = self._found(check)
        used = self._used(found)
        return [found[index] for index in range(used)] if used is not None else None

    def paths(self, count: int) -> list[Path]:
        """Return the paths of the first `count` shards."""
        return [shard_path(self.directory, index) for index in range(count)]

    def prepare(self, workers: int | None, max_skipped: float, on_progress: Callable[[Progress], None] | None) -> None:
        """Tokenise what is missing; a process that finds another at it waits.

        Raises:
            HaloError: If the source cannot be read, holds no text or too much that is none, or if the disk is full.
        """
        with files.writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        with files.exclusively(
            self.directory, lambda: say(f"waits for another process that tokenises {self.source.name}")
        ):
            self._prepare(workers, max_skipped, on_progress)

    def _prepare(self, workers: int | None, max_skipped: float, on_progress: Callable[[Progress], None] | None) -> None:
        with files.writing(self.directory):
            for partial in self.directory.glob(f"*{files.PARTIAL}"):
                partial.unlink(missing_ok=True)
        found = self._found(check=True)
        clock = _Clock(self.source.name, self.tokens, sum(header.tokens for header in found.values()), on_progress)
        with Workers(Encoder(self.tokenizer), self.directory, workers) as pool:
            while self._used(found) is None:
                self._fill(found, pool, max_skipped, clock)
                found = self._chained(found)
        used = self._used(found)
        headers = [found[index] for index in range(used or 0)]
        check_skipped(self.source.name, total_tally(headers), max_skipped)
        if not any(header.documents for header in headers):
            raise HaloError(f"data.source: must hold text, got none in {self.source.name}")

    def _fill(self, found: dict[int, Header], pool: Workers, max_skipped: float, clock: "_Clock") -> None:
        """Make the first missing shards, up to one that is there, the end of the source, or enough tokens."""
        first = _contiguous(found)
        stop = min((index for index in found if index > first), default=math.inf)
        start = found[first - 1].end if first else None
        tally = total_tally(list(found.values()))

        def tasks() -> Iterator[ShardTask]:
            for task in shard_tasks(self.source, first, start, self.max_document):
                if task.index >= stop:
                    return
                tally.add(Tally(task.tally))
                if tally.records >= EARLY_CHECK:
                    check_skipped(self.source.name, tally, max_skipped)
                yield task

        for index, header in pool.run(tasks(), clock.advance):
            found[index] = header
            clock.finish(header)
            if self._used(found) is not None:
                return

    def _found(self, check: bool) -> dict[int, Header]:
        """Return the shards that are whole, by number."""
        found: dict[int, Header] = {}
        for path in sorted(self.directory.glob("*.tokens")):
            header = read_header(path, check) if path.stem.isdigit() else None
            if header is not None:
                found[int(path.stem)] = header
        return self._chained(found)

    def _chained(self, found: dict[int, Header]) -> dict[int, Header]:
        """Return the shards without those that do not begin where the one before them ends."""
        kept: dict[int, Header] = {}
        for index in sorted(found):
            before, start = kept.get(index - 1), found[index].start
            if index and before is None:
                kept[index] = found[index]  # the one before it will be made again
            elif self._place(start) == self._place(before.end if before else None):
                kept[index] = found[index]
        return kept

    def _place(self, position: Any) -> Any:
        return position and [self.source.place(position[0]), position[1]]

    def _used(self, found: dict[int, Header]) -> int | None:
        """Return how many shards are used, or None if one of them is missing."""
        reached = 0
        for index in range(_contiguous(found)):
            reached += found[index].tokens
            if found[index].last or (self.tokens is not None and reached >= self.tokens):
                return index + 1
        return None


def total_tally(headers: list[Header]) -> Tally:
    """Return the sum of the shards' tallies."""
    total = Tally()
    for header in headers:
        total.add(Tally(header.tally))
    return total


def check_skipped(name: str, tally: Tally, limit: float) -> None:
    """Raise a HaloError if more than the share `limit` of the records could not be read."""
    if tally.skipped > limit * tally.records:
        raise HaloError(
            f"data.max_skipped: must be at least the share of records of {name} that cannot be read "
            f"({tally.skipped} of {tally.records}), got {limit}; the first: {tally.examples[0]}"
        )


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of everything that decides the tokens of a text."""
    parts: list[Any] = [type(tokenizer).__name__, tokenizer.eos_token_id, getattr(tokenizer, "chat_template", None)]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        model = json.loads(backend.to_str())
        # State of the last call, not of the tokenizer.
        parts.append({key: value for key, value in model.items() if key not in ("truncation", "padding")})
    else:
        parts += [tokenizer.get_vocab(), {key: str(value) for key, value in tokenizer.init_kwargs.items()}]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _contiguous(found: dict[int, Header]) -> int:
    index = 0
    while index in found:
        index += 1
    return index


class _Clock:
    """Turns finished tokens into Progress."""

    def __init__(
        self, source: str, needed: int | None, ready: int, on_progress: Callable[[Progress], None] | None
    ) -> None:
        self.source, self.needed, self.on_progress = source, needed, on_progress
        self.began, self.first, self.ready, self.shown = time.monotonic(), ready, ready, ready
        self.fraction = 0.0

    def advance(self, tokens: int, fraction: float) -> None:
        """Count tokens of a shard that is not finished yet, after which `fraction` of the source is done."""
        self.shown += tokens
        self.fraction = max(self.fraction, fraction)
        self._report()

    def finish(self, header: Header) -> None:
        """Count a finished shard."""
        self.ready += header.tokens
        self.shown = self.ready
        self.fraction = max(self.fraction, header.fraction)
        self._report()

    def _report(self) -> None:
        if self.on_progress is None:
            return
        total = self.needed
        if total is None and self.fraction > 0:
            total = round(self.shown / self.fraction)
        speed = (self.shown - self.first) / max(time.monotonic() - self.began, 1e-9)
        remaining = max(total - self.shown, 0) / speed if total is not None and speed > 0 else None
        self.on_progress(Progress(self.source, self.shown, total, speed, remaining))
