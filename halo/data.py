"""From text to batches: tokenise, pack into chunks of fixed length, shuffle under a seed, resume at the next batch.

A chunk is `length` tokens of concatenated documents, each ending in the tokenizer's EOS; `document_ids` numbers the
documents inside a chunk, so that a stage can keep them apart. Training chunks may be mixed with recall episodes. A
batch depends only on the settings, the seed and the number of batches before it.
"""

import hashlib
import json
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import PreTrainedTokenizerBase

from pydantic import Field, PositiveInt

from halo.settings import HaloError, Settings
from halo.evaluation.needle import NeedleTask


if TYPE_CHECKING:
    import datasets

MAX_NEEDLES = 8

# (sample number, length) -> token ids int64 [length] of one recall episode
EpisodeMaker = Callable[[int, int], np.ndarray]


class DataSettings(Settings):
    source: str
    subset: str | None = None
    split: str = "train"
    field: str = "text"
    held_out: float = Field(0.01, gt=0, lt=1)
    needle_ratio: float = Field(0.0, ge=0, le=1)
    isolate_documents: bool = False
    shuffle_buffer: PositiveInt = 4096


@dataclass
class Batch:
    """Token ids int64 [B, T], and for each token the number of its document in the row, int32 [B, T]."""

    input_ids: Tensor
    document_ids: Tensor

    def to(self, device: torch.device) -> "Batch":
        """Copy to a device."""
        return Batch(self.input_ids.to(device), self.document_ids.to(device))

    def split(self, size: int | None) -> list["Batch"]:
        """Split into batches of `size` sequences; None does not split."""
        if size is None or size >= self.input_ids.shape[0]:
            return [self]
        pairs = zip(self.input_ids.split(size), self.document_ids.split(size), strict=True)
        return [Batch(ids, documents) for ids, documents in pairs]

    def cu_seqlens(self) -> Tensor:
        """Return int32 [documents + 1]: where documents start in the flattened batch, and its length."""
        starts = torch.ones_like(self.document_ids, dtype=torch.bool)
        starts[:, 1:] = self.document_ids[:, 1:] != self.document_ids[:, :-1]
        offsets = starts.flatten().nonzero()[:, 0]
        return torch.cat([offsets, offsets.new_tensor([starts.numel()])]).int()


class TokenStore:
    """Tokenised documents, each ending in EOS.

    Args:
        tokens: All documents one after the other, int32 [total].
        offsets: Where each starts, and the total, int64 [documents + 1].
    """

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray) -> None:
        self.tokens, self.offsets = tokens, offsets

    @classmethod
    def build(cls, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> "TokenStore":
        """Tokenise documents."""
        pieces: list[np.ndarray] = []
        lengths: list[int] = []
        waiting: list[str] = []

        def encode() -> None:
            for ids in tokenizer(waiting, add_special_tokens=False, verbose=False)["input_ids"] if waiting else []:
                pieces.append(np.array([*ids, tokenizer.eos_token_id], dtype=np.int32))
                lengths.append(len(ids) + 1)
            waiting.clear()

        for text in texts:
            waiting.append(text)
            if len(waiting) == 256:
                encode()
        encode()
        tokens = np.concatenate(pieces) if pieces else np.zeros(0, np.int32)
        return cls(tokens, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64))

    @classmethod
    def cached(
        cls, directory: Path, texts: Callable[[], Iterable[str]], tokenizer: PreTrainedTokenizerBase
    ) -> "TokenStore":
        """Load the store from `directory`; if it is not there, build it from `texts()` and save it."""
        if not (directory / "offsets.npy").is_file():
            store = cls.build(texts(), tokenizer)
            directory.mkdir(parents=True, exist_ok=True)
            np.save(directory / "tokens.npy", store.tokens)
            np.save(directory / "offsets.npy", store.offsets)
        return cls(np.load(directory / "tokens.npy", mmap_mode="r"), np.load(directory / "offsets.npy"))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def document(self, index: int) -> np.ndarray:
        """Return the tokens of one document."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


class PackedOrder:
    """One epoch over a store: documents are shuffled and concatenated, cut into chunks, and the chunks are shuffled.

    Args:
        store: The documents.
        length: Tokens per chunk.
        seed, epoch: Determine both orders.
    """

    def __init__(self, store: TokenStore, length: int, seed: int, epoch: int) -> None:
        rng = np.random.default_rng([seed, epoch])
        self.store, self.length = store, length
        self.documents = rng.permutation(len(store))
        self.ends = np.cumsum(np.diff(store.offsets)[self.documents])
        total = int(self.ends[-1]) if len(store) else 0
        # Start at another offset each epoch, so that documents are not cut at the same places again.
        self.shift = int(rng.integers(length)) if total >= 2 * length else 0
        self.chunks = rng.permutation((total - self.shift) // length)

    def __len__(self) -> int:
        return len(self.chunks)

    def chunk(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids and document ids, each [length], of the chunk number `index` of this epoch."""
        start = self.shift + int(self.chunks[index]) * self.length
        ids, documents = np.empty(self.length, np.int64), np.empty(self.length, np.int32)
        slot, filled = int(np.searchsorted(self.ends, start, side="right")), 0
        first = slot
        while filled < self.length:
            tokens = self.store.document(self.documents[slot])
            skip = len(tokens) - (int(self.ends[slot]) - start - filled)
            piece = tokens[skip : skip + self.length - filled]
            ids[filled : filled + len(piece)] = piece
            documents[filled : filled + len(piece)] = slot - first
            filled += len(piece)
            slot += 1
        return ids, documents


