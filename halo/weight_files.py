"""Files of weights: which ones a folder has, whether they are whole, and what a .gguf file says of its model."""

import copy
import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from halo.errors import HaloError
from halo.extras import require

# In the order in which transformers looks for them.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
LFS_POINTER = b"version https://git-lfs"


def weight_files(folder: Path, name: str = "teacher") -> list[Path]:
    """Return the files of a model's weights, those that transformers would read.

    Args:
        folder: A folder as `save_pretrained` writes it.
        name: What it is, to begin a message with.

    Raises:
        HaloError: If it is not such a folder.
    """
    if not (folder / "config.json").is_file():
        raise HaloError(f"{name}: must hold config.json, got {folder} without it")
    first = next((folder / file for file in WEIGHTS if (folder / file).is_file()), None)
    if first is None:
        raise HaloError(f"{name}: must hold weights ({WEIGHTS[0]} or {WEIGHTS[2]}), got none in {folder}")
    if first.suffix != ".json":
        return [first]
    try:
        shards = {str(shard) for shard in json.loads(first.read_text())["weight_map"].values()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise HaloError(f"{name}: {first} must map the names of weights to files") from None
    return [folder / shard for shard in sorted(shards)]


def check_weights(path: Path, name: str = "teacher") -> None:
    """Check that a file of weights is there and is whole, as far as its first bytes and its size tell.

    Raises:
        HaloError: If it is not.
    """
    if not path.is_file():
        raise HaloError(f"{name}: {path} must be there: the index of the weights names it")
    refuse_pointer(path, name)
    if path.suffix == ".safetensors":
        size, needed = path.stat().st_size, _safetensors_size(path, name)
        if needed != size:
            raise HaloError(f"{name}: {path} must be a whole safetensors file of {needed} bytes, got {size} bytes")


def refuse_pointer(path: Path, name: str = "teacher") -> None:
    """Raise a HaloError if a file is the pointer that git-lfs leaves in place of it."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise HaloError(f"{name}: {path} must be the file itself, got a git-lfs pointer; run: git lfs pull")


def gguf_config(path: Path) -> PreTrainedConfig:
    """Return the configuration of the model in a .gguf file.

    Raises:
        HaloError: If the file has scaled rotary embeddings, which transformers takes for plain ones.
        ModuleNotFoundError: If a package that reads such files is missing.
    """
    metadata, names = _read_header(path)
    architecture = metadata["general.architecture"]
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling == "none" and any(name.startswith("rope_") for name in names):
        scaling = "in its tensors"
    if scaling != "none":
        raise HaloError(
            f"teacher: must have unscaled rotary embeddings in a .gguf file, as transformers reads no others, "
            f"got scaling {scaling} in {path}; use the model's safetensors"
        )
    config = copy.deepcopy(_read_config(path, path.stat().st_mtime_ns))
    head_dim = metadata.get(f"{architecture}.attention.key_length")  # which transformers reads for some families only
    if head_dim is not None:
        config.head_dim = head_dim
    return config


@contextmanager
def without_bars() -> Iterator[None]:
    """Hide the bar of transformers' reader of .gguf files, which switching off its other bars does not reach."""
    from transformers import modeling_gguf_pytorch_utils as reader

    shown: Any = getattr(reader, "tqdm", None)
    if shown is None:
        yield
        return
    try:
        setattr(reader, "tqdm", partial(shown, disable=True))  # noqa: B010  mypy: not a variable of the module
        yield
    finally:
        setattr(reader, "tqdm", shown)  # noqa: B010


def gguf_tensors(path: Path) -> int:
    """Return the number of tensors in a .gguf file."""
    return len(_read_header(path)[1])


def _read_header(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the metadata, with the length in place of an array of strings, and the names of the tensors."""
    require("teacher", "gguf", "gguf", "accelerate")
    from transformers.integrations.gguf.reader import read_gguf_metadata

    return read_gguf_metadata(str(path))


@cache
def _read_config(path: Path, modified: int) -> PreTrainedConfig:
    """Read the configuration; as that takes seconds, each version of a file is read once."""
    return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)


def _safetensors_size(path: Path, name: str) -> int:
    """Return the size that a safetensors file must have by its header."""
    with path.open("rb") as file:
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, path.stat().st_size)))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (struct.error, ValueError, LookupError, TypeError, AttributeError):
            raise HaloError(f"{name}: {path} must be a safetensors file, got one whose header is damaged") from None
    return 8 + length + max(ends, default=0)
