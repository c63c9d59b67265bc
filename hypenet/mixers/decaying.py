"""The base of recurrences with a decay per head and token: B batch, T tokens, C hidden size, H heads, D head size."""

from typing import Any

import torch
from torch import nn

from hypenet.mixers.decay import LogDecay, rename_decay
from hypenet.mixers.mixer import HypeNetGatedRMSNorm, Mixer


class DecayingMixer(Mixer):
    """Base of gated DeltaNet and Mamba2: parameters of the decay, norm and gate of the output."""

    def add_decay_and_output(self, use_gate: bool, smallest: float = 0.0) -> None:
        """Create the parameters of the decay, the norm of each head's output, and its gate.

        Args:
            use_gate: Whether the output has a SiLU gate.
            smallest: Least initial exp(A_log).
        """
        hidden, width = self.config.hidden_size, self.num_heads * self.head_dim
        # transformers' Trainer decays no weight with "bias" in its name
        self.decay_bias = LogDecay(self.num_heads, smallest)
        self.o_norm = HypeNetGatedRMSNorm(self.head_dim, self.config.rms_norm_eps, "silu")
        self.g_proj = nn.Linear(hidden, width, bias=False) if use_gate else None

    def project_output(self, o_BTHD: torch.Tensor, x_BTC: torch.Tensor) -> torch.Tensor:
        """Return (RMSNorm(o) * silu(x Wg)) Wo, [B, T, C]."""
        gate = None if self.g_proj is None else self.g_proj(x_BTC).view_as(o_BTHD)
        return self.o_proj(self.o_norm(o_BTHD, gate).flatten(-2))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        rename_decay(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
