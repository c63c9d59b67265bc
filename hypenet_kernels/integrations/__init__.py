"""Use hypenet_kernels inside other libraries."""

from hypenet_kernels.integrations._transformers import Patch, Replacement, patch_transformers

__all__ = ["Patch", "Replacement", "patch_transformers"]
