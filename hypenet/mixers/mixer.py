"""The base of all token mixers: projections to heads, norms per head, rotary embedding, weights from a teacher.

B batch, T tokens, C hidden size, H heads, HK key-value heads, D head dimension.
"""

from collections.abc import Callable
from typing import Self, cast

import torch
from torch import nn

from hypenet.configuration_hypenet import HypeNetConfig
from hypenet.context import MixerContext
from hypenet.mixers.decay import HALF
from hypenet_kernels import add_rms_norm, rms_norm_gated, rms_norm_rope

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("q_norm", "k_norm")
GATE_INITS = ("open", "random")


class HypeNetRMSNorm(nn.Module):
    """Computes x / sqrt(mean(x^2) + eps) * weight over the last dimension, accumulated in float32 or float64."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x [..., size]; the result has its shape and dtype, on CUDA under autocast float32."""
        return rms_norm_rope(autocast_input(x), self.weight, eps=self.eps)

    def extra_repr(self) -> str:
        """Return what `print(module)` shows between the parentheses."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class HypeNetRotaryRMSNorm(HypeNetRMSNorm):
    """The norm of each head of q or k, and its rotary embedding."""

    def forward(self, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """Normalise x [B, T, H, size], and rotate it by angles = (cos, sin), each [B or 1, T, size]."""
        cos, sin = (None, None) if angles is None else angles
        return rms_norm_rope(x, self.weight, cos, sin, self.eps)


class HypeNetGatedRMSNorm(HypeNetRMSNorm):
    """The norm of a recurrence's output, times its gate.

    Args:
        size: Elements that are normalised together.
        eps: Added to the mean square.
        activation: Of the gate, "silu" or "sigmoid".
    """

    def __init__(self, size: int, eps: float, activation: str) -> None:
        super().__init__(size, eps)
        self.activation = activation

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        """Normalise x [..., size] and multiply it by the activation of gate, of x's shape; None: no gate."""
        if gate is None:
            return rms_norm_rope(x, self.weight, eps=self.eps)
        return rms_norm_gated(x, gate, self.weight, eps=self.eps, activation=self.activation)


