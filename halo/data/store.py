"""Tokens of many documents, in memory-mapped shards, and the order in which an epoch packs them into chunks."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from halo.data.encoder import Encoder
from halo.data.shards import Shard, open_shard
from halo.data.splits import split_documents


class TokenStore:
    """Tokenised documents, or passages of documents.

    Args:
        arrays: Tokens, one array for each shard, uint32.
        shard, start, length: For each document, the shard that it is in, its first token there and its tokens,
            int64 [documents].
        paths: Files that `arrays` are mapped from; a copy in another process maps them again.
    """

    def __init__(
        self,
        arrays: list[np.ndarray],
        shard: np.ndarray,
        start: np.ndarray,
        length: np.ndarray,
        paths: list[Path] | None = None,
    ) -> None:
        self.arrays, self.shard, self.start, self.length, self.paths = arrays, shard, start, length, paths
        self.num_tokens = int(length.sum())

    @classmethod
    def build(cls, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> "TokenStore":
        """Tokenise documents in memory, each ending in EOS."""
        pieces = Encoder(tokenizer)(list(texts))
        length = np.array([len(piece) for piece in pieces], np.int64)
        tokens = np.concatenate(pieces) if pieces else np.zeros(0, np.uint32)
        return cls([tokens], np.zeros(len(pieces), np.int64), np.cumsum(length) - length, length)

    @classmethod
    def joined(cls, stores: list["TokenStore"]) -> "TokenStore":
        """Return the documents of several stores as one."""
        if len(stores) == 1:
            return stores[0]
        before = np.cumsum([0] + [len(store.arrays) for store in stores])
        paths = [store.paths for store in stores]
        return cls(
            [array for store in stores for array in store.arrays],
            np.concatenate([store.shard + first for store, first in zip(stores, before, strict=False)]),
            np.concatenate([store.start for store in stores]),
            np.concatenate([store.length for store in stores]),
            None if None in paths else [path for part in paths if part for path in part],
        )

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | ({"arrays": None} if self.paths is not None else {})

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__ |= state
        if self.paths is not None:
            self.arrays = [open_shard(path).tokens for path in self.paths]

    def __len__(self) -> int:
        return len(self.length)

    def document(self, index: int) -> np.ndarray:
        """Return the tokens of one document."""
        start = self.start[index]
        return self.arrays[self.shard[index]][start : start + self.length[index]]

    def stream(self, limit: int | None = None) -> np.ndarray:
        """Return all documents one after the other, or whole documents up to at least `limit` tokens, int64 [n]."""
        count = len(self)
        if limit is not None and self.num_tokens > limit:
            count = int(np.searchsorted(np.cumsum(self.length), limit)) + 1
        pieces = [self.document(index) for index in range(count)]
        return np.concatenate(pieces).astype(np.int64) if pieces else np.zeros(0, np.int64)


def split_stores(paths: list[Path], share: float, fixed: bool) -> list[TokenStore]:
    """Map the shards of a source into memory and return the stores of its sides: train, choose, judge.

    Args:
        paths: The shards.
        share: Share that is held out.
        fixed: Whether the documents' keys alone decide; see split_documents.
    """
    shards: list[Shard] = [open_shard(path) for path in paths]
    ends = [shard.offsets.astype(np.int64) for shard in shards]
    starts = [np.concatenate([[0], end[:-1]])[: len(end)].astype(np.int64) for end in ends]
    start, end = np.concatenate(starts), np.concatenate(ends)
    shard = np.repeat(np.arange(len(shards)), [len(part) for part in ends])
    parts = split_documents(np.concatenate([part.keys for part in shards]), end - start, share, fixed)
    arrays = [part.tokens for part in shards]
    stores = []
    for side in range(3):
        chosen = parts.side == side
        document = parts.document[chosen]
        stores.append(
            TokenStore(arrays, shard[document], start[document] + parts.start[chosen], parts.length[chosen], paths)
        )
    return stores


class PackedOrder:
    """One epoch over a store: documents are shuffled and concatenated, cut into chunks, and the chunks are shuffled.

    Every epoch of a store has the same number of chunks, tokens // length.

    Args:
        store: The documents.
        length: Tokens per chunk.
        seed: One or more numbers; determines both orders, with:
        epoch: The number of the epoch.
    """

    def __init__(self, store: TokenStore, length: int, seed: int | tuple[int, ...], epoch: int) -> None:
        rng = np.random.default_rng([*(seed if isinstance(seed, tuple) else (seed,)), epoch])
        self.store, self.length = store, length
        self.documents = rng.permutation(len(store))
        self.ends = np.cumsum(store.length[self.documents])
        # Start at another offset each epoch, so that documents are not cut at the same places again.
        self.shift = int(rng.integers(store.num_tokens % length + 1))
        self.chunks = rng.permutation(store.num_tokens // length)

    def __len__(self) -> int:
        return len(self.chunks)

    def chunk(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids int64 and document ids int32, each [length], of the chunk number `index` of this epoch."""
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
