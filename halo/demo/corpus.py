"""Text that comes with every Python installation: the standard library's documentation, sources and licence.

A document is one topic of `pydoc_data.topics`, one source file, or the licence. Whole documents are held out, by a hash
of their names, so the split is the same on every machine; the text depends on the installed Python version.
"""

import hashlib
import sysconfig
from pathlib import Path

SPLITS = ("train", "heldout")
HELDOUT_SHARE = 1 / 16  # of the split that the demo's teacher was trained on
# Left out: tests and tables, of which there is more than of everything else, and what differs between machines.
SKIPPED_DIRECTORIES = frozenset(
    {"__pycache__", "dist-packages", "encodings", "ensurepip", "idlelib", "lib2to3", "site-packages", "test", "tests"}
    | {"turtledemo", "pydoc_data"}
)
LICENCE_NAMES = ("LICENSE.txt", "LICENSE")


def documents(split: str, share: float = HELDOUT_SHARE) -> list[str]:
    """Return the documents of `split` ("train" or "heldout"), ordered by name; `share` of them are held out."""
    if split not in SPLITS:
        raise ValueError(f"documents: split must be one of {SPLITS}, got {split!r}")
    return [text for name, text in named_documents() if is_heldout(name, share) == (split == "heldout")]


def is_heldout(name: str, share: float = HELDOUT_SHARE) -> bool:
    """Return whether a document is held out. What a smaller share holds out, a larger one does too."""
    return split_key(name) < share * 2**64


def split_key(name: str) -> int:
    """Return a hash of a document's name, below 2**64; the documents with the smallest are held out."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") << 32


def named_documents() -> list[tuple[str, str]]:
    """Return all documents with their names, ordered by name."""
    from pydoc_data.topics import topics

    named = {f"topics/{name}": text for name, text in topics.items()}
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in stdlib.rglob("*.py"):
        relative = path.relative_to(stdlib)
        generated = path.name.startswith("_sysconfigdata") or relative.parts[0].startswith("config-")
        if generated or SKIPPED_DIRECTORIES.intersection(relative.parts):
            continue
        named[relative.as_posix()] = path.read_text(encoding="utf-8", errors="replace")
    for name in LICENCE_NAMES:
        if (stdlib / name).is_file():
            named["licence"] = (stdlib / name).read_text(encoding="utf-8", errors="replace")
            break
    return [(name, named[name]) for name in sorted(named) if named[name].strip()]
