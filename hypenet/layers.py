"""The mixers as layers for networks of one's own: hidden states and a cache in, hidden states and the cache out.

Each is one of hypenet.mixers with a configuration from plain sizes, its rotary embedding and a cache of one layer.
B batch, T tokens, C hidden size.
"""

from typing import Any, ClassVar

import torch
from torch import nn

from hypenet.cache import HypeNetCache
from hypenet.configuration_hypenet import GDN, LIGHTNING, MAMBA2, SOFTMAX, HypeNetConfig, hype_logits_scaling
from hypenet.mixers import MIXERS
from hypenet.modeling_hypenet import rotary_embedding
from hypenet.plan import ForwardPlan


class MixerLayer(nn.Module):
    """Base of the layers: sizes and options of the mixer, positions, the cache, and how a call runs.

    Args:
        hidden_size: C.
        num_heads: Query heads.
        num_kv_heads: Key and value heads, which divide the query heads; default `num_heads`.
        head_dim: Size of a head; default `hidden_size / num_heads`.
        use_qk_norm: Whether each head of q and k has an RMSNorm; default: see the layer.
        use_rope: Whether q and k have rotary embedding; default: see the layer.
        use_gate: Whether the output has a gate.
        rope_theta: Base of the rotary embedding.
        rms_norm_eps: Added to the mean square by the norms.
        fields: Other fields of `HypeNetConfig`.

    Attributes:
        mixer_type: Kind of the mixer, as in `HypeNetConfig.mixer_types`.
        options: The fields of `HypeNetConfig` for use_qk_norm, use_rope and use_gate.
        defaults: The defaults of use_qk_norm and use_rope.

    Raises:
        ValueError: If the sizes do not fit together.
    """

    mixer_type: ClassVar[str]
    options: ClassVar[tuple[str, str, str]]
    defaults: ClassVar[tuple[bool, bool]]

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        use_qk_norm: bool | None = None,
        use_rope: bool | None = None,
        use_gate: bool = True,
        rope_theta: float = 1e4,
        rms_norm_eps: float = 1e-6,
        **fields: Any,
    ) -> None:
        super().__init__()
        if head_dim is None:
            if hidden_size % num_heads:
                raise ValueError(
                    f"{type(self).__name__}: hidden_size must be a multiple of num_heads without head_dim, "
                    f"got {hidden_size} and {num_heads}"
                )
            head_dim = hidden_size // num_heads
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        sizes: dict[str, Any] = {"num_attention_heads": num_heads, "num_key_value_heads": kv_heads}
        sizes |= {f"{name}_nh": num_heads for name in ("lightning", "gdn", "mamba2")}
        sizes |= {f"{name}_nkv": kv_heads for name in ("lightning", "gdn", "mamba2")}
        wanted = zip((use_qk_norm, use_rope), self.defaults, strict=True)
        given = (default if x is None else x for x, default in wanted)
        sizes |= dict(zip(self.options, (*given, use_gate), strict=True))
        self.config = HypeNetConfig(
            hidden_size=hidden_size,
            num_hidden_layers=1,
            mixer_types=[self.mixer_type],
            head_dim=head_dim,
            rms_norm_eps=rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
            **(sizes | fields),
        )
        self.mixer = MIXERS[self.mixer_type](self.config, 0)
        self.rotary_emb = rotary_embedding(self.config) if self.mixer.use_rope else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        cache: HypeNetCache | None = None,
        *,
        use_cache: bool = False,
        attention_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, HypeNetCache | None]:
        """Mix tokens along T.

        Args:
            hidden_states: [B, T, C].
            cache: What the last call of this layer returned, to continue its sequences; it is updated in place. Such
                a call computes no gradients.
            use_cache: Whether to create a cache if none is given.
            attention_mask: [B, T], 0 where a token is padding, on any side, and 1 at real tokens.
            cu_seqlens: int32 [N + 1] with B = 1, without a cache or a mask: boundaries of N packed sequences.

        Returns:
            [B, T, C], zero at padding, and the cache, or None.

        Raises:
            ValueError: If the shapes or arguments do not fit together.
            TypeError: If `cache` is not one that a layer returned.
        """
        name = type(self).__name__
        if hidden_states.dim() != 3 or hidden_states.shape[2] != self.config.hidden_size:
            wanted = f"[B, T, {self.config.hidden_size}]"
            raise ValueError(f"{name}: hidden_states must have shape {wanted}, got {list(hidden_states.shape)}")
        if cache is not None and not isinstance(cache, HypeNetCache):
            raise TypeError(f"{name}: cache must be a HypeNetCache, got {type(cache).__name__}")
        if cu_seqlens is None:
            cache = HypeNetCache(self.config) if cache is None and use_cache else cache
            plan = ForwardPlan.of_batch(hidden_states, attention_mask, None, cache, cache is not None)
        elif cache is not None or use_cache or attention_mask is not None:
            raise ValueError(f"{name}: cu_seqlens must come without a cache and without attention_mask")
        else:
            plan = ForwardPlan.of_documents(hidden_states, cu_seqlens, None)
        if self.rotary_emb is not None:
            plan.context.position_embeddings = self.rotary_emb(hidden_states, plan.position_ids)
        with torch.set_grad_enabled(torch.is_grad_enabled() and plan.context.past == 0):
            mixed = plan.restore(self.mixer(plan.pack(hidden_states), plan.context))
        plan.finish()
        return mixed, cache


