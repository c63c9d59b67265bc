"""The attention of transformers' models, computed by `hype_attention`: an entry of their attention interface.

A model looks up two functions under the name of its `attn_implementation`: one that makes the mask of a forward pass,
and one that each layer calls. Ours makes no mask where attention is causal and nothing else, and calls the kernel for
that. Padding, packed documents, windows and fixed-size caches come with a mask, which torch's own function computes.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hypenet_kernels.attention import hype_attention, hype_attention_decode

NAME = "hypenet"
# Keywords of layers whose attention is more than softmax of scaled products; torch's function has no word for them.
UNKNOWN = ("s_aux", "sinks")
logger = logging.getLogger("hypenet_kernels")


def register_attention(name: str = NAME, *, logit_scale_base: float | None = None) -> str:
    """Let any model of transformers that has an attention interface compute its softmax attention by `hype_attention`.

    The kernel runs where attention is causal and nothing else, in prefill, training and decoding. With padding, packed
    documents, a window, dropout, or on a device or in a dtype without kernel, torch's function gives the same result;
    a line of the log says so once (level INFO).

    Args:
        name: The name to give as `attn_implementation`.
        logit_scale_base: a > 1, in tokens: the logits of query t are multiplied by ln(t + a) / ln(a), HyPE's scale for
            lengths beyond those of training; None for 1. With it, what the kernel cannot compute raises.

    Returns:
        The name.

    Raises:
        ValueError: The name is one of transformers' own.
        ImportError: transformers is not installed.

    Example:
        >>> from hypenet_kernels.integrations import register_attention
        >>> model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=register_attention())
        >>> model.set_attn_implementation(register_attention("hype-512", logit_scale_base=512.0))
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    present = ALL_ATTENTION_FUNCTIONS.get(name) if name in ALL_ATTENTION_FUNCTIONS.valid_keys() else None
    if name in ("eager", "sdpa") or (present is not None and not hasattr(present, "hypenet_attention")):
        raise ValueError(f"register_attention: name must not be one of transformers' own, got {name!r}")
    ALL_ATTENTION_FUNCTIONS.register(name, _attention(logit_scale_base))
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, _mask)
    return name


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **options: Any,
) -> Tensor | None:
    """Return None where the last q_length of kv_length tokens attend causally, or else the boolean mask."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    causal = mask_function is None or mask_function is causal_mask_function
    last = isinstance(q_offset, int) and isinstance(kv_offset, int) and q_offset + q_length == kv_offset + kv_length
    if allow_is_causal_skip and causal and last and (attention_mask is None or _is_full(attention_mask)):
        return None
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function or causal_mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        **options,
    )


def _is_full(mask: Tensor) -> bool:
    return not torch.compiler.is_compiling() and bool(mask.all())


def _attention(logit_scale_base: float | None) -> Callable[..., tuple[Tensor, None]]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Return the output [B, T, H, D] of query [B, H, T, D] on key and value [B, HK, S, D], and None."""
        q, k, v = (x.transpose(1, 2) for x in _in_one_dtype(query, key, value))
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        reason = _reason(q, k, v, attention_mask, dropout, causal, options)
        if reason is None:
            return _causal(q, k, v, scaling, logit_scale_base), None
        if logit_scale_base is not None:
            raise NotImplementedError(f"{type(module).__name__}: attention with a logit scale must have no {reason}")
        _say_once(type(module).__name__, reason)
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        options |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    attention.hypenet_attention = True  # type: ignore[attr-defined]
    return attention


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float | None, logit_scale_base: float | None) -> Tensor:
    """Return attention of the last T of S tokens, q [B, T, H, D] on k, v [B, S, HK, D]."""
    B, T, S = *q.shape[:2], k.shape[1]
    if T == 1 and not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))):
        lengths = torch.full((B,), S, dtype=torch.int32, device=q.device)
        return hype_attention_decode(q, k, v, lengths, scale=scale, logit_scale_base=logit_scale_base)
    return hype_attention(q, k, v, scale=scale, logit_scale_base=logit_scale_base, query_offset=S - T)


def _in_one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Convert tensors as autocast does, which does not reach ops of other libraries."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _reason(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool, options: dict[str, Any]
) -> str | None:
    """Return what the kernel cannot compute, or None."""
    for name in UNKNOWN:
        if options.get(name) is not None:
            raise NotImplementedError(f"attn_implementation: must know {name}, which neither the kernel nor sdpa does")
    if mask is not None:
        return "mask (padding, packed documents, a window or a fixed-size cache)"
    if dropout:
        return "dropout"
    if not causal or k.shape[1] < q.shape[1]:
        return "tokens that see later ones"
    if any(options.get(name) is not None for name in ("softcap", "position_bias", "cache")):
        return "softcap, position bias or paged cache"
    if q.device.type not in ("cpu", "cuda") or q.dtype not in _dtypes(q.device.type):
        return f"{q.dtype} on {q.device.type}"
    if not q.dtype == k.dtype == v.dtype or not q.shape[3] == k.shape[3] == v.shape[3]:
        return "values of another dtype or width than the keys"
    if q.device.type == "cuda" and q.shape[3] > 256:
        return "heads wider than 256"
    return None


def _dtypes(device_type: str) -> tuple[torch.dtype, ...]:
    half = (torch.bfloat16, torch.float16)
    return half if device_type == "cuda" else (torch.float64, torch.float32, *half)


@functools.cache
def _say_once(layer: str, reason: str) -> None:
    logger.info("%s: torch's scaled_dot_product_attention runs in place of hype_attention for %s", layer, reason)
