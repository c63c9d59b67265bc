"""HALO: converts a Transformer into a HypeNet, in the stages of `halo.stages`."""

from halo.extras import version

__version__ = version()
