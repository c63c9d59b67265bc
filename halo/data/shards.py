"""One shard: a file of tokenised documents, written whole or not at all, and checked when it is found again.

one line of JSON, padded with spaces to a multiple of 64 bytes: counts, positions, tally, digest
tokens   uint32 [tokens]      all documents, each ending in EOS
offsets  uint64 [documents]   where each document ends
keys     uint64 [documents]   hash by which a document is assigned to a split
"""

import hashlib
import json
import os
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from halo.files import PARTIAL, sync_directory

VERSION = 1
_ALIGNMENT = 64
_HEADER_BYTES = 1 << 20  # a header is shorter


@dataclass(frozen=True)
class Header:
    """The first line of a shard.

    Attributes:
        tokens, documents: Counts.
        start, end: Positions in the source before and after its documents.
        fraction: Share of the source that is read at its end.
        last: Whether the source ends with it.
        tally: Records that were read and skipped on the way.
        digest: SHA-256 of the arrays.
        check: Checksum of the values above.
    """

    tokens: int
    documents: int
    start: Any
    end: Any
    fraction: float
    last: bool
    tally: dict[str, Any]
    digest: str
    check: int = 0

    def sealed(self) -> "Header":
        """Return the header with its own checksum."""
        values = asdict(self) | {"check": 0}
        return Header(**values | {"check": zlib.crc32(json.dumps(values, sort_keys=True).encode())})

    @property
    def whole(self) -> bool:
        """Whether the values are those that were written."""
        return self == self.sealed()


@dataclass(frozen=True)
class Shard:
    """The content of a shard."""

    tokens: np.ndarray  # uint32 [tokens]
    offsets: np.ndarray  # uint64 [documents], ends
    keys: np.ndarray  # uint64 [documents]


def shard_path(directory: Path, index: int) -> Path:
    """Return the path of a shard."""
    return directory / f"{index:06d}.tokens"


def write_shard(path: Path, shard: Shard, header: Header) -> Header:
    """Write a shard by way of a temporary file.

    Args:
        path: The file; its directory exists.
        shard: The arrays.
        header: Positions and tally; counts and checksums are filled in.

    Returns:
        The header as written.

    Raises:
        OSError: If it cannot be written.
    """
    arrays = (
        np.ascontiguousarray(shard.tokens, np.dtype("<u4")),
        np.ascontiguousarray(shard.offsets, np.dtype("<u8")),
        np.ascontiguousarray(shard.keys, np.dtype("<u8")),
    )
    counts = {"tokens": len(shard.tokens), "documents": len(shard.offsets)}
    values = asdict(header) | counts | {"digest": _digest(arrays)}
    header = Header(**json.loads(json.dumps(values))).sealed()
    line = json.dumps(asdict(header) | {"version": VERSION}).encode()
    line += b" " * (-(len(line) + 1) % _ALIGNMENT) + b"\n"
    # Two processes may write the same shard after a kill; each has its own temporary file.
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            file.write(line)
            for array in arrays:
                file.write(array.data if array.size else b"")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_directory(path.parent)
    return header


def read_header(path: Path, check: bool = True) -> Header | None:
    """Return the header of a shard, or None if the shard is missing, short or damaged.

    Args:
        path: The file.
        check: Whether to read the arrays and compare their digest; else only the size is compared.
    """
    try:
        with path.open("rb") as file:
            line = file.readline(_HEADER_BYTES)
            values = json.loads(line)
            if values.pop("version") != VERSION:
                return None
            header = Header(**values)
            size = len(line) + 4 * header.tokens + 16 * header.documents
            if not header.whole or os.fstat(file.fileno()).st_size != size:
                return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if check:
        shard = open_shard(path)
        if _digest((shard.tokens, shard.offsets, shard.keys)) != header.digest:
            return None
    return header


def open_shard(path: Path) -> Shard:
    """Map a shard that was checked into memory."""
    with path.open("rb") as file:
        line = file.readline(_HEADER_BYTES)
    values = json.loads(line)
    tokens, documents = values["tokens"], values["documents"]
    if not documents:
        return Shard(np.zeros(0, np.uint32), np.zeros(0, np.uint64), np.zeros(0, np.uint64))
    data = np.memmap(path, np.uint8, "r", offset=len(line))
    ends = 4 * tokens, 4 * tokens + 8 * documents
    # Offsets and keys are copied: after an odd number of tokens they are not aligned.
    return Shard(
        data[: ends[0]].view(np.dtype("<u4")),
        np.frombuffer(data[ends[0] : ends[1]].tobytes(), np.dtype("<u8")),
        np.frombuffer(data[ends[1] :].tobytes(), np.dtype("<u8")),
    )


def _digest(arrays: tuple[np.ndarray, ...]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        if array.size:
            digest.update(array.data)
    return digest.hexdigest()
