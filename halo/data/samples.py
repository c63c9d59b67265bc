"""The training samples of a stage: sample n is a pure function of the seed, the stage and n.

So the position in the data is one integer, a resume needs no other state, and all ranks share one global order.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from halo.data.batch import Batch
from halo.data.store import PackedOrder, TokenStore
from halo.settings import HaloError

# (sample number, length) -> token ids int64 [length] of one recall episode
EpisodeMaker = Callable[[int, int], np.ndarray]
# Samples are dealt to the sources in blocks of this many, each with the exact shares, in an order of its own.
BLOCK = 4096
_KEPT_ORDERS = 2  # of each source: a batch may contain the end of one epoch and the beginning of the next


class Samples:
    """Endless samples of equal length: chunks of packed text, epoch after epoch, and recall episodes.

    Args:
        stores: Training text, one store for each source.
        weights: Shares of the sources among the chunks of text.
        length: Tokens per sample.
        seed: Seed of the stage, one or more numbers.
        needle_ratio: Share of the samples that are recall episodes.
        episode: Makes the episodes; needed if `needle_ratio` > 0.
        names: Names of the sources, for messages.

    Raises:
        HaloError: If a source has less text than one chunk.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        weights: Sequence[float],
        length: int,
        seed: tuple[int, ...] = (0,),
        needle_ratio: float = 0.0,
        episode: EpisodeMaker | None = None,
        names: Sequence[str] = (),
    ) -> None:
        if needle_ratio and episode is None:
            raise ValueError("Samples: episode must be given with needle_ratio > 0")
        for number, store in enumerate(stores):
            if needle_ratio < 1 and store.num_tokens < length:
                name = f" from {names[number]}" if number < len(names) else ""
                raise HaloError(f"data: must hold at least one chunk of {length} tokens, got {store.num_tokens}{name}")
        self.stores, self.length, self.seed, self.episode = list(stores), length, seed, episode
        shares = np.array([needle_ratio, *((1 - needle_ratio) * np.array(weights) / sum(weights))])
        self.counts = block_counts(shares)  # of episodes, and of chunks of each source, in every block
        self._block: tuple[int, np.ndarray, np.ndarray] | None = None
        self._orders: dict[tuple[int, int], PackedOrder] = {}

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids int64 and document ids int32, each [length], of a sample."""
        kind, index = self._deal(number)
        if kind == 0:
            assert self.episode is not None
            return self.episode(number, self.length), np.zeros(self.length, np.int32)
        epoch, chunk = divmod(index, self.stores[kind - 1].num_tokens // self.length)
        return self._order(kind - 1, epoch).chunk(chunk)

    def batch(self, first: int, count: int) -> Batch:
        """Return the samples `first` to `first + count - 1`."""
        ids, documents = zip(*(self[number] for number in range(first, first + count)), strict=True)
        return Batch(torch.from_numpy(np.stack(ids)), torch.from_numpy(np.stack(documents)))

    def _deal(self, number: int) -> tuple[int, int]:
        """Return whether a sample is an episode (0) or from which source (1, 2, ...), and its number among its kind."""
        block, place = divmod(number, BLOCK)
        if self._block is None or self._block[0] != block:
            kinds = np.repeat(np.arange(len(self.counts)), self.counts)
            kinds = np.random.default_rng([*self.seed, block]).permutation(kinds)
            indices = np.empty(BLOCK, np.int64)
            for kind, count in enumerate(self.counts):
                indices[kinds == kind] = block * int(count) + np.arange(count)
            self._block = block, kinds, indices
        return int(self._block[1][place]), int(self._block[2][place])

    def _order(self, source: int, epoch: int) -> PackedOrder:
        if (source, epoch) not in self._orders:
            mine = [key for key in self._orders if key[0] == source]
            for key in mine[: len(mine) - _KEPT_ORDERS + 1]:
                del self._orders[key]
            self._orders[source, epoch] = PackedOrder(self.stores[source], self.length, (*self.seed, source), epoch)
        return self._orders[source, epoch]


def block_counts(shares: np.ndarray) -> np.ndarray:
    """Return how many samples of a block are of each kind: the shares to 1/BLOCK, and at least 1 where not 0, int64."""
    exact = shares * BLOCK
    counts = np.maximum(np.floor(exact), shares > 0).astype(np.int64)
    order = np.argsort(counts - exact, kind="stable")
    while (missing := BLOCK - int(counts.sum())) != 0:
        if missing > 0:
            counts[order[:missing]] += 1
        else:
            counts[int(np.argmax(counts))] -= 1
    return counts
