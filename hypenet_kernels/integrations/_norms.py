"""The RMSNorms of transformers' recurrent families, each in one pass over its input instead of six or more.

A result in 16 bits is rounded once, where most of transformers' classes round before the product with the weight too.
An instance that computes something else than its class does by default (norms of groups, another activation), or whose
tensors are of several types, keeps transformers' function.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hypenet_kernels
from hypenet_kernels._checks import FLOATS
from hypenet_kernels.integrations._call_sites import Site, on_supported_device
from hypenet_kernels.normalization import ACTIVATIONS

# Family -> the names of its classes for y = n (1 + weight), n weight, and n weight act(gate), n = x / rms(x).
CENTRED = {
    "qwen3_next": "Qwen3NextRMSNorm",
    "qwen3_5": "Qwen3_5RMSNorm",
    "qwen3_5_moe": "Qwen3_5MoeRMSNorm",
    "qwen4_exp": "Qwen4ExpTextRMSNorm",
}
PLAIN = {
    "olmo_hybrid": "OlmoHybridRMSNorm",
    "bamba": "BambaRMSNorm",
    "falcon_h1": "FalconH1RMSNorm",
    "granitemoehybrid": "GraniteMoeHybridRMSNorm",
    "mamba2": "Mamba2RMSNorm",
    "nemotron_h": "NemotronHRMSNorm",
    "zamba2": "Zamba2RMSNorm",
}
GATED = {
    "qwen3_next": "Qwen3NextRMSNormGated",
    "qwen3_5": "Qwen3_5RMSNormGated",
    "qwen3_5_moe": "Qwen3_5MoeRMSNormGated",
    "olmo_hybrid": "OlmoHybridRMSNormGated",
    "qwen4_exp": "Qwen4ExpTextRMSNormGated",
}


def centred(site: Site) -> Callable[..., Tensor]:
    """Return the forward of a norm whose weight is stored as its difference from 1."""
    return _norm(site, lambda layer: 1.0 + layer.weight.float())


def plain(site: Site) -> Callable[..., Tensor]:
    """Return the forward of a norm."""
    return _norm(site, lambda layer: layer.weight)


def gated(site: Site) -> Callable[..., Tensor]:
    """Return the forward of a norm that is followed by a gate."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        activation = getattr(self, "activation", None)
        if len(args) != 2 or kwargs or activation not in ACTIVATIONS or not _fits(self, *args):
            return site.original(self, *args, **kwargs)
        x, gate = args
        try:
            return hypenet_kernels.rms_norm_gated(x, gate, self.weight, eps=_eps(self), activation=activation)
        except NotImplementedError as error:
            return site.fall_back(error, self, *args)

    return forward


def _norm(site: Site, weight_of: Callable[[Any], Tensor]) -> Callable[..., Tensor]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) != 1 or kwargs or not _fits(self, *args):
            return site.original(self, *args, **kwargs)
        try:
            return hypenet_kernels.rms_norm_rope(args[0], weight_of(self), eps=_eps(self))
        except NotImplementedError as error:
            return site.fall_back(error, self, *args)

    return forward


def _eps(layer: Any) -> float:
    return layer.variance_epsilon if hasattr(layer, "variance_epsilon") else layer.eps


def _fits(layer: Any, *inputs: Any) -> bool:
    """Return whether the op computes what this instance does: no groups, and one dtype, which is the result's."""
    first = inputs[0]
    if not torch.is_tensor(first) or first.dtype not in FLOATS or not on_supported_device(first):
        return False
    if getattr(layer, "group_size", None) is not None:
        return False
    return all(torch.is_tensor(x) and x.dtype == layer.weight.dtype and x.shape == first.shape for x in inputs)
