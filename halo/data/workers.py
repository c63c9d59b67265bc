"""Processes that tokenise: each task is one shard, which the process itself writes."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing.connection import wait as wait_for_process
from pathlib import Path
from typing import Any, Self

import numpy as np

from halo import files
from halo.data.encoder import Encoder
from halo.data.pieces import ShardTask
from halo.data.shards import Header, Shard, shard_path, write_shard
from halo.settings import HaloError

FEW = 2  # tasks that are done without starting processes
_BATCH_CHARACTERS, _BATCH_DOCUMENTS = 500_000, 256

_encode: Encoder | None = None


class Workers:
    """Tokenises shards; a context manager that ends its processes.

    Args:
        encode: Tokenises; sent to each process once.
        directory: Of the shards.
        count: Processes; None for the number of CPUs that this process may use. Few tasks need none.
    """

    def __init__(self, encode: Encoder, directory: Path, count: int | None) -> None:
        self.encode, self.directory = encode, directory
        self.count = count or _available_cpus()
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def run(self, tasks: Iterator[ShardTask], on_tokens: Callable[[int, float], None]) -> Iterator[tuple[int, Header]]:
        """Yield the number and header of each shard when it is written; the order is that in which they are finished.

        Args:
            tasks: The shards.
            on_tokens: Called for each part of a shard that this process makes, with its number of tokens and the share
                of the source that is then done.

        Raises:
            HaloError: If a shard cannot be written, or a process ends.
        """
        with files.writing(self.directory):
            few = list(islice(tasks, FEW + 1)) if self.count > 1 and self.pool is None else []
            if self.count == 1 or (self.pool is None and len(few) <= FEW):
                for task in chain(few, tasks):
                    yield task.index, make_shard(task, self.encode, self.directory, on_tokens)
                return
            yield from self._run_in_processes(chain(few, tasks))

    def _run_in_processes(self, tasks: Iterator[ShardTask]) -> Iterator[tuple[int, Header]]:
        if self.pool is None:
            self.pool = ProcessPoolExecutor(
                self.count, multiprocessing.get_context("spawn"), _start_worker, (self.encode,)
            )
        waiting: dict[Future[Header], int] = {}
        try:
            while True:
                for task in islice(tasks, 2 * self.count - len(waiting)):
                    waiting[self.pool.submit(_work, task, self.directory)] = task.index
                if not waiting:
                    return
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield waiting.pop(future), future.result()
        except BrokenProcessPool:
            raise HaloError(
                "data.workers: a process that tokenises ended, perhaps for want of memory; fewer need less, and the "
                f"same command continues, got {self.count}"
            ) from None


def make_shard(
    task: ShardTask,
    encode: Encoder,
    directory: Path,
    on_tokens: Callable[[int, float], None] | None = None,
) -> Header:
    """Tokenise and write one shard.

    Raises:
        OSError: If it cannot be written.
    """
    pieces: list[np.ndarray] = []
    first, done = 0, 0
    while first < len(task.texts):
        last, characters = first, 0
        while last < min(len(task.texts), first + _BATCH_DOCUMENTS) and characters < _BATCH_CHARACTERS:
            characters += len(task.texts[last])
            last += 1
        encoded = encode(task.texts[first:last])
        pieces += encoded
        first, done = last, done + characters
        if on_tokens is not None:
            share = done / max(task.characters, 1)
            on_tokens(sum(map(len, encoded)), task.before + share * (task.fraction - task.before))
    tokens = np.concatenate(pieces) if pieces else np.zeros(0, np.uint32)
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.uint64)
    shard = Shard(tokens, ends, np.array(task.keys, np.uint64))
    header = Header(len(tokens), len(pieces), task.start, task.end, task.fraction, task.last, task.tally, "")
    return write_shard(shard_path(directory, task.index), shard, header)


def _start_worker(encode: Encoder) -> None:
    global _encode
    _encode = encode
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which lets the shards in work be finished
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread for each process
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        # A parent that is killed cannot end its workers.
        wait_for_process([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _work(task: ShardTask, directory: Path) -> Header:
    assert _encode is not None
    return make_shard(task, _encode, directory)


def _available_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
