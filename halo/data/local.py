"""Text in local files: a file, a directory or a glob."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from halo.data.formats import READABLE, SUFFIXES, FileReader, Problem, kind_of, reading
from halo.data.records import Unusable, record_text
from halo.data.settings import DataSettings, SourceSettings
from halo.data.source import Record, Source
from halo.data.tally import Tally
from halo.settings import HaloError

CACHE_MARK = "tokens.halo"  # a file in the directory of tokens, <out>/data, by which a run's output is recognised
DEMO_MARK = "demo.halo"  # likewise, in the output directory of the demo


def is_local(name: str) -> bool:
    """Return whether a source's name can only be that of files."""
    path = Path(name)
    looks_local = path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2 or "\\" in name
    return looks_local or path.exists() or _is_glob(name) or kind_of(path) is not None or name.endswith("/")


class LocalText(Source):
    """Files, in the order of their names; records are documents, and so is a file of plain text.

    Args:
        entry: The source.
        settings: The section `data`.
        tokenizer: For its chat template.
        out: Directory of the run's results, which are never read as text.

    Raises:
        HaloError: If there is nothing to read.
    """

    def __init__(
        self, entry: SourceSettings, settings: DataSettings, tokenizer: PreTrainedTokenizerBase, out: Path | None
    ) -> None:
        self.name, self.field, self.size = entry.source, entry.field or "text", settings.max_document
        self.tokenizer = tokenizer
        with reading(Path(entry.source)):
            self.root, self.files = find_files(entry.source, out)
            self.sizes = [file.stat().st_size for file in self.files]

    def identity(self) -> list[Any]:
        return [
            "files",
            self.field,
            *((self._relative(file), file.stat().st_size, file.stat().st_mtime_ns) for file in self.files),
        ]

    def read(self, position: Any, tally: Tally) -> Iterator[Record]:
        first, skip = position or (0, 0)
        total, before = max(sum(self.sizes), 1), sum(self.sizes[:first])
        for index in range(first, len(self.files)):
            file = self.files[index]
            reader = FileReader(file, self.field, self.size)
            for number, item in reader.items(skip):
                tally.records += 1
                try:
                    if isinstance(item, Problem):
                        raise Unusable(item.reason)
                    text = item if isinstance(item, str) else record_text(item, self.field, self.tokenizer)
                except Unusable as problem:
                    tally.skip(f"{file}:{number}", str(problem))
                    continue
                begun, fraction = (
                    (before + share * self.sizes[index]) / total for share in (reader.begun, reader.fraction)
                )
                yield Record(text, f"{file}:{number}", [index, number], begun, fraction)
            skip, before = 0, before + self.sizes[index]

    def _relative(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix() if file.is_relative_to(self.root) else file.as_posix()


def find_files(name: str, out: Path | None = None) -> tuple[Path, list[Path]]:
    """Return the directory that a source's files are under, and the files in the order of their names.

    Args:
        name: A file, a directory or a glob.
        out: Directory of a run's results, which are left out.

    Raises:
        HaloError: If there is no readable file.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if kind_of(path) is None:
            raise HaloError(f"data.source: must end in one of {READABLE}, got {name}")
        return path.parent, [path]
    if path.is_dir():
        if out is not None and out.resolve() == path.resolve():
            raise HaloError(f"data.source: must be another directory than the run's output, got {name} for both")
        found, root = _files_below(path, out), path
    elif _is_glob(name):
        matches = [Path(match) for match in glob.glob(os.path.expanduser(name), recursive=True)]
        found = [file for file in matches if file.is_file() and not _in_output(file, out)]
        root = Path(os.path.commonpath([match.parent for match in matches])) if matches else path
    elif path.exists():
        raise HaloError(f"data.source: must be a regular file or a directory, got {name}")
    else:
        raise HaloError(f"data.source: must be an existing file or directory, got {name}")
    files = sorted(file for file in set(found) if kind_of(file) is not None)
    if not files:
        raise HaloError(f"data.source: must hold files ending in {', '.join(SUFFIXES)}, got none in {name}")
    return root, files


def _is_glob(name: str) -> bool:
    return any(character in name for character in "*?[") and not Path(name).exists()


def _files_below(root: Path, out: Path | None) -> list[Path]:
    """Return the regular files below a directory, without following links to directories."""
    found = []
    for directory, names, files in os.walk(root, onerror=_refuse):
        here = Path(directory)
        names[:] = [name for name in names if not _is_output(here / name, out)]
        found += [here / name for name in files if (here / name).is_file()]
    return found


def _refuse(error: OSError) -> None:
    raise error  # rather than read without this directory


def _is_output(directory: Path, out: Path | None) -> bool:
    """Return whether a directory holds results, of this run or another one, or a model: an exported one, a teacher."""
    if out is not None and directory.resolve() == out.resolve():
        return True
    return any((directory / mark).is_file() for mark in (f"data/{CACHE_MARK}", DEMO_MARK)) or _is_model(directory)


def _is_model(directory: Path) -> bool:
    weights = (name for pattern in ("*.safetensors", "*.bin") for name in directory.glob(pattern))
    return (directory / "config.json").is_file() and any(weights)


def _in_output(file: Path, out: Path | None) -> bool:
    return any(_is_output(parent, out) for parent in file.parents)
