"""Runs several things at the same time, each in a process of its own."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from typing import TypeVar

from halo import progress
from halo.errors import HaloError
from halo.signals import Stopped, StopRequest

POLL_SECONDS = 1.0
T = TypeVar("T")


def run_together(run: Callable[[T], None], arguments: Mapping[str, T]) -> None:
    """Call `run` with each argument, all at the same time.

    A process that is asked to stop asks all of them. They also stop when this process is killed.

    Args:
        run: A function of a module, which can continue what was stopped.
        arguments: By the names that begin their lines of output.

    Raises:
        HaloError: If one fails; the others are stopped.
        Stopped: If this process was asked to stop.
    """
    context = multiprocessing.get_context("spawn")
    processes = {
        name: context.Process(target=_run_one, args=(run, name, argument), daemon=True)
        for name, argument in arguments.items()
    }
    failed: list[str] = []
    with StopRequest() as stop:
        try:
            for process in processes.values():
                process.start()
            while running := [process for process in processes.values() if process.is_alive()]:
                wait([process.sentinel for process in running], POLL_SECONDS)
                failed = [name for name, process in processes.items() if process.exitcode]
                if stop.requested or failed:
                    break
        finally:
            for process in processes.values():
                if process.is_alive():
                    process.terminate()
                process.join()
    if stop.requested:
        raise Stopped(f"{', '.join(processes)}: stopped and saved; the same command continues")
    if failed:
        raise HaloError(f"{', '.join(failed)}: failed, for the reason printed above")


def _run_one(run: Callable[[T], None], name: str, argument: T) -> None:
    os.setsid()  # Ctrl-C on a terminal reaches the parent alone, which passes it on.
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    progress.begin_lines_with(f"{name}: ")
    try:
        run(argument)
    except HaloError as error:
        print(f"halo: {name}: {error}", file=sys.stderr)
        sys.exit(2)


def _stop_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
