"""From names to sources: local files, the Python standard library, or a dataset of Hugging Face."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from halo.data.hub import HubText
from halo.data.local import LocalText, is_local
from halo.data.settings import DataSettings, SourceSettings
from halo.data.source import Record, Source
from halo.data.tally import Tally
from halo.demo import corpus


def open_source(
    entry: SourceSettings, settings: DataSettings, tokenizer: PreTrainedTokenizerBase, out: Path | None = None
) -> Source:
    """Return the source that `entry` names.

    Args:
        entry: The source, with every key filled in.
        settings: The section `data`.
        tokenizer: For chats.
        out: Directory of the run's results, which are never read as text.

    Raises:
        HaloError: If there are no such files.
    """
    if entry.source == "stdlib":
        return StandardLibrary()
    if is_local(entry.source):
        return LocalText(entry, settings, tokenizer, out)
    return HubText(entry, tokenizer)


class StandardLibrary(Source):
    """The text that comes with Python, split by a hash of its documents' names, as for the demo's teacher."""

    name = "stdlib"
    fixed_split: ClassVar[bool] = True

    def __init__(self) -> None:
        self.documents = corpus.named_documents()

    def identity(self) -> Any:
        digest = hashlib.sha256()
        for name, text in self.documents:
            digest.update(f"{name}\0{text}\0".encode(errors="surrogatepass"))
        return ["stdlib", digest.hexdigest()]

    def read(self, position: Any, tally: Tally) -> Iterator[Record]:
        first = position or 0
        for number, (name, text) in enumerate(self.documents[first:], first + 1):
            tally.records += 1
            total = len(self.documents)
            yield Record(text, name, number, (number - 1) / total, number / total, corpus.split_key(name))
