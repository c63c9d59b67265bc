"""Readers of one file each: text, JSON lines, JSON and parquet, compressed or not.

A reader yields the file's items, numbered from 1: a str (a piece of plain text), a dict (a record) or a Problem.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halo.data.encoding import cut_position, sniff_encoding
from halo.settings import HaloError

TEXT = (".txt", ".md", ".rst")
LINES = (".jsonl", ".ndjson")
JSON = (".json",)
PARQUET = (".parquet",)
COMPRESSED = (".gz", ".zst")
SUFFIXES = (*TEXT, *LINES, *JSON, *PARQUET)
READABLE = f"{', '.join(SUFFIXES)} (all but parquet also with {' or '.join(COMPRESSED)})"
CHAT_KEYS = ("messages", "conversations")
_READ = 1 << 20  # characters, or rows of parquet, at a time
_ROWS = 256


@dataclass(frozen=True)
class Problem:
    """An item that is no record, with the reason."""

    reason: str


Item = str | dict[str, Any] | Problem


def kind_of(path: Path) -> str | None:
    """Return the suffix that decides how a file is read, in lower case, or None if it is not read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
        return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES and suffixes[-1] not in PARQUET else None
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


class FileReader:
    """Reads the items of one file.

    Args:
        path: A file with one of the readable suffixes.
        field: Key of the text in a record.
        size: Characters in a piece of plain text, at most.
    """

    def __init__(self, path: Path, field: str, size: int) -> None:
        self.path, self.field, self.size = path, field, size
        self.kind = kind_of(path)
        self.begun = self.fraction = 0.0  # share of the file that is read, before and after the last item

    def items(self, start: int = 0) -> Iterator[tuple[int, Item]]:
        """Yield the items after the first `start`, with their numbers.

        Raises:
            HaloError: If the file cannot be read.
        """
        if self.kind in PARQUET:
            yield from self._rows(start)
            return
        with reading(self.path), self.path.open("rb", buffering=0) as file:
            size = max(self.path.stat().st_size, 1)
            stream = _decompressed(file, self.path)
            encoding = sniff_encoding(stream.peek(4096)[:4096])
            newline = None if self.kind in TEXT else "\n"
            text = io.TextIOWrapper(stream, encoding, errors="replace", newline=newline)
            read = {TEXT[0]: self._pieces, LINES[0]: self._lines, JSON[0]: self._json}[_family(self.kind)]
            for number, item in read(text):
                self.begun, self.fraction = self.fraction, min(file.tell() / size, 1.0)
                if number > start:
                    yield number, item

    def _pieces(self, text: io.TextIOWrapper) -> Iterator[tuple[int, Item]]:
        number, waiting = 1, ""
        while block := text.read(_READ):
            waiting += block
            start = 0
            while len(waiting) - start > self.size:
                end = cut_position(waiting, start, self.size)
                yield number, waiting[start:end]
                number, start = number + 1, end
            waiting = waiting[start:]
        yield number, waiting

    def _lines(self, text: io.TextIOWrapper) -> Iterator[tuple[int, Item]]:
        for number, line in enumerate(text, 1):
            if line.strip():
                yield number, _record(line)

    def _json(self, text: io.TextIOWrapper) -> Iterator[tuple[int, Item]]:
        whole = text.read()
        try:
            value = json.loads(whole)
        except RecursionError:
            yield 1, Problem("is nested too deep")
            return
        except ValueError as error:
            if "Extra data" in str(error):  # one record per line, as many datasets name such files
                lines = enumerate(whole.split("\n"), 1)
                yield from ((number, _record(line)) for number, line in lines if line.strip())
                return
            yield 1, Problem("is not JSON")
            return
        for number, entry in enumerate(value if isinstance(value, list) else [value], 1):
            yield number, entry if isinstance(entry, dict) else Problem(f"is {type_name(entry)}, not a JSON object")

    def _rows(self, start: int) -> Iterator[tuple[int, Item]]:
        import pyarrow
        import pyarrow.parquet

        with reading(self.path), pyarrow.parquet.ParquetFile(self.path) as file:
            names = file.schema_arrow.names
            columns = [self.field] if self.field in names else [name for name in CHAT_KEYS if name in names]
            if not columns:
                raise HaloError(
                    f"data.field: must name a column of text of {self.path}, one of {', '.join(names)}, "
                    f"got {self.field}"
                )
            total, number = max(file.metadata.num_rows, 1), 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if number + rows <= start:
                    number += rows
                    continue
                for batch in file.iter_batches(_ROWS, row_groups=[group], columns=columns):
                    for row in _plain_rows(batch):
                        number += 1
                        if number > start:
                            self.begun, self.fraction = (number - 1) / total, number / total
                            yield number, row


def type_name(value: Any) -> str:
    """Return what JSON calls the type of a value, with its article."""
    names = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _record(line: str) -> dict[str, Any] | Problem:
    try:
        value = json.loads(line)
    except RecursionError:
        return Problem("is nested too deep")
    except ValueError:
        return Problem("is not JSON")
    return value if isinstance(value, dict) else Problem(f"is {type_name(value)}, not a JSON object")


def _plain_rows(batch: Any) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:  # a string column that holds other bytes
        import pyarrow

        binary = [
            column.cast(pyarrow.large_binary()) if pyarrow.types.is_string(column.type) else column
            for column in batch.columns
        ]
        rows = pyarrow.RecordBatch.from_arrays(binary, batch.schema.names).to_pylist()
        return [
            {key: value.decode(errors="replace") if isinstance(value, bytes) else value for key, value in row.items()}
            for row in rows
        ]


def _family(kind: str | None) -> str:
    return TEXT[0] if kind in TEXT else LINES[0] if kind in LINES else JSON[0]


def _decompressed(file: io.FileIO, path: Path) -> io.BufferedReader:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=file), _READ)
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(_Raw(pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")), _READ)
    return io.BufferedReader(file, _READ)


class _Raw(io.RawIOBase):
    """What pyarrow decompresses, for io.BufferedReader."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an error of the file system or of decompression inside the context into one line that names the file."""
    try:
        yield
    except (OSError, EOFError, zlib.error, ValueError) as error:  # pyarrow's errors are OSError or ValueError
        reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
        raise HaloError(f"{path}: must be readable, got {reason}") from None
