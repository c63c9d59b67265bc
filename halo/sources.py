"""Where text comes from: local files, the library that comes with Python, or a dataset streamed from Hugging Face.

Every source yields whole documents and splits them into training and held-out ones by a property of the document, so
the split is the same in every run.
"""

import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halo.config import DataSettings, HaloError
from halo.demo import corpus

if TYPE_CHECKING:
    import datasets

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".jsonl")
# Of a streamed dataset, so many documents of each side of the split are read for evaluation and for episodes.
STREAMED_DOCUMENTS = 500


def open_source(settings: DataSettings) -> "Source":
    """The source that `settings.source` names; HaloError if there is none."""
    path = Path(settings.source)
    if settings.source == "stdlib":
        return StandardLibrary(settings)
    if path.exists():
        return LocalText(settings, path)
    if path.suffix in TEXT_SUFFIXES or path.is_absolute() or settings.source.startswith(".") or len(path.parts) > 2:
        raise HaloError(f"data.source: must be an existing file or directory, got {settings.source}")
    return StreamedText(settings)


def is_held_out(text: str, share: float) -> bool:
    """Whether a document is for evaluation only: a property of its text, the same in every run and source."""
    return zlib.crc32(text[:4096].encode()) % 1_000_000 < share * 1_000_000


class LocalText:
    """A file, or all text files under a directory in name order; JSONL by its suffix."""

    def __init__(self, settings: DataSettings, path: Path) -> None:
        self.settings, self.path = settings, path
        below = () if path.is_file() else sorted(path.rglob("*"))
        self.files = [file for file in below if file.suffix in TEXT_SUFFIXES and file.is_file()]
        self.files += [path] if path.is_file() else []
        if not self.files:
            raise HaloError(f"data.source: must hold files ending in {', '.join(TEXT_SUFFIXES)}, got {path}")

    def texts(self, held_out: bool) -> Iterator[str]:
        for file in self.files:
            for text in self._documents(file):
                if text and is_held_out(text, self.settings.held_out) == held_out:
                    yield text

    def fingerprint(self) -> str:
        stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]
        return json.dumps(stats)

    def _documents(self, file: Path) -> Iterator[str]:
        if file.suffix != ".jsonl":
            yield file.read_text(errors="replace")
            return
        with file.open() as lines:
            for number, line in enumerate(lines, 1):
                try:
                    text = json.loads(line)[self.settings.field] if line.strip() else ""
                except (ValueError, KeyError, TypeError):
                    field = self.settings.field
                    raise HaloError(f"{file}:{number}: must be a JSON object with the key {field}") from None
                yield text


class StreamedText:
    """A Hugging Face dataset, read as it downloads."""

    def __init__(self, settings: DataSettings) -> None:
        self.settings = settings
        self.rows(shuffle_seed=0)

    def rows(self, shuffle_seed: int) -> "datasets.IterableDataset":
        import datasets

        name, subset = self.settings.source, self.settings.subset
        try:
            rows = datasets.load_dataset(name, subset, split=self.settings.split, streaming=True)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise HaloError(
                f"data.source: must be an existing path or a dataset that can be reached, got {name} ({reason})"
            ) from None
        # A buffer of one shuffles the order of the shards only, which is restored exactly.
        return rows.shuffle(seed=shuffle_seed, buffer_size=1)

    def texts(self, held_out: bool) -> Iterator[str]:
        found = 0
        for row in self.rows(shuffle_seed=0):
            text = self.text(row)
            if text and is_held_out(text, self.settings.held_out) == held_out:
                yield text
                found += 1
                if found == STREAMED_DOCUMENTS:
                    return

    def text(self, row: dict[str, Any]) -> str:
        if not isinstance(row.get(self.settings.field), str):
            columns = ", ".join(sorted(row))
            raise HaloError(f"data.field: must name a column of text, one of {columns}, got {self.settings.field}")
        return row[self.settings.field]

    def fingerprint(self) -> str:
        return f"{self.settings.source}:{self.settings.subset}:{self.settings.split}"


class StandardLibrary:
    """The text that comes with Python, split by a hash of its documents' names."""

    def __init__(self, settings: DataSettings) -> None:
        self.settings = settings

    def texts(self, held_out: bool) -> Iterator[str]:
        return iter(corpus.documents("heldout" if held_out else "train", self.settings.held_out))

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for held_out in (False, True):
            for text in self.texts(held_out):
                digest.update(text.encode())
        return digest.hexdigest()


Source = LocalText | StreamedText | StandardLibrary
