"""Progress of a running stage: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

console = Console(highlight=False)
LINE_SECONDS = 10.0
RESTORED_SECONDS = 1.0  # what a journal remembers is reported faster than this
_start_of_lines = ""


class StageProgress:
    """A context manager that shows how many of `total` units of work are done.

    Args:
        name: The name shown, usually the stage.
        total: The number of units of work.
        shown: Whether to show anything, as only one of several processes should.
        start: Units that were finished before this process began.
    """

    def __init__(self, name: str, total: int, shown: bool = True, start: int = 0) -> None:
        self.name, self.total, self.shown, self.start = name, total, shown, start
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.began = self.last_line = time.monotonic()

    def __enter__(self) -> Self:
        if self.shown and console.is_terminal and not _start_of_lines:
            columns = (TextColumn("{task.description:10}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
            self.bar = Progress(*columns, TextColumn("{task.fields[note]}"), TimeRemainingColumn(), console=console)
            self.task = self.bar.add_task(self.name, total=self.total, completed=self.start, note="")
            self.bar.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.bar:
            self.bar.stop()

    def update(self, done: int, note: str) -> None:
        """Show that `done` units are finished, with a short note such as the loss."""
        if time.monotonic() - self.began < RESTORED_SECONDS:
            self.start = done
        if self.bar:
            self.bar.update(self.task, completed=done, note=note)
        elif self.shown and (done == self.total or time.monotonic() - self.last_line >= LINE_SECONDS):
            self.last_line = time.monotonic()
            say(f"{self.name:10} {done}/{self.total}  {note}{self._remaining(done)}")

    def _remaining(self, done: int) -> str:
        """Return the estimated time left, from the speed of this process so far."""
        if done <= self.start or done >= self.total:
            return ""
        seconds = round((time.monotonic() - self.began) / (done - self.start) * (self.total - done))
        return f"  {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"


class TokenisingProgress:
    """Shows how far tokenising is: called with a `halo.data.Progress`, prints a line now and then."""

    def __init__(self) -> None:
        self.last_line = time.monotonic()

    def __call__(self, progress: Any) -> None:
        if time.monotonic() - self.last_line < LINE_SECONDS:
            return
        self.last_line = time.monotonic()
        total = f"/{progress.total:,}" if progress.total else ""
        left = f"  {progress.remaining:,.0f} s left" if progress.remaining else ""
        speed = f"{progress.tokens_per_second:,.0f} tokens/s"
        say(f"tokenising {progress.source}: {progress.tokens:,}{total}  {speed}{left}")


def begin_lines_with(text: str) -> None:
    """Begin every later line of this process with a text, and show no bars: for one of several processes."""
    global _start_of_lines
    _start_of_lines = text


def say(text: str) -> None:
    """Print one line of information to standard output."""
    console.print(f"{_start_of_lines}{text}", markup=False, soft_wrap=True)


def warn(text: str) -> None:
    """Print one line of warning to standard error."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
