"""Loading of teachers."""
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, Qwen3ForCausalLM
from halo.settings import HaloError
from hypenet.conversion import check_teacher


def load_config(name):
    with _teacher_errors(name):
        check_teacher(_qwen3_config(name))
    return _qwen3_config(name)


def fingerprint(name):
    return name

def load_teacher(name: str, device: torch.device, dtype=torch.float32) -> Qwen3ForCausalLM:
    """Load a teacher in fp32.

    Args:
        name: A directory, a Hugging Face name, or "demo" for the teacher that ships with the package.
        device: Where to put it.

    Raises:
        HaloError: If it cannot be loaded or is not a Qwen3.
    """
    with _teacher_errors(name):
        check_teacher(_qwen3_config(name))
        teacher = Qwen3ForCausalLM.from_pretrained(_teacher_path(name), dtype=dtype)
    teacher.to(device)  # type: ignore[arg-type]  # transformers wraps Module.to without its types
    return teacher


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a teacher.

    Raises:
        HaloError: If it cannot be loaded or does not fit the model's vocabulary.
    """
    with _teacher_errors(name):
        vocabulary = _qwen3_config(name).vocab_size
        tokenizer = AutoTokenizer.from_pretrained(_teacher_path(name))
    if not 256 <= len(tokenizer) <= vocabulary:
        raise HaloError(
            f"teacher: must come with its tokenizer of at most {vocabulary} tokens, got {len(tokenizer)} in {name}"
        )
    return tokenizer


def _teacher_path(name: str) -> str:
    return str(resources.files("halo") / "demo" / "teacher") if name == "demo" else name


def _qwen3_config(name: str) -> PreTrainedConfig:
    is_path = name.startswith((".", "/")) or name.count("/") > 1
    if is_path and not Path(name).is_dir():
        raise HaloError(f"teacher: must be an existing directory or a Hugging Face name, got {name}")
    config = AutoConfig.from_pretrained(_teacher_path(name))
    if config.model_type != "qwen3":
        raise HaloError(f"teacher: must be a Qwen3 model (model_type qwen3), got {config.model_type} in {name}")
    return config


@contextmanager
def _teacher_errors(name: str) -> Iterator[None]:
    """Turn the errors of transformers for a model that cannot be loaded into a HaloError."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise HaloError(f"teacher: must be a loadable Qwen3 model with its tokenizer, got {name} ({reason})") from None
