"""Loading of a saved model with its tokenizer, so that whatever is wrong with the folder is one line."""

from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import hypenet  # noqa: F401  registers the model type
from halo.errors import HaloError
from halo.files import reading
from halo.weight_files import check_weights, weight_files

MAX_NAMES = 3


def load_saved(folder: Path, dtype: torch.dtype | str, remedy: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer from a folder as `save_pretrained` writes it.

    Args:
        folder: The folder.
        dtype: Data type of the weights, or "auto": as saved.
        remedy: What to do if something is missing or damaged, to end the message with.

    Returns:
        The model on the CPU in evaluation mode, and the tokenizer.

    Raises:
        HaloError: If a file is missing, not whole, or a git-lfs pointer, or if the weights are not exactly those that
            the configuration asks for.
    """
    try:
        for path in weight_files(folder, "model"):
            check_weights(path, "model")
    except HaloError as error:
        raise HaloError(f"{error}; {remedy}") from None
    with reading(folder, remedy):
        options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # all is told below
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
        model, report = loaded
        tokenizer = AutoTokenizer.from_pretrained(folder)
    check_loading(folder, report, remedy)
    return cast(PreTrainedModel, model.eval()), tokenizer


def check_loading(folder: Path, report: dict[str, Any], remedy: str) -> None:
    """Check transformers' report of a loaded model: no weight was missing and made up, and none was left over.

    Raises:
        HaloError: If one was.
    """
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(name if isinstance(name, str) else name[0] for name in report[f"{kind}_keys"])
        if names:
            more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
            raise HaloError(
                f"{folder}: must hold the weights that its configuration names, got {kind} "
                f"{', '.join(names[:MAX_NAMES])}{more}; {remedy}"
            )
