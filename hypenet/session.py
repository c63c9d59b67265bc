"""A cache on disk: what a model has read, so that another process goes on from there.

The file is in safetensors format: keys, values and states of every layer, the states that the cache can go back to, and
if given the tokens. It belongs to one model: sizes, and a few values of every weight, are checked when it is loaded.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hypenet.cache import HypeNetCache
from hypenet.modeling_hypenet import HypeNetPreTrainedModel

FORMAT = "hypenet cache 1"
# Fields of the configuration that change results where the weights are the same.
MEANINGFUL_FIELDS = ("mixer_types", "rope_parameters", "rms_norm_eps", "attn_", "lightning_", "gdn_", "mamba2_")
SAMPLED_VALUES = 16  # of each weight, that a file remembers


def save_cache(
    cache: HypeNetCache, path: str | Path, model: HypeNetPreTrainedModel, input_ids: torch.Tensor | None = None
) -> None:
    """Save a cache to a file, which is replaced as a whole or not at all.

    What `activate_past_recording` recorded is not saved, snapshots are.

    Args:
        cache: The cache, which has seen at least one call.
        path: The file to write, usually `*.safetensors`.
        model: The model that filled the cache.
        input_ids: int64 [B, T], the tokens that it has seen, for the caller's own use.

    Raises:
        ValueError: If the cache is empty, or `input_ids` does not have its B sequences.
        OSError: If the file cannot be written.

    Example:
        >>> import tempfile, torch
        >>> from hypenet import HypeNetConfig, HypeNetForCausalLM, load_cache, save_cache
        >>> config = HypeNetConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, head_dim=8,
        ...                        num_attention_heads=2, num_key_value_heads=1)
        >>> model, ids = HypeNetForCausalLM(config).eval(), torch.tensor([[3, 1, 4, 1, 5]])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_cache(model(ids).past_key_values, f"{folder}/document.safetensors", model, ids)
        ...     cache, document = load_cache(f"{folder}/document.safetensors", model)
        >>> prompt = torch.cat([document, torch.tensor([[9, 2]])], dim=1)  # only 9 and 2 are read
        >>> model.generate(prompt, past_key_values=cache, max_new_tokens=3, min_new_tokens=3, pad_token_id=0).shape
        torch.Size([1, 10])
    """
    if cache.lengths is None or cache.get_seq_length() == 0:
        raise ValueError("save_cache: cache must have seen at least one token, got an empty cache")
    if input_ids is not None and (input_ids.dim() != 2 or input_ids.shape[0] != cache.batch_size):
        raise ValueError(f"save_cache: input_ids must have shape [{cache.batch_size}, T], got {list(input_ids.shape)}")
    tensors = cache.state_dict()
    if input_ids is not None:
        tensors["input_ids"] = input_ids
    facts = {"format": FORMAT, "model": model_fingerprint(model)}
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, temporary, metadata=facts)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_cache(path: str | Path, model: HypeNetPreTrainedModel) -> tuple[HypeNetCache, torch.Tensor | None]:
    """Load a cache that `save_cache` wrote, onto the model's device.

    Args:
        path: The file.
        model: The model that filled the cache, or one with the same weights and dtype.

    Returns:
        (the cache, input_ids [B, T] or None if none were saved).

    Raises:
        ValueError: If the file is not a cache, is damaged, or belongs to another model.
        OSError: If the file cannot be read.
    """
    try:
        with safe_open(path, "pt", device=str(model.device)) as file:
            facts, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"load_cache: path must be a complete file of save_cache, got {path} ({error})") from None
    if (found := facts.get("format")) != FORMAT:
        raise ValueError(f"load_cache: path must be a file of save_cache ({FORMAT!r}), got {path} ({found!r})")
    if facts.get("model") != model_fingerprint(model):
        raise ValueError(f"load_cache: path must be the cache of a model with these weights and dtype, got {path}")
    input_ids = tensors.pop("input_ids", None)
    cache = HypeNetCache(model.config)
    try:
        cache.load_state_dict(tensors)
    except (KeyError, ValueError) as error:
        raise ValueError(f"load_cache: path must be a complete file of save_cache, got {path} ({error})") from None
    return cache, input_ids


def model_fingerprint(model: HypeNetPreTrainedModel) -> str:
    """Return a hash of a model's layers and of a few values of each weight: equal for equal models, in one dtype."""
    base: Any = model.base_model
    fields = {name: x for name, x in base.config.to_dict().items() if name.startswith(MEANINGFUL_FIELDS)}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, x in sorted(base.state_dict().items()):
        flat = x.detach().flatten()
        index = torch.linspace(0, max(flat.numel() - 1, 0), SAMPLED_VALUES, device=flat.device).long()
        values: list[Any] = flat[index].double().tolist() if flat.numel() else []
        digest.update(json.dumps([name, str(x.dtype), list(x.shape), values]).encode())
    return digest.hexdigest()
