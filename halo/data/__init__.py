"""From text to batches: read sources, tokenise once into shards, split three ways, pack, shuffle under a seed.

    sources -> pieces of text -> shards of tokens -> train / choose / judge -> sample n of a stage -> batches

Importing this package imports neither torch nor transformers; its names are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halo.data.batch import Batch
    from halo.data.corpus import Corpus
    from halo.data.loading import batches
    from halo.data.samples import Samples
    from halo.data.settings import SPLITS, DataSettings, SourceSettings
    from halo.data.store import PackedOrder, TokenStore
    from halo.data.tokenizing import Progress

__all__ = [
    "SPLITS",
    "Batch",
    "Corpus",
    "DataSettings",
    "PackedOrder",
    "Progress",
    "Samples",
    "SourceSettings",
    "TokenStore",
    "batches",
]
_MODULES = {
    "batch": ("Batch",),
    "corpus": ("Corpus",),
    "loading": ("batches",),
    "samples": ("Samples",),
    "settings": ("SPLITS", "DataSettings", "SourceSettings"),
    "store": ("PackedOrder", "TokenStore"),
    "tokenizing": ("Progress",),
}
_HOME = {name: f"halo.data.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
