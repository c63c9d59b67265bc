"""The token mixers of a HypeNet: softmax attention without positions, Lightning attention, gated DeltaNet.

Each is called as mixer(x_BTC, context) -> y_BTC and can be built from a teacher's attention layer with
`from_attention`.
B batch, T tokens, C hidden size, H heads, D head dimension, K and V rows and columns of a state.
"""

import math
from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import nn
from torch.nn import functional as F

from hypenet.configuration_hypenet import GDN, LIGHTNING, SOFTMAX, HypeNetConfig
from hypenet.context import MixerContext
from hypenet_kernels import (
    chunk_gated_delta_rule,
    chunk_simple_gla,
    gated_delta_step,
    hype_attention,
    hype_attention_decode,
    simple_gla_step,
)

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("q_norm", "k_norm")
GATE_INITS = ("open", "random")
HALF = (torch.bfloat16, torch.float16)


class HypeNetRMSNorm(nn.Module):
    """Computes x / sqrt(mean(x^2) + eps) * weight over the last dimension, accumulated in float32 or float64."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x [..., size]; the result has its shape and dtype."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)

    def extra_repr(self) -> str:
        """Return what `print(module)` shows between the parentheses."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


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
        self.q_norm = HypeNetRMSNorm(head_dim, config.rms_norm_eps) if use_qk_norm else None
        self.k_norm = HypeNetRMSNorm(head_dim, config.rms_norm_eps) if use_qk_norm else None

    def qkv(self, x_BTC: torch.Tensor, context: MixerContext) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return q [B, T, H, D] and k, v [B, T, HK, D] of one dtype, after activation, norms and rotation."""
        q, k, v = (proj(x_BTC).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = self.activate(q), self.activate(k), self.activate(v)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.use_rope:
            cos, sin = cast(tuple[torch.Tensor, torch.Tensor], context.position_embeddings)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q.to(v.dtype), k.to(v.dtype), v

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the activation of q, k and v; none by default."""
        return x

    def unshare(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Repeat key and value heads [B, T, HK, D] to one per query head, [B, T, H, D]."""
        group = self.num_heads // self.num_kv_heads
        return (k, v) if group == 1 else (k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2))

    def new_tokens_only(self, x: torch.Tensor, context: MixerContext) -> torch.Tensor:
        """Set x [B, T, H, ...] to zero where a decode step has padding, so that padding does not change a state."""
        if context.keep is None:
            return x
        return x * context.keep.view(*context.keep.shape, *[1] * (x.dim() - 2)).to(x.dtype)

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


class SoftmaxAttention(Mixer):
    """Softmax attention without position encoding, with the HyPE scale s_t and an output gate.

        o_t = sigmoid(x_t Wz) * sum_{i <= t} softmax_i(s_t q_t . k_i / sqrt(D)) v_i

    With `attn_use_rope` and without `attn_use_output_gate` it is Qwen3's attention, and without `attn_use_qk_norm` too
    Llama's. Source: arXiv 2601.22156, section 3.

    Args:
        config: The model's configuration.
        layer_idx: Index of the layer.
    """

    mixer_type = SOFTMAX

    def __init__(self, config: HypeNetConfig, layer_idx: int) -> None:
        super().__init__(
            config,
            layer_idx,
            use_qk_norm=config.attn_use_qk_norm,
            use_rope=config.attn_use_rope,
        )
        width = self.num_heads * self.head_dim
        self.o_gate = nn.Linear(config.hidden_size, width, bias=False) if config.attn_use_output_gate else None

    def forward(self, x_BTC: torch.Tensor, context: MixerContext) -> torch.Tensor:
        """Mix x [B, T, C] along T and return [B, T, C]; with a cache, also append to this layer's keys and values."""
        q, k, v = self.qkv(x_BTC, context)
        gate = None if self.o_gate is None else self.o_gate(x_BTC).view_as(q)
        o = self.attend(q, k, v, gate, context)
        return self.o_proj(o.flatten(-2))

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor | None, context: MixerContext
    ) -> torch.Tensor:
        """Attend to the cached and the new tokens, and append k and v to the cache.

        Args:
            q: [B, T, H, D].
            k, v: [B, T, HK, D].
            gate: Output gate before the sigmoid [B, T, H, D], or None.
            context: Packing and cache.

        Returns:
            The output [B, T, H, D].
        """
        options: dict[str, Any] = {
            "scale": self.head_dim**-0.5 * self.config.logit_scale_constant,
            "logit_scale_base": self.config.logit_scale_base,
        }
        if context.cache is None:
            return hype_attention(q, k, v, gate=gate, cu_seqlens=context.cu_seqlens, **options)
        keys, values = context.cache.reserve(self.layer_idx, k, context.longest)
        if context.step:
            lengths = context.cache.lengths
            assert lengths is not None
            return hype_attention_decode(q, keys, values, lengths, k=k, v=v, gate=gate, **options)
        start, stop = context.past, context.past + k.shape[1]
        for buffer, new in ((keys, k.detach()), (values, v.detach())):
            if context.slots is None:
                buffer[:, start:stop] = new
            else:
                buffer[context.slots] = new[0]
        if context.past == 0:
            return hype_attention(q, k, v, gate=gate, cu_seqlens=context.cu_seqlens, **options)
        if context.cu_seqlens is None:
            return hype_attention(q, keys[:, :stop], values[:, :stop], gate=gate, query_offset=start, **options)
        assert context.spans is not None
        o = torch.empty_like(q)
        for b, (first, last, length) in enumerate(context.spans):
            own_keys, own_values = (x[b : b + 1, : length + last - first] for x in (keys, values))
            own_gate = None if gate is None else gate[:, first:last]
            o[:, first:last] = hype_attention(
                q[:, first:last], own_keys, own_values, gate=own_gate, query_offset=length, **options
            )
        return o

    def init_gate(self, gate_init: str) -> None:
        if self.o_gate is None:
            return
        if gate_init == "random":
            nn.init.normal_(self.o_gate.weight, std=self.config.initializer_range)
        else:  # zero weights give sigmoid(0) = 1/2, which the output projection doubles
            nn.init.zeros_(self.o_gate.weight)
            with torch.no_grad():
                self.o_proj.weight.mul_(2)


