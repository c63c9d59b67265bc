"""Use hypenet_kernels inside other libraries."""

from hypenet_kernels.integrations._attention import register_attention
from hypenet_kernels.integrations._fla_backend import FlaBackend, register_fla_backend
from hypenet_kernels.integrations._transformers import Patch, Replacement, patch_transformers

__all__ = ["FlaBackend", "Patch", "Replacement", "patch_transformers", "register_attention", "register_fla_backend"]
