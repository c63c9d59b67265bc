"""Sources of text: local files, the Python standard library, or a dataset streamed from Hugging Face.

Every source yields whole documents and assigns each to training or held-out text by a hash, so the split is the same in
every run.
"""

import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halo.data import DataSettings
from halo.settings import HaloError
from halo.demo import corpus

if TYPE_CHECKING:
    import datasets

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".jsonl")
# Documents of a streamed dataset that are read, from each side of the split, for evaluation and episodes.
STREAMED_DOCUMENTS = 500


def open_source(settings: DataSettings) -> "Source":
    """Return the source that `settings.source` names.

    Raises:
        HaloError: If there is no such source.
    """
    path = Path(settings.source)
    if settings.source == "stdlib":
        return StandardLibrary(settings)
    if path.exists():
        return LocalText(settings, path)
    if path.suffix in TEXT_SUFFIXES or path.is_absolute() or settings.source.startswith(".") or len(path.parts) > 2:
        raise HaloError(f"data.source: must be an existing file or directory, got {settings.source}")
    return StreamedText(settings)


def is_held_out(text: str, share: float) -> bool:
    """Return whether a document is held out, by a hash of its text: the same in every run and every source."""
    return zlib.crc32(text[:4096].encode()) % 1_000_000 < share * 1_000_000


class LocalText:
    """A file, or all text files under a directory in the order of their names; .jsonl files hold one document per line.

    Raises:
        HaloError: If there is no file to read, or, while reading, if a line is not a JSON object with the key.
    """

    def __init__(self, settings: DataSettings, path: Path) -> None:
        self.settings, self.path = settings, path
        below = () if path.is_file() else sorted(path.rglob("*"))
        self.files = [file for file in below if file.suffix in TEXT_SUFFIXES and file.is_file()]
        self.files += [path] if path.is_file() else []
        if not self.files:
            raise HaloError(f"data.source: must hold files ending in {', '.join(TEXT_SUFFIXES)}, got {path}")

    def texts(self, held_out: bool) -> Iterator[str]:
        """Yield the documents of one side of the split."""
        for file in self.files:
            for text in self._documents(file):
                if text and is_held_out(text, self.settings.held_out) == held_out:
                    yield text

    def fingerprint(self) -> str:
        """Return a text that identifies the documents, for keys of caches."""
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
    """A Hugging Face dataset, streamed.

    Raises:
        HaloError: If the dataset cannot be reached, or, while reading, if it has no such column of text.
    """

    def __init__(self, settings: DataSettings) -> None:
        self.settings = settings
        self.rows(shuffle_seed=0)

    def rows(self, shuffle_seed: int) -> "datasets.IterableDataset":
        """Return the dataset with its shards in the order of a seed."""
        import datasets

        name, subset = self.settings.source, self.settings.subset
        try:
            rows = datasets.load_dataset(name, subset, split=self.settings.split, streaming=True)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise HaloError(
                f"data.source: must be an existing path or a dataset that can be reached, got {name} ({reason})"
            ) from None
        # A buffer of one row shuffles only the order of the shards, which a resume restores exactly.
        return rows.shuffle(seed=shuffle_seed, buffer_size=1)

    def texts(self, held_out: bool) -> Iterator[str]:
        """Yield the documents of one side of the split."""
        found = 0
        for row in self.rows(shuffle_seed=0):
            text = self.text(row)
            if text and is_held_out(text, self.settings.held_out) == held_out:
                yield text
                found += 1
                if found == STREAMED_DOCUMENTS:
                    return

    def text(self, row: dict[str, Any]) -> str:
        """Return the text of a row."""
        if not isinstance(row.get(self.settings.field), str):
            columns = ", ".join(sorted(row))
            raise HaloError(f"data.field: must name a column of text, one of {columns}, got {self.settings.field}")
        return row[self.settings.field]

    def fingerprint(self) -> str:
        """Return a text that identifies the documents, for keys of caches."""
        return f"{self.settings.source}:{self.settings.subset}:{self.settings.split}"


class StandardLibrary:
    """The text that comes with Python, split by a hash of its documents' names."""

    def __init__(self, settings: DataSettings) -> None:
        self.settings = settings

    def texts(self, held_out: bool) -> Iterator[str]:
        """Yield the documents of one side of the split."""
        return iter(corpus.documents("heldout" if held_out else "train", self.settings.held_out))

    def fingerprint(self) -> str:
        """Return a text that identifies the documents, for keys of caches."""
        digest = hashlib.sha256()
        for held_out in (False, True):
            for text in self.texts(held_out):
                digest.update(text.encode())
        return digest.hexdigest()


Source = LocalText | StreamedText | StandardLibrary
