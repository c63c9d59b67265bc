"""The files of a run: their names, writes that are whole or absent, and reads that say which file is damaged.

<out>/config.yaml            the configuration, with every default
<out>/data/                  tokenised text
<out>/teacher/               a .gguf teacher, converted
<out>/<stage>/               a stage's result; finished once done.json is there, which is written last
<out>/<stage>/checkpoints/   step-N, the last two, while a training stage runs; layer-N of calibrate
<out>/model/                 the finished model
"""

import errno
import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from halo.errors import HaloError

CONFIG = "config.yaml"
DONE = "done.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
MIXERS = "mixers.safetensors"
CALIBRATION = "calibration.json"
SELECTION = "selection.json"
SCALE = "scale.json"
RESULTS = "results.json"
MODEL = "model"
TEACHER = "teacher"
PARTIAL = ".partial"
LOCK = ".lock"


@contextmanager
def exclusively(directory: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Keep other processes that call this out of a directory, and wait while one is in it.

    Args:
        directory: The directory, which exists.
        on_wait: Called before a wait.
    """
    with writing(directory):
        lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    write_file(path, lambda partial: partial.write_text(text, "utf-8"))


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file so that an interrupted process leaves either the old or the new content.

    Args:
        path: The file; its directory is created.
        write: Writes the content to the temporary path that it is given, which is then renamed.

    Raises:
        HaloError: If it cannot be written; nothing is left behind.
    """
    partial = path.with_name(path.name + PARTIAL)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


def write_directory(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a directory so that an interrupted process leaves either no directory or the whole of it.

    Args:
        path: The directory; what is there already is replaced.
        write: Fills the temporary directory that it is given, which is then renamed.

    Raises:
        HaloError: If it cannot be written; nothing is left behind.
    """
    partial = path.with_name(path.name + PARTIAL)
    with writing(path):
        remove(partial)
        partial.mkdir(parents=True)
        try:
            write(partial)
        except BaseException:
            remove(partial)
            raise
        publish_directory(partial, path)


def publish_directory(partial: Path, path: Path) -> None:
    """Rename a directory whose files are complete to its final name, replacing what is there."""
    for file in partial.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
    remove(path)
    partial.rename(path)
    sync_directory(path.parent)


def write_json(path: Path, record: Any) -> None:
    """Write a JSON file, whole or not at all; numbers that JSON does not have, such as NaN, become null."""
    text = json.dumps(_finite(record), indent=1, allow_nan=False)
    write_text(path, text)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object that an earlier stage wrote.

    Args:
        path: The file.
        remedy: What to do if it is missing or damaged, to end the message with.

    Raises:
        HaloError: If it is missing or damaged.
    """
    try:
        record = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise HaloError(f"{path}: must exist; {remedy}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise HaloError(f"{path}: must be readable JSON, got {_reason(error)}; {remedy}") from None
    if not isinstance(record, dict):
        raise HaloError(f"{path}: must be a JSON object, got {type(record).__name__}; {remedy}")
    return record


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a JSON lines file up to the first line that is not complete, such as one that is being written."""
    records: list[dict[str, Any]] = []
    if not path.is_file():
        return records
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict):
            break
        records.append(record)
    return records


def remove(path: Path) -> None:
    """Delete a file or a directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(directory: Path) -> None:
    """Delete what an interrupted process has left in a directory: files and directories that are not whole."""
    for pattern in (f"*{PARTIAL}", ".tmp*"):  # the second is how safetensors names a file until it is whole
        for path in directory.glob(pattern):
            remove(path)


def sync_directory(path: Path) -> None:
    """Make renames in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the file system inside the context into a HaloError about `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # SafetensorError has no number; a file system that takes no more is what it reports in practice.
        full = getattr(error, "errno", None) in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free space and run the same command" if full else "choose another place"
        raise HaloError(f"{path}: must be writable, got {_reason(error)}; {remedy}") from None


@contextmanager
def reading(path: Path, remedy: str) -> Iterator[None]:
    """Turn any error inside the context, which reads a file of ours, into a HaloError that says what to do."""
    try:
        yield
    except HaloError:
        raise
    except Exception as error:
        raise HaloError(f"{path}: must be whole, got {_reason(error)}; {remedy}") from error


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
