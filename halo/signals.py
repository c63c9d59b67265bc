"""A polite stop: the first SIGTERM or Ctrl-C asks the training loop to save and end, the second one ends at once."""

import signal
import threading
from types import FrameType
from typing import Any, Self

from halo.settings import HaloError


class Stopped(HaloError):
    """A run that was asked to stop and has saved what it had; the same command continues it."""


class StopRequest:
    """A context manager that notes SIGTERM and SIGINT instead of obeying them; `requested` says whether one came."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __enter__(self) -> Self:
        self.requested = False
        self.before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}
