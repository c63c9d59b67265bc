"""The data of one conversion: training samples, and held-out text on two sides that training never sees."""

import hashlib
import json
import math
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from halo import files
from halo.data.local import CACHE_MARK
from halo.data.samples import EpisodeMaker, Samples
from halo.data.settings import SPLITS, DataSettings
from halo.data.shards import Header
from halo.data.sources import open_source
from halo.data.store import PackedOrder, TokenStore, split_stores
from halo.data.tokenizing import Progress, TokenizedSource, total_tally
from halo.evaluation.needle import NeedleTask
from halo.settings import HaloError

MAX_NEEDLES = 8
# Tokens of a side that the text around needles is taken from; training text may be larger than memory.
STREAM_TOKENS = 16_000_000
SHOWN_EXAMPLES = 3  # places of skipped records in a warning


class Corpus:
    """The data of one conversion.

    Args:
        settings: The section `data` of the configuration.
        tokenizer: The teacher's tokenizer, which must have an EOS token.
        seed: Seed of all orders and episodes.
        cache: Directory of tokenised text, <out>/data; nothing in <out> is read as text. None: a temporary directory.
        tokens: How many training tokens a dataset that is streamed must give, in all; None for the whole dataset.
            Local files are always read whole.

    Raises:
        HaloError: If the tokenizer has no EOS token or there are no files to read.
    """

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: PreTrainedTokenizerBase,
        seed: int = 0,
        cache: Path | None = None,
        tokens: int | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise HaloError("teacher: its tokenizer must have an EOS token to end documents with, got none")
        self.settings, self.tokenizer, self.seed = settings, tokenizer, seed
        self._temporary = tempfile.TemporaryDirectory(prefix="halo-") if cache is None else None
        self.cache = Path(self._temporary.name) if self._temporary is not None else Path(cache or "")
        self.entries = settings.sources()
        out = None if cache is None else self.cache.parent
        self._sources = []
        for entry in self.entries:
            needed = None if tokens is None else math.ceil(tokens * entry.weight / (1 - settings.held_out))
            source = open_source(entry, settings, tokenizer, out)
            self._sources.append(TokenizedSource(source, tokenizer, self.cache, settings.max_document, needed))
        self._stores: dict[str, TokenStore] = {}
        self._tasks: dict[str, NeedleTask] = {}

    def prepare(self, on_progress: Callable[[Progress], None] | None = None) -> None:
        """Tokenise what is missing. One process calls it before the others use the corpus.

        Args:
            on_progress: Called with a Progress now and then.

        Raises:
            HaloError: If a source cannot be read or holds too little text, or if the tokens cannot be written.
        """
        mark = self.cache / CACHE_MARK
        if not mark.is_file():
            files.write_file(mark, lambda path: path.write_text("Tokenised text. May be deleted.\n"))
        for source in self._sources:
            source.prepare(self.settings.workers, self.settings.max_skipped, on_progress)

    @property
    def fingerprint(self) -> str:
        """A hash of the tokens of all sources and of the settings that decide what samples are made of them."""
        settings = self.settings
        parts: list[Any] = [settings.held_out, settings.needle_ratio, settings.isolate_documents]
        for entry, headers in zip(self.entries, self._headers, strict=True):
            parts.append([entry.weight, [header.digest for header in headers]])
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    @property
    def skipped(self) -> dict[str, Any]:
        """What could not be read: counts of records, skipped, replaced; counts by reasons; the first as examples."""
        return total_tally([header for headers in self._headers for header in headers]).plain()

    def complaints(self) -> list[str]:
        """Return a line about what was skipped, with the first places, and one about bytes that were no text."""
        found, lines = self.skipped, []
        if found["skipped"]:
            examples = found["examples"][:SHOWN_EXAMPLES]
            more = found["skipped"] - len(examples)
            shown = "; ".join(examples) + (f"; and {more:,} more" if more else "")
            lines.append(f"data: {found['skipped']:,} of {found['records']:,} records were skipped: {shown}")
        if found["replaced"]:
            lines.append(f"data: {found['replaced']:,} documents have bytes that are no text; U+FFFD stands for them")
        return lines

    def samples(self, length: int, needle_ratio: float | None = None, stage: int = 0) -> Samples:
        """Return the endless training samples of a stage.

        Args:
            length: Tokens per sample.
            needle_ratio: Share of recall episodes; None for the configured one.
            stage: The number of the stage, which gives each stage its own order and episodes.

        Raises:
            HaloError: If there is less text than one sample, or an episode does not fit into one.
        """
        ratio = self.settings.needle_ratio if needle_ratio is None else needle_ratio
        stores = [stores[0] for stores in self._split]
        episode = self.episodes(self.seed + 1000 * stage, "train") if ratio else None
        if episode is not None:
            episode(0, length)  # says so now if no episode fits
        names = [source.source.name for source in self._sources]
        weights = [entry.weight for entry in self.entries]
        return Samples(stores, weights, length, (self.seed, stage), ratio, episode, names)

    def store(self, split: str) -> TokenStore:
        """Return the tokenised documents of one side of the split, of all sources."""
        side = _side(split)
        if split not in self._stores:
            self._stores[split] = TokenStore.joined([stores[side] for stores in self._split])
        return self._stores[split]

    def stream(self, split: str) -> np.ndarray:
        """Return the documents of one side as one token stream, each ending in EOS, int64 [n].

        Of more than 16 million tokens, the first documents.
        """
        return self.store(split).stream(STREAM_TOKENS)

    def task(self, split: str) -> NeedleTask:
        """Return the needle task whose text is that of one side of the split."""
        if split not in self._tasks:
            other, stream = next(iter(self._tasks.values()), None), self.stream(split)
            self._tasks[split] = NeedleTask(self.tokenizer, stream) if other is None else other.of(stream)
        return self._tasks[split]

    def episodes(self, seed: int, split: str) -> EpisodeMaker:
        """Return a function that makes recall episodes with 1 to MAX_NEEDLES needles, each of which is queried.

        Args:
            seed: Together with the side and the sample's number, determines an episode.
            split: The side that the text around the needles is from.
        """
        return _Episodes(self.task(split), (seed, _side(split)))

    def count_chunks(self, split: str, length: int) -> int:
        """Return how many chunks of packed text of `length` tokens one side has."""
        return self.store(split).num_tokens // length

    def chunks(self, split: str, count: int, length: int) -> Tensor:
        """Return up to `count` random chunks of packed text, int64 [n, length].

        Raises:
            HaloError: If there are fewer than two.
        """
        order = PackedOrder(self.store(split), length, (self.seed, _side(split)), 0)
        if len(order) < 2:
            raise HaloError(
                f"data.held_out: must leave at least two chunks of {length} tokens on each side, got {len(order)} on "
                f"the side {split}"
            )
        return torch.from_numpy(np.stack([order.chunk(i)[0] for i in range(min(count, len(order)))]))

    @cached_property
    def _headers(self) -> list[list[Header]]:
        """Headers of the shards of each source, made if any is missing."""
        found = [source.headers() for source in self._sources]
        if None in found:
            self.prepare()
            found = [source.headers() for source in self._sources]
        return [headers or [] for headers in found]

    @cached_property
    def _split(self) -> list[list[TokenStore]]:
        """The three sides of each source."""
        return [
            split_stores(source.paths(len(headers)), self.settings.held_out, source.source.fixed_split)
            for source, headers in zip(self._sources, self._headers, strict=True)
        ]


class _Episodes:
    """Makes recall episodes by number; can be sent to another process."""

    def __init__(self, task: NeedleTask, seed: tuple[int, int]) -> None:
        self.task, self.seed = task, seed
        self.cost = task.needle_length + task.query_length

    def __call__(self, number: int, length: int) -> np.ndarray:
        rng = np.random.default_rng([*self.seed, number])
        most = min(MAX_NEEDLES, (length - 1) // self.cost, len(self.task.words) // 2)
        count = int(rng.integers(1, max(2, most + 1)))
        return self.task.episode(rng, length, num_needles=count, num_queries=count).input_ids


def _side(split: str) -> int:
    if split not in SPLITS:
        raise ValueError(f"Corpus: split must be one of {', '.join(SPLITS)}, got {split!r}")
    return SPLITS.index(split)