class LightningAttention(Mixer):
    """Lightning attention: a linear recurrence with one fixed decay per head.

        S_t = gamma_h S_{t-1} + k_t v_t^T ;  o_t = scale S_t^T q_t ;  y_t = (RMSNorm(o_t) * sigmoid(x_t Wz)) Wo

    gamma_h = exp(-slope_h) with the ALiBi slopes, q and k have rotary embedding, and the norm runs over all heads
    together. Source: arXiv 2601.22156, section 3.

    Args:
        config: The model's configuration.
        layer_idx: Index of the layer.

    Attributes:
        log_decay: ln gamma_h, float32 [H] in every precision of the model. It is saved with the weights; a state
            without it, such as that of a published checkpoint, means the ALiBi slopes.
    """

    mixer_type = LIGHTNING
    log_decay: torch.Tensor

    def __init__(self, config: HypeNetConfig, layer_idx: int) -> None:
        super().__init__(
            config,
            layer_idx,
            use_qk_norm=config.lightning_use_qk_norm,
            use_rope=config.lightning_use_rope,
        )
        width = self.num_heads * self.head_dim
        self.scale = {"1/sqrt(d)": self.head_dim**-0.5, "1/d": 1 / self.head_dim, "1": 1.0}[config.lightning_scale]
        self.register_buffer("log_decay", alibi_log_decay(self.num_heads))
        self.o_norm = HypeNetRMSNorm(width, config.rms_norm_eps) if config.lightning_use_output_norm else None
        gated, bias = config.lightning_use_output_gate, config.attention_bias
        self.z_proj = nn.Linear(config.hidden_size, width, bias=bias) if gated else None

    def forward(self, x_BTC: torch.Tensor, context: MixerContext) -> torch.Tensor:
        """Mix x [B, T, C] along T and return [B, T, C]; with a cache, also update this layer's state."""
        q, k, v = self.qkv(x_BTC, context)
        k, v = self.unshare(k, v)
        if context.step:
            g = self.new_tokens_only(self.log_decay.expand(k.shape[:3]), context)
            k = self.new_tokens_only(k, context)
            state = context.state(self.layer_idx)
            assert state is not None
            o = simple_gla_step(q, k, v, g, state, scale=self.scale)
        else:
            o, state = chunk_simple_gla(
                q,
                k,
                v,
                g_gamma=self.log_decay,
                scale=self.scale,
                initial_state=context.state(self.layer_idx),
                output_final_state=context.cache is not None,
                cu_seqlens=context.cu_seqlens,
            )
            context.store_state(self.layer_idx, state)
        y = o.flatten(-2)
        if self.o_norm is not None:
            y = self.o_norm(y)
        if self.z_proj is not None:
            y = y * self.z_proj(x_BTC).sigmoid()
        return self.o_proj(y)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        before = self.log_decay
        super()._apply(fn, recurse)
        if self.log_decay.is_meta:
            return self
        # `to_empty` leaves memory without values: take them from before, or from the definition if there were none.
        values = alibi_log_decay(self.num_heads) if before.is_meta else before
        self.log_decay = full_precision(lambda x: x.to(self.log_decay))(values)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}log_decay" not in state_dict:
            with torch.device(self.log_decay.device):
                state_dict[f"{prefix}log_decay"] = alibi_log_decay(self.num_heads)
        widen(state_dict, f"{prefix}log_decay")
        super()._load_from_state_dict(state_dict, prefix, *args)


