"""The decays of recurrent layers: their parameters, which stay float32 in every precision of a model."""

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn

HALF = (torch.bfloat16, torch.float16)


class LogDecay(nn.Module):
    """The float32 parameters of a decay per head and token, ln alpha_t = -exp(A_log) softplus(a_t + dt_bias).

    Calling it returns A_log and dt_bias as one tensor [2, H]. They are a module of their own because FSDP2 has one
    policy for all parameters of a unit, and beside bfloat16 weights they need another:
    `fully_shard(mixer.decay_bias, mp_policy=MixedPrecisionPolicy(torch.float32, torch.float32))`. FSDP 1
    flattens all parameters of a unit into one of one dtype: name LogDecay in `auto_wrap_policy`.

    Args:
        heads: Number of heads, H.
        smallest: Least initial exp(A_log).
    """

    def __init__(self, heads: int, smallest: float = 0.0) -> None:
        super().__init__()
        self.smallest = smallest
        A_log, dt_bias = initial_decay(heads, smallest)
        self.A_log = nn.Parameter(A_log)
        self.dt_bias = nn.Parameter(dt_bias)

    def forward(self) -> torch.Tensor:
        """Return copies of A_log and dt_bias, [2, H]: what shards or offloads a module frees its own at the end."""
        return torch.stack((self.A_log, self.dt_bias))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        return super()._apply(full_precision(fn), recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        widen(state_dict, f"{prefix}A_log", f"{prefix}dt_bias")
        super()._load_from_state_dict(state_dict, prefix, *args)


def initial_decay(heads: int, smallest: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw (A_log, dt_bias), float32 [H]: A uniform in (smallest, 16), softplus(dt_bias) log-uniform in [1e-3, 0.1]."""
    A = torch.empty(heads, dtype=torch.float32).uniform_(smallest, 16).clamp_(min=1e-4)
    dt = torch.empty(heads, dtype=torch.float32).uniform_(math.log(1e-3), math.log(0.1)).exp()
    return A.log(), dt + torch.log(-torch.expm1(-dt))


def full_precision(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return `fn` for tensors that 16-bit types cannot represent well enough: of a cast to one, only the device."""

    def keep(x: torch.Tensor) -> torch.Tensor:
        y = fn(x)
        return x.to(y.device) if y.dtype in HALF else y

    return keep


def widen(state_dict: dict[str, Any], *names: str) -> None:
    """Cast 16-bit entries of a state to float32, which `load_state_dict(assign=True)` would put into a module."""
    for name in names:
        if name in state_dict and state_dict[name].dtype in HALF:
            state_dict[name] = state_dict[name].float()


def rename_decay(state_dict: dict[str, Any], prefix: str) -> None:
    """Give A_log and dt_bias, which files have in the mixer of this prefix itself, the names of its `decay_bias`."""
    for name in ("A_log", "dt_bias"):
        if prefix + name in state_dict:
            state_dict[f"{prefix}decay_bias.{name}"] = state_dict.pop(prefix + name)