class Samples:
    def __init__(self, store, length, seed, ratio, episode):
        self.store, self.length, self.seed, self.ratio, self.episode = store, length, seed, ratio, episode
        self.order = PackedOrder(store, length, seed, 0)
        self.orders = {0: self.order}

    def sample(self, n):
        if self.episode is not None and random.Random(f"{self.seed}:{n}").random() < self.ratio:
            return self.episode(n, self.length), np.zeros(self.length, np.int32)
        epoch, at = divmod(n, len(self.order))
        if epoch not in self.orders:
            self.orders = {epoch: PackedOrder(self.store, self.length, self.seed, epoch)}
        return self.orders[epoch].chunk(at % len(self.orders[epoch]))

    def batch(self, first, count):
        ids, documents = zip(*(self.sample(n) for n in range(first, first + count)), strict=True)
        return Batch(torch.from_numpy(np.stack(ids)), torch.from_numpy(np.stack(documents)))


def batches(samples, batch, start=0, rank=0, world=1, device=None):
    share = batch // world
    step = start
    while True:
        yield samples.batch(step * batch + rank * share, share)
        step += 1


SPLITS = ("train", "choose", "judge")


class ChunkStream(IterableDataset):
    """An endless stream of batches whose position can be saved; subclasses provide `next_chunk`.

    Args:
        length: Tokens per sequence.
        batch: Sequences per batch.
        seed: Determines which samples are episodes, and the order of chunks.
        needle_ratio: Share of the samples that are recall episodes.
        episode: Makes the episodes; needed if `needle_ratio` > 0.
    """

    def __init__(self, length: int, batch: int, seed: int, needle_ratio: float, episode: EpisodeMaker | None) -> None:
        if needle_ratio and episode is None:
            raise ValueError("ChunkStream: episode must be given with needle_ratio > 0")
        self.length, self.batch, self.seed = length, batch, seed
        self.needle_ratio, self.episode = needle_ratio, episode
        self.samples = 0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            ids, documents = zip(*(self._sample() for _ in range(self.batch)), strict=True)
            yield Batch(torch.from_numpy(np.stack(ids)), torch.from_numpy(np.stack(documents)))

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream."""
        return {"samples": self.samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position that `state_dict` returned."""
        self.samples = state["samples"]

    def next_chunk(self) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids int64 and document ids int32, each [length], of the next chunk of text."""
        raise NotImplementedError

    def _sample(self) -> tuple[np.ndarray, np.ndarray]:
        number = self.samples
        self.samples += 1
        if self.episode is not None and random.Random(f"{self.seed}:{number}").random() < self.needle_ratio:
            return self.episode(number, self.length), np.zeros(self.length, np.int32)
        return self.next_chunk()


class StoredChunks(ChunkStream):
    """Chunks of a TokenStore, epoch after epoch; `options` are those of ChunkStream."""

    def __init__(self, store: TokenStore, **options: Any) -> None:
        super().__init__(**options)
        self.store, self.position, self.epoch = store, 0, 0
        self.order = PackedOrder(store, self.length, self.seed, 0)
        if not len(self.order):
            raise HaloError(f"data: must hold at least one chunk of {self.length} tokens, got {len(store.tokens)}")

    def next_chunk(self) -> tuple[np.ndarray, np.ndarray]:
        if self.position == len(self.order):
            self._start_epoch(self.epoch + 1)
        self.position += 1
        return self.order.chunk(self.position - 1)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"position": self.position, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._start_epoch(state["epoch"])
        self.position = state["position"]

    def _start_epoch(self, epoch: int) -> None:
        self.epoch, self.position = epoch, 0
        self.order = PackedOrder(self.store, self.length, self.seed, epoch)


class StreamedChunks(ChunkStream):
    """Chunks of a streamed dataset, shuffled through a buffer that is part of the saved position.

    The shuffle buffer of `datasets` is not used, because it would be refilled instead of restored on resume.

    Args:
        rows: The dataset.
        encode: Returns the tokens of a row, or None to skip it.
        shuffle_buffer: Chunks in the buffer.
        options: Those of ChunkStream.
    """

    def __init__(
        self,
        rows: "datasets.IterableDataset",
        encode: Callable[[dict[str, Any]], list[int] | None],
        shuffle_buffer: int,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.rows, self.encode, self.shuffle_buffer = rows, encode, shuffle_buffer
        self.rng = np.random.default_rng(self.seed)
        self.buffer: list[tuple[np.ndarray, np.ndarray]] = []
        self.left_ids, self.left_documents = np.zeros(0, np.int64), np.zeros(0, np.int32)
        self.chunks = self._pack()

    def next_chunk(self) -> tuple[np.ndarray, np.ndarray]:
        while len(self.buffer) < self.shuffle_buffer:
            self.buffer.append(next(self.chunks))
        slot = int(self.rng.integers(len(self.buffer)))
        chosen, self.buffer[slot] = self.buffer[slot], self.buffer[-1]
        self.buffer.pop()
        return chosen

    def state_dict(self) -> dict[str, Any]:
        arrays = {"left_ids": self.left_ids, "left_documents": self.left_documents, "buffer": list(self.buffer)}
        return super().state_dict() | arrays | {"rows": self.rows.state_dict(), "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.left_ids, self.left_documents = state["left_ids"], state["left_documents"]
        self.buffer = list(state["buffer"])
        self.rng.bit_generator.state = state["rng"]
        self.rows.load_state_dict(state["rows"])
        self.chunks = self._pack()

    def _pack(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        while True:
            empty = True
            for row in self.rows:
                document = self.encode(row)
                if document is None:
                    continue
                empty = False
                number = self.left_documents[-1] + 1 if len(self.left_documents) else 0
                self.left_ids = np.concatenate([self.left_ids, np.asarray(document, np.int64)])
                self.left_documents = np.concatenate([self.left_documents, np.full(len(document), number, np.int32)])
                while len(self.left_ids) >= self.length:
                    ids, documents = self.left_ids[: self.length], self.left_documents[: self.length]
                    self.left_ids = self.left_ids[self.length :]
                    self.left_documents = self.left_documents[self.length :]
                    yield ids, documents - documents[0]
            if empty:
                raise HaloError("data.source: must hold text, got an empty dataset")


class Corpus:
    """The data of one conversion: training batches, and held-out text that training never sees.

    Args:
        settings: The section `data` of the configuration.
        tokenizer: The teacher's tokenizer, which must have an EOS token.
        seed: Seed of all orders and episodes.
        cache: Directory for tokenised documents; None keeps them in memory.

    Raises:
        HaloError: If the tokenizer has no EOS token or the source cannot be read.
    """

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: PreTrainedTokenizerBase,
        seed: int = 0,
        cache: Path | None = None,
        tokens=None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise HaloError("teacher: its tokenizer must have an EOS token to end documents with, got none")
        self.settings, self.tokenizer, self.seed, self.cache = settings, tokenizer, seed, cache
        from halo.sources import open_source

        self.source = open_source(settings)
        self._stores: dict[bool, TokenStore] = {}

    def prepare(self, on_progress=None):
        self.store("train")

    @property
    def fingerprint(self):
        return self._fingerprint()

    def samples(self, length, needle_ratio=None, stage=0):
        ratio = self.settings.needle_ratio if needle_ratio is None else needle_ratio
        return Samples(
            self.store("train"),
            length,
            self.seed + 1000 * stage,
            ratio,
            self.episodes(self.seed + 1000 * stage, "train") if ratio else None,
        )

    def task(self, split):
        return NeedleTask(self.tokenizer, self.store(split).tokens)

    def chunks(self, split, count, length):
        return self.held_out_chunks(count, length)

    def stream(self, split):
        from halo.evaluation.needle import token_stream

        return token_stream(self.tokenizer, self.texts(split))

    def texts(self, split):
        return self.source.texts(split != "train")

    def episodes(self, seed: int, split: str) -> EpisodeMaker:
        """Return a function that makes recall episodes with 1 to MAX_NEEDLES needles, each of which is queried.

        Args:
            seed: Together with the sample's number, determines an episode.
            held_out: Whether the text around the needles is held-out text.
        """
        task = NeedleTask(self.tokenizer, self.store(split).tokens)
        cost = task.needle_length + task.query_length

        def make(number: int, length: int) -> np.ndarray:
            rng = np.random.default_rng([seed, number])
            count = int(rng.integers(1, max(2, min(MAX_NEEDLES, (length - 1) // cost) + 1)))
            return task.episode(rng, length, num_needles=count, num_queries=count).input_ids

        return make

    def held_out_chunks(self, count: int, length: int) -> Tensor:
        """Return up to `count` random chunks of packed held-out text, int64 [n, length].

        Raises:
            HaloError: If there are fewer than two chunks.
        """
        order = PackedOrder(self.store("choose"), length, self.seed, 0)
        if len(order) < 2:
            raise HaloError(f"data.held_out: must leave at least two chunks of {length} tokens, got {len(order)}")
        return torch.from_numpy(np.stack([order.chunk(i)[0] for i in range(min(count, len(order)))]))

    def held_out_documents(self, count: int, length: int) -> Tensor:
        """Return the first `length` tokens of up to `count` held-out documents that have as many, int64 [n, length].

        Raises:
            HaloError: If no document is long enough.
        """
        store = self.store("choose")
        sizes = np.diff(store.offsets)
        long_enough = np.flatnonzero(sizes >= length)
        if not len(long_enough):
            longest = int(sizes.max()) if len(sizes) else 0
            raise HaloError(f"scale.length: must be at most the longest held-out document ({longest}), got {length}")
        chosen = np.random.default_rng(self.seed).permutation(long_enough)[:count]
        return torch.from_numpy(np.stack([store.document(i)[:length].astype(np.int64) for i in chosen]))

    def held_out_texts(self) -> Iterator[str]:
        """Yield the held-out documents as text."""
        return self.source.texts(held_out=True)

    def store(self, split) -> TokenStore:
        """Return the tokenised documents of one side of the split; for a streamed dataset, only the first ones."""
        held_out = split != "train"
        if held_out not in self._stores:
            texts = lambda: self.source.texts(held_out)  # noqa: E731
            if self.cache is None:
                self._stores[held_out] = TokenStore.build(texts(), self.tokenizer)
            else:
                name = f"{'held_out' if held_out else 'train'}-{self._fingerprint()}"
                self._stores[held_out] = TokenStore.cached(self.cache / name, texts, self.tokenizer)
        return self._stores[held_out]

    def _fingerprint(self) -> str:
        vocabulary = json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        parts = [self.source.fingerprint(), vocabulary, self.settings.model_dump_json()]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    def _encode_row(self, source: Any, row: dict[str, Any]) -> list[int] | None:
        text = source.text(row)
        if not text or is_held_out(text, self.settings.held_out):
            return None
        return [
            *self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
            self.tokenizer.eos_token_id,
        ]