class HypeNetResidualRMSNorm(HypeNetRMSNorm):
    """The norm of a residual stream after the output of a layer's part has been added to it."""

    def forward(  # type: ignore[override]  # a module is called by one that knows its arguments
        self, x: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (x + residual, the normalised sum), [..., size], in the dtypes that the two steps apart would have."""
        residual = residual.to(torch.promote_types(x.dtype, residual.dtype))
        if autocast_input(residual) is not residual:
            total = x + residual
            return total, super().forward(total)
        return add_rms_norm(x, residual, self.weight, self.eps)


class Mixer(nn.Module):
    """Base of the mixers: projections to heads, norms per head, rotary embedding, weights from a teacher.

    Args:
        config: The model's configuration.
        layer_idx: Index of the layer, which selects the layer of a cache.
        use_qk_norm: Whether q and k are normalised, head by head.
        use_rope: Whether q and k are rotated.

    Attributes:
        mixer_type: The name of this kind in `HypeNetConfig.mixer_types`.
    """

    mixer_type: str

    def __init__(
        self,
        config: HypeNetConfig,
        layer_idx: int,
        *,
        use_qk_norm: bool,
        use_rope: bool,
    ) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads, self.num_kv_heads, self.head_dim = config.head_sizes(self.mixer_type)
        head_dim = self.head_dim
        self.use_rope = use_rope
        width, kv_width = self.num_heads * head_dim, self.num_kv_heads * head_dim
        bias = bool(config.attention_qkv_bias)
        self.q_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=bool(config.attention_o_bias))
        self.q_norm = HypeNetRotaryRMSNorm(head_dim, config.rms_norm_eps) if use_qk_norm else None
        self.k_norm = HypeNetRotaryRMSNorm(head_dim, config.rms_norm_eps) if use_qk_norm else None

    def qkv(self, x_BTC: torch.Tensor, context: MixerContext) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return q [B, T, H, D] and k, v [B, T, HK, D] of one dtype, after activation, norms and rotation."""
        q, k, v = (proj(x_BTC).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = self.activate(q), self.activate(k), self.activate(v)
        angles = context.position_embeddings if self.use_rope else None
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q, angles), self.k_norm(k, angles)
        elif angles is not None:
            q, k = rms_norm_rope(q, None, *angles), rms_norm_rope(k, None, *angles)
        return q.to(v.dtype), k.to(v.dtype), v

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the activation of q, k and v; none by default."""
        return x

    def unshare(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Repeat key and value heads [B, T, HK, D] to one per query head, [B, T, H, D]."""
        group = self.num_heads // self.num_kv_heads
        return (k, v) if group == 1 else (k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2))

    @classmethod
    def from_attention(
        cls, attention: nn.Module, config: HypeNetConfig, layer_idx: int, gate_init: str = "open"
    ) -> Self:
        """Build a mixer with the weights of a teacher's attention layer, in its dtype, on its device.

        Args:
            attention: A layer with the projections, and the norms of q and k where it has them, under the names of
                transformers' Llama and Qwen3. Its key and value heads are repeated where this mixer has more of them.
                Norms that it lacks start at 1.
            config: The HypeNet's configuration.
            layer_idx: Index of the layer in the HypeNet.
            gate_init: Initialisation of the output gate of a softmax layer, which the teacher lacks: "open" for a gate
                that has no effect at the start, or "random" as published, N(0, initializer_range^2). The gates of
                recurrent layers have PyTorch's default in both cases: opened, they start farther from the teacher.

        Raises:
            ValueError: If `gate_init` is neither, or the layer's projections and biases are not those of the mixer.
        """
        if gate_init not in GATE_INITS:
            raise ValueError(f"from_attention: gate_init must be one of {GATE_INITS}, got {gate_init!r}")
        weight = attention.get_parameter("q_proj.weight")
        with torch.device(weight.device):
            mixer = cast(Callable[[HypeNetConfig, int], Self], cls)(config, layer_idx).to(weight.dtype)
        mixer.copy_projections(attention)
        mixer.init_gate(gate_init)
        return mixer

    def init_gate(self, gate_init: str) -> None:
        """Initialise the output gate for the start of a conversion, as `from_attention` describes."""

    def copy_projections(self, attention: nn.Module) -> None:
        """Copy projections and norms of an attention layer, repeating key and value heads to this mixer's number."""
        source, own = attention.state_dict(), self.state_dict(keep_vars=True)
        given, needed = ({name for name in names if name.split(".")[0] in PROJECTIONS} for names in (source, own))
        if given != needed:
            raise ValueError(
                f"from_attention: attention must have exactly the projections that {type(self).__name__} has, "
                f"missing {sorted(needed - given)}, unknown {sorted(given - needed)}"
            )
        with torch.no_grad():
            for name, target in own.items():
                if name not in source or name.split(".")[0] not in (*PROJECTIONS, *NORMS):
                    continue
                weight = source[name]
                if name.startswith(("k_proj.", "v_proj.")):
                    heads = weight.unflatten(0, (-1, self.head_dim))
                    weight = heads.repeat_interleave(self.num_kv_heads // heads.shape[0], dim=0).flatten(0, 1)
                target.copy_(weight)


def autocast_input(x: torch.Tensor) -> torch.Tensor:
    """Return x in the dtype that autocast makes of a norm's input: on CUDA float32, on the CPU its own."""
    wide = x.is_cuda and torch.is_autocast_enabled("cuda") and x.dtype in HALF
    return x.float() if wide else x


def cast_once(x: torch.Tensor) -> torch.Tensor:
    """Return the input of several linear layers in the dtype to which autocast would cast it for each of them.

    With gradients it stays as it is, since those of the layers are summed in its dtype.
    """
    device = x.device.type
    if torch.is_grad_enabled() or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))
