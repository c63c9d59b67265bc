"""The configuration of a HypeNet: a Qwen3 decoder whose layers are softmax attention or a linear recurrence."""

from typing import Any, ClassVar, cast

import torch
from transformers import PreTrainedConfig

SOFTMAX = "attn"
LIGHTNING = "lightning-attn"
GDN = "gdn"
MIXER_ALIASES = {"lightning": LIGHTNING}
LAYER_TYPES = {SOFTMAX: "full_attention", LIGHTNING: "linear_attention", GDN: "linear_attention"}
DEFAULT_HYPE_BASE = 362.0
LIGHTNING_SCALES = ("1/sqrt(d)", "1/d", "1")


class HypeNetConfig(PreTrainedConfig):
    r"""The fields of `Qwen3Config`, and what makes the model a hybrid. Field names are those of the published HypeNet
    checkpoints where they have one.

    Args:
        mixer_types (`list[str]`, *optional*):
            One of "attn", "lightning-attn" (or "lightning") and "gdn" for each layer. An empty list means all softmax
            attention. Derived from `layer_types` if not given; if that is not given either, every fourth layer
            (0, 4, ...) is softmax attention and the rest are Lightning.
        layer_types (`list[str]`, *optional*):
            The same in the vocabulary of transformers, "full_attention" and "linear_attention"; derived from
            `mixer_types`.
        attn_use_rope (`bool`, defaults to `False`): Rotary embedding in the softmax layers (a teacher's form).
        attn_use_output_gate (`bool`, defaults to `True`): Sigmoid output gate in the softmax layers.
        attn_logits_scaling (`str` or `float`, *optional*):
            None: no scale. A number c: attention logits are multiplied by c. "hype a": the query at position t is
            multiplied by ln(t + a) / ln(a). It is chosen after training.
        lightning_nh, lightning_nkv, lightning_head_dim (`int`, *optional*):
            Heads of the Lightning layers; default `num_attention_heads` (also for keys and values) and `head_dim`.
        lightning_scale (`str`, defaults to "1/sqrt(d)"): Scale of the read-out: "1/sqrt(d)", "1/d" or "1".
        gdn_nh, gdn_nkv (`int`, *optional*): Heads of the gated DeltaNet layers; default `num_attention_heads`.
        gdn_activation (`str`, *optional*): "silu" puts one on q, k and v.
    """

    model_type = "hypenet"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    default_theta = 1_000_000.0

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 8
    head_dim: int | None = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 1048576
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = True
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    mixer_types: list[str] | None = None
    layer_types: list[str] | None = None

    attn_use_rope: bool = False
    attn_use_output_gate: bool = True
    attn_logits_scaling: str | float | None = None

    lightning_nh: int | None = None
    lightning_nkv: int | None = None
    lightning_head_dim: int | None = None
    lightning_use_qk_norm: bool = True
    lightning_use_rope: bool = True
    lightning_use_output_norm: bool = True
    lightning_use_output_gate: bool = True
    lightning_use_short_conv: bool = False
    lightning_scale: str = "1/sqrt(d)"

    gdn_nh: int | None = None
    gdn_nkv: int | None = None
    gdn_use_qk_norm: bool = True
    gdn_use_rope: bool = True
    gdn_use_gate: bool = True
    gdn_use_short_conv: bool = False
    gdn_expand_v: float = 1.0
    gdn_activation: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        for field in ("num_key_value_heads", "lightning_nh", "lightning_nkv", "gdn_nh", "gdn_nkv"):
            if getattr(self, field) is None:
                setattr(self, field, self.num_attention_heads)
        if self.lightning_head_dim is None:
            self.lightning_head_dim = self.head_dim
        self.set_mixer_types(self._resolve_mixer_types())
        self._check()
        super().__post_init__(**kwargs)

    def set_mixer_types(self, mixer_types: list[str]) -> None:
        """Sets `mixer_types`, and `layer_types` to what follows from them."""
        self.mixer_types = [MIXER_ALIASES.get(mixer, mixer) for mixer in mixer_types]
        self.layer_types = [LAYER_TYPES[mixer] for mixer in self.mixer_types]

    @property
    def mixers(self) -> list[str]:
        """The kind of every layer: `mixer_types`, which is a list once the configuration is made."""
        return cast(list[str], self.mixer_types)

    @property
    def softmax_layers(self) -> list[int]:
        """Indices of the layers that are softmax attention."""
        return [i for i, mixer in enumerate(self.mixers) if mixer == SOFTMAX]

    @property
    def recurrent_layers(self) -> list[int]:
        """Indices of the layers that are a linear recurrence."""
        return [i for i, mixer in enumerate(self.mixers) if mixer != SOFTMAX]

    @property
    def logit_scale_base(self) -> float | None:
        """The `a` of the HyPE scale s_t = ln(t + a) / ln(a); None if the softmax layers have no such scale."""
        return parse_logits_scaling(self.attn_logits_scaling)[0]

    @property
    def logit_scale_constant(self) -> float:
        """The constant that multiplies the attention logits, 1 unless `attn_logits_scaling` is a number."""
        return parse_logits_scaling(self.attn_logits_scaling)[1]

    def head_sizes(self, mixer: str) -> tuple[int, int, int]:
        """Return (query heads, key-value heads, head dimension) of the layers of kind `mixer`."""
        sizes = {
            SOFTMAX: (self.num_attention_heads, self.num_key_value_heads, self.head_dim),
            LIGHTNING: (self.lightning_nh, self.lightning_nkv, self.lightning_head_dim),
            GDN: (self.gdn_nh, self.gdn_nkv, self.head_dim),
        }
        return cast(tuple[int, int, int], sizes[mixer])

    def cache_bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes by which the cache of one sequence grows for each token: keys and values of the softmax layers."""
        _, kv_heads, head_dim = self.head_sizes(SOFTMAX)
        return len(self.softmax_layers) * 2 * kv_heads * head_dim * dtype.itemsize

    def state_bytes(self) -> int:
        """Bytes of the recurrent states of one sequence, in float32, whatever its length."""
        lightning_heads, _, lightning_dim = self.head_sizes(LIGHTNING)
        gdn_heads, _, gdn_dim = self.head_sizes(GDN)
        sizes = {
            SOFTMAX: 0,
            LIGHTNING: lightning_heads * lightning_dim**2,
            GDN: gdn_heads * gdn_dim * int(gdn_dim * self.gdn_expand_v),
        }
        return torch.float32.itemsize * sum(sizes[mixer] for mixer in self.mixers)

    def _resolve_mixer_types(self) -> list[str]:
        if self.mixer_types is not None:
            mixers = [MIXER_ALIASES.get(mixer, mixer) for mixer in self.mixer_types]
            mixers = mixers or [SOFTMAX] * self.num_hidden_layers
        elif self.layer_types is not None:
            kinds = {"full_attention": SOFTMAX, "linear_attention": LIGHTNING}
            mixers = [kinds.get(layer, layer) for layer in self.layer_types]
        else:
            mixers = [SOFTMAX if i % 4 == 0 else LIGHTNING for i in range(self.num_hidden_layers)]
        for i, mixer in enumerate(mixers):
            if mixer not in LAYER_TYPES:
                names = ", ".join([*LAYER_TYPES, *MIXER_ALIASES])
                raise ValueError(f"HypeNetConfig: mixer_types must hold only {names}, got {mixer!r} for layer {i}")
        if len(mixers) != self.num_hidden_layers:
            raise ValueError(
                f"HypeNetConfig: mixer_types must name {self.num_hidden_layers} layers (num_hidden_layers), "
                f"got {len(mixers)}"
            )
        derived = [LAYER_TYPES[mixer] for mixer in mixers]
        if self.layer_types is not None and list(self.layer_types) != derived:
            raise ValueError(
                f"HypeNetConfig: layer_types must agree with mixer_types, got {self.layer_types} with {mixers}"
            )
        return mixers

    def _check(self) -> None:
        parse_logits_scaling(self.attn_logits_scaling)
        if self.attention_dropout:
            raise ValueError(
                f"HypeNetConfig: attention_dropout must be 0, the kernels have none, got {self.attention_dropout}"
            )
        if self.lightning_use_short_conv or self.gdn_use_short_conv:
            raise ValueError("HypeNetConfig: *_use_short_conv must be False, got True; no published model has one")
        if self.lightning_scale not in LIGHTNING_SCALES:
            raise ValueError(
                f"HypeNetConfig: lightning_scale must be one of {LIGHTNING_SCALES}, got {self.lightning_scale!r}"
            )
        if self.gdn_activation not in (None, "silu"):
            raise ValueError(f"HypeNetConfig: gdn_activation must be None or 'silu', got {self.gdn_activation!r}")
        if self.lightning_use_rope and self.lightning_head_dim != self.head_dim:
            raise ValueError(
                f"HypeNetConfig: lightning_head_dim must equal head_dim ({self.head_dim}) with rotary embedding, "
                f"got {self.lightning_head_dim}"
            )
        for heads, kv_heads in (
            ("num_attention_heads", "num_key_value_heads"),
            ("lightning_nh", "lightning_nkv"),
            ("gdn_nh", "gdn_nkv"),
        ):
            if getattr(self, heads) % getattr(self, kv_heads):
                raise ValueError(
                    f"HypeNetConfig: {heads} must be a multiple of {kv_heads}, "
                    f"got {getattr(self, heads)} and {getattr(self, kv_heads)}"
                )


def hype_logits_scaling(base: float | None) -> str | None:
    """Return the `attn_logits_scaling` entry for a HyPE base, with all digits, so that it parses to the same number."""
    return None if base is None else f"hype {repr(float(base)).removesuffix('.0')}"


def parse_logits_scaling(value: str | float | None) -> tuple[float | None, float]:
    """(base of the HyPE scale or None, constant factor) that an `attn_logits_scaling` entry stands for.

    "hype a" names the base a > 1; "hype" alone means the published code's default base.
    """
    if value is None:
        return None, 1.0
    if not isinstance(value, str):
        return None, float(value)
    words = value.split()
    try:
        if len(words) not in (1, 2) or words[0].lower() != "hype":
            raise ValueError
        base = float(words[1]) if len(words) == 2 else DEFAULT_HYPE_BASE
        if not base > 1.0:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"HypeNetConfig: attn_logits_scaling must be None, a number or 'hype <a>' with a > 1, got {value!r}"
        ) from None
    return base, 1.0
