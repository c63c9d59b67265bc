"""From samples to the batches of one process, read ahead in the background where that pays."""

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from halo.data.batch import Batch
from halo.data.samples import Samples
from halo.settings import HaloError

BACKGROUND_TOKENS = 1 << 18  # tokens of a batch from which reading it is worth a process on the CPU too
WORKERS = 2
PREFETCH = 4


def batches(
    samples: Samples,
    batch: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str | None = None,
) -> Iterator[Batch]:
    """Yield the batches from step `start` on, without end.

    Args:
        samples: The samples of the stage.
        batch: Sequences of a step, over all processes.
        start: The first step.
        rank, world: This process and their number; it gets rows [rank * batch / world, (rank + 1) * batch / world).
        device: Where the batches are wanted; None leaves them on the CPU.

    Raises:
        HaloError: If `world` does not divide `batch`.
    """
    if batch % world or not 0 <= rank < world:
        raise HaloError(f"batch: must be a multiple of the number of processes ({world}), got {batch}")
    share = _Share(samples, batch, rank, world)
    device = torch.device(device) if device is not None else torch.device("cpu")
    cuda = device.type == "cuda"
    if not cuda and batch // world * samples.length < BACKGROUND_TOKENS:
        return _read(share, start)
    return _read_ahead(share, start, device)


def _read(share: "_Share", start: int) -> Iterator[Batch]:
    for step in _Steps(start):
        yield share[step]


def _read_ahead(share: "_Share", start: int, device: torch.device) -> Iterator[Batch]:
    loader = DataLoader(
        share,
        batch_size=None,
        sampler=_Steps(start),
        num_workers=WORKERS,
        prefetch_factor=PREFETCH,
        pin_memory=device.type == "cuda",
        # Its own, because the loader draws from the global one and a resumed run would see other random numbers.
        generator=torch.Generator().manual_seed(0),
    )
    for loaded in loader:
        yield loaded.to(device, non_blocking=True)


class _Share(Dataset[Batch]):
    """One process's share of the batch of a step."""

    def __init__(self, samples: Samples, batch: int, rank: int, world: int) -> None:
        self.samples, self.batch = samples, batch
        self.count = batch // world
        self.offset = rank * self.count

    def __getitem__(self, step: int) -> Batch:
        return self.samples.batch(step * self.batch + self.offset, self.count)


class _Steps(Sampler[int]):
    """The numbers from `start` on."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        step = self.start
        while True:
            yield step
            step += 1