class LightningLayer(MixerLayer):
    """Lightning attention, a linear recurrence with one fixed decay per head, as a layer (`LightningAttention`).

    By default q and k have norms and rotary embedding; the output gate is a sigmoid. Arguments: see `MixerLayer`.

    Example:
        >>> import torch
        >>> from hypenet.layers import LightningLayer
        >>> layer = LightningLayer(hidden_size=64, num_heads=4)
        >>> prompt, token = torch.randn(2, 30, 64), torch.randn(2, 1, 64)
        >>> with torch.no_grad():
        ...     y, cache = layer(prompt, use_cache=True)
        ...     y, cache = layer(token, cache)
        >>> y.shape, cache.get_seq_length()
        (torch.Size([2, 1, 64]), 31)
    """

    mixer_type = LIGHTNING
    options = "lightning_use_qk_norm", "lightning_use_rope", "lightning_use_output_gate"
    defaults = True, True


class GatedDeltaLayer(MixerLayer):
    """Gated DeltaNet, a linear recurrence with the delta rule, as a layer (`GatedDeltaNet`).

    q and k are scaled to unit length; by default they have neither norms before that nor rotary embedding. The output
    gate is SiLU. Other arguments: see `MixerLayer`.

    Args:
        use_silu: Whether q, k and v have SiLU.

    Example:
        >>> import torch
        >>> from hypenet.layers import GatedDeltaLayer
        >>> y, cache = GatedDeltaLayer(hidden_size=64, num_heads=4)(torch.randn(2, 30, 64))
        >>> y.shape, cache
        (torch.Size([2, 30, 64]), None)
    """

    mixer_type = GDN
    options = "gdn_use_qk_norm", "gdn_use_rope", "gdn_use_gate"
    defaults = False, False

    def __init__(self, *sizes: Any, use_silu: bool = True, **options: Any) -> None:
        super().__init__(*sizes, gdn_activation="silu" if use_silu else None, **options)


class Mamba2Layer(MixerLayer):
    """Mamba2 with heads as attention has them, a linear recurrence with a step size and a decay, as a layer (`Mamba2`).

    By default q and k have norms and no rotary embedding; the output gate is SiLU. Arguments: see `MixerLayer`.

    Example:
        >>> import torch
        >>> from hypenet.layers import Mamba2Layer
        >>> Mamba2Layer(hidden_size=64, num_heads=4)(torch.randn(2, 30, 64))[0].shape
        torch.Size([2, 30, 64])
    """

    mixer_type = MAMBA2
    options = "mamba2_use_qk_norm", "mamba2_use_rope", "mamba2_use_gate"
    defaults = True, False


class HypeAttentionLayer(MixerLayer):
    """Softmax attention without positions, with the HyPE scale and an output gate, as a layer (`SoftmaxAttention`).

    By default q and k have norms and no rotary embedding; the output gate is a sigmoid. Other arguments: see
    `MixerLayer`.

    Args:
        logit_scale_base: The a of the scale ln(t + a) / ln(a) of the query at position t, above 1; None for no scale.

    Example:
        >>> import torch
        >>> from hypenet.layers import HypeAttentionLayer
        >>> layer = HypeAttentionLayer(hidden_size=64, num_heads=4, num_kv_heads=2, logit_scale_base=500.0)
        >>> documents = torch.tensor([0, 10, 30], dtype=torch.int32)  # two packed sequences
        >>> layer(torch.randn(1, 30, 64), cu_seqlens=documents)[0].shape
        torch.Size([1, 30, 64])
    """

    mixer_type = SOFTMAX
    options = "attn_use_qk_norm", "attn_use_rope", "attn_use_output_gate"
    defaults = True, False

    def __init__(self, *sizes: Any, logit_scale_base: float | None = None, **options: Any) -> None:
        super().__init__(*sizes, attn_logits_scaling=hype_logits_scaling(logit_scale_base), **options)