class LogDecay(nn.Module):
    """The float32 parameters of a gated delta rule's decay, ln alpha_t = -exp(A_log) softplus(a_t + dt_bias).

    Calling it returns A_log and dt_bias as one tensor [2, H]. They are a module of their own because FSDP2 has one
    policy for all parameters of a unit, and beside bfloat16 weights they need another:
    `fully_shard(mixer.decay_bias, mp_policy=MixedPrecisionPolicy(torch.float32, torch.float32))`.

    Args:
        heads: Number of heads, H.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        A_log, dt_bias = initial_decay(heads)
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


class GatedDeltaNet(Mixer):
    """Gated DeltaNet: a linear recurrence with the delta rule and a decay per head and token.

        S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T ;  o_t = scale S_t^T q_t
        y_t = (RMSNorm(o_t) * silu(x_t Wg)) Wo

    q and k have unit length, beta_t = 2 sigmoid(x_t Wb), ln alpha_t = -exp(A_log) softplus(x_t Wa + dt_bias), and the
    norm runs over each head. Source: arXiv 2412.06464; beta > 1 (negative eigenvalues): arXiv 2411.12537.

    Args:
        config: The model's configuration.
        layer_idx: Index of the layer.

    Raises:
        NotImplementedError: If `config.gdn_expand_v` is not 1.
    """

    mixer_type = GDN

    def __init__(self, config: HypeNetConfig, layer_idx: int) -> None:
        if config.gdn_expand_v != 1:
            raise NotImplementedError(f"GatedDeltaNet: gdn_expand_v must be 1, got {config.gdn_expand_v}")
        super().__init__(
            config,
            layer_idx,
            use_qk_norm=config.gdn_use_qk_norm,
            use_rope=config.gdn_use_rope,
        )
        heads, width = self.num_heads, self.num_heads * self.head_dim
        self.a_proj = nn.Linear(config.hidden_size, heads, bias=False)
        self.b_proj = nn.Linear(config.hidden_size, heads, bias=False)
        self.decay_bias = LogDecay(heads)  # transformers' Trainer decays no weight with "bias" in its name
        self.o_norm = HypeNetRMSNorm(self.head_dim, config.rms_norm_eps)
        self.g_proj = nn.Linear(config.hidden_size, width, bias=False) if config.gdn_use_gate else None

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        """Apply SiLU to x if `gdn_activation` says so."""
        return F.silu(x) if self.config.gdn_activation == "silu" else x

    def forward(self, x_BTC: torch.Tensor, context: MixerContext) -> torch.Tensor:
        """Mix x [B, T, C] along T and return [B, T, C]; with a cache, also update this layer's state."""
        q, k, v = self.qkv(x_BTC, context)
        k, v = self.unshare(k, v)
        a, b = self.a_proj(x_BTC), self.b_proj(x_BTC)
        A_log, dt_bias = self.decay_bias().unbind()
        gates: dict[str, Any] = {
            "use_qk_l2norm_in_kernel": True,
            "use_gate_in_kernel": True,
            "A_log": A_log,
            "dt_bias": dt_bias,
            "use_beta_sigmoid_in_kernel": True,
            "allow_neg_eigval": True,
        }
        state = context.state(self.layer_idx)
        if context.step:
            if context.keep is not None:  # softplus and sigmoid of -inf are 0: no decay and no write for padding
                a, b = (x.masked_fill(~context.keep[..., None], -math.inf) for x in (a, b))
            assert state is not None
            o = gated_delta_step(q, k, v, a, b, state, **gates)
        else:
            o, state = chunk_gated_delta_rule(
                q,
                k,
                v,
                a,
                b,
                initial_state=state,
                output_final_state=context.cache is not None,
                cu_seqlens=context.cu_seqlens,
                **gates,
            )
            context.store_state(self.layer_idx, state)
        o = self.o_norm(o)
        if self.g_proj is not None:
            o = o * F.silu(self.g_proj(x_BTC)).view_as(o)
        return self.o_proj(o.flatten(-2))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("A_log", "dt_bias"):  # the published layout has them in the mixer itself
            if prefix + name in state_dict:
                state_dict[f"{prefix}decay_bias.{name}"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args)


MIXERS: dict[str, type[SoftmaxAttention] | type[LightningAttention] | type[GatedDeltaNet]] = {
    mixer.mixer_type: mixer for mixer in (SoftmaxAttention, LightningAttention, GatedDeltaNet)
}


def alibi_log_decay(heads: int) -> torch.Tensor:
    """Return ln gamma_h = -2^(-8h/H) for h = 1..H, float32 [H], from the ALiBi slopes.

    If H is not a power of two, take the values of the next lower power of two, then every second value of the next
    higher one, as ALiBi does. Source: arXiv 2108.12409; arXiv 2601.22156, section 3.
    """
    power = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    slopes += [2 ** (-8 * h / (2 * power)) for h in range(1, 2 * power + 1, 2)][: heads - power]
    return -torch.tensor(slopes, dtype=torch.float32)


def initial_decay(heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw (A_log, dt_bias), float32 [H]: A uniform in (0, 16), softplus(dt_bias) log-uniform in [1e-3, 0.1]."""
    A = torch.empty(heads, dtype=torch.float32).uniform_(0, 16).clamp_(min=1e-4)
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


def rotate(x_BTHD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary embedding in the half-split layout; cos and sin [B or 1, T, D]."""
    first, second = x_BTHD.chunk(2, dim=-1)
    return x_BTHD * cos[..., None, :] + torch.cat((-second, first), dim=-1) * sin[..., None, :]
