"""The configuration of a HypeNet: a Llama-style decoder with layers of softmax attention or a linear recurrence."""

import math
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME

SOFTMAX = "attn"
LIGHTNING = "lightning-attn"
GDN = "gdn"
MAMBA2 = "mamba2"
MIXER_ALIASES = {"lightning": LIGHTNING, "lightning_attn": LIGHTNING}
LAYER_TYPES = {SOFTMAX: "full_attention", **dict.fromkeys((LIGHTNING, GDN, MAMBA2), "linear_attention")}
DEFAULT_HYPE_BASE = 362.0
LIGHTNING_SCALES = ("1/sqrt(d)", "1/d", "1")
# Where a program that has not imported hypenet finds the classes, once it trusts a model's folder.
LOADER = Path(__file__).with_name("load_hypenet.py")
AUTO_MAP = {
    "AutoConfig": "load_hypenet.HypeNetConfig",
    "AutoModel": "load_hypenet.HypeNetModel",
    "AutoModelForCausalLM": "load_hypenet.HypeNetForCausalLM",
    "AutoModelForQuestionAnswering": "load_hypenet.HypeNetForQuestionAnswering",
    "AutoModelForSequenceClassification": "load_hypenet.HypeNetForSequenceClassification",
    "AutoModelForTokenClassification": "load_hypenet.HypeNetForTokenClassification",
}
RECURRENT_HEADS = ("lightning_nh", "lightning_nkv", "gdn_nh", "gdn_nkv", "mamba2_nh", "mamba2_nkv")
# The largest value of each size. Work that is proportional to one, such as a list of layers, starts after the check.
MAX_SIZES = {
    "num_hidden_layers": 2**13,
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim", "lightning_head_dim"), 2**16),
    **dict.fromkeys(RECURRENT_HEADS, 2**16),
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"), 2**31 - 1),
}
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "lightning_head_dim", *RECURRENT_HEADS)


class HypeNetConfig(PreTrainedConfig):
    r"""The configuration of a HypeNet: the fields of `Qwen3Config`, and those that make the model a hybrid.

    Field names are those of the published HypeNet checkpoints where these have the field. Fields of theirs that no
    layer here reads, such as `kda_*` and `mamba2_n_groups`, are kept and have no effect.

    Args:
        max_position_embeddings (`int`, defaults to 1048576): As in `Qwen3Config`; the model itself has no limit.
        rope_parameters (`dict`, *optional*): Rotary embedding, for the layers that use it; theta defaults to 1,000,000.
        attention_bias (`bool`, defaults to `False`):
            Biases in all projections of softmax and Lightning layers, including the output gates of the latter.
        attention_qkv_bias (`bool`, *optional*):
            Biases in the query, key and value projections of all layers; default `attention_bias`.
        attention_o_bias (`bool`, *optional*): Biases in the output projections of all layers; default `attention_bias`.
        attention_dropout (`float`, defaults to 0): Must be 0; the kernels have no dropout.
        mlp_bias (`bool`, defaults to `False`): Biases in the projections of the MLPs.
        mixer_types (`list[str]`, *optional*):
            One of "attn", "lightning-attn" (or "lightning"), "gdn" and "mamba2" for each layer. An empty list means
            all softmax attention. If not given, it follows from `layer_types`; if that is not given either, every
            fourth layer (0, 4, ...) is softmax attention and the others are Lightning.
        layer_types (`list[str]`, *optional*):
            The same in transformers' terms, "full_attention" and "linear_attention"; follows from `mixer_types`.
        attn_use_qk_norm (`bool`, defaults to `True`): Apply RMSNorm to each head of q and k in softmax layers.
        attn_use_rope (`bool`, defaults to `False`): Use rotary embedding in softmax layers, as Qwen3 does.
        attn_use_output_gate (`bool`, defaults to `True`): Use a sigmoid output gate in softmax layers.
        attn_logits_scaling (`str` or `float`, *optional*):
            None: no scale. A number c: attention logits are multiplied by c. "hype a": the query at position t is
            multiplied by ln(t + a) / ln(a), with `a` chosen after training.
        lightning_nh (`int`, *optional*): Query heads of Lightning layers; default `num_attention_heads`.
        lightning_nkv (`int`, *optional*): Key-value heads of Lightning layers; default `num_attention_heads`.
        lightning_head_dim (`int`, *optional*): Head dimension of Lightning layers; default `head_dim`.
        lightning_use_qk_norm (`bool`, defaults to `True`): Apply RMSNorm to each head of q and k.
        lightning_use_rope (`bool`, defaults to `True`): Apply rotary embedding to q and k.
        lightning_use_output_norm (`bool`, defaults to `True`): Apply RMSNorm to the output, over all heads together.
        lightning_use_output_gate (`bool`, defaults to `True`): Use a sigmoid output gate.
        lightning_use_short_conv (`bool`, defaults to `False`): Must be False; no published model has a convolution.
        lightning_scale (`str`, defaults to "1/sqrt(d)"): Scale of the output: "1/sqrt(d)", "1/d" or "1".
        gdn_nh (`int`, *optional*): Query heads of gated DeltaNet layers; default `num_attention_heads`.
        gdn_nkv (`int`, *optional*): Key-value heads of gated DeltaNet layers; default `num_attention_heads`.
        gdn_use_qk_norm (`bool`, defaults to `True`): Apply RMSNorm to each head of q and k, before the L2 norm.
        gdn_use_rope (`bool`, defaults to `True`): Apply rotary embedding to q and k.
        gdn_use_gate (`bool`, defaults to `True`): Use a SiLU output gate.
        gdn_use_short_conv (`bool`, defaults to `False`): Must be False; no published model has a convolution.
        gdn_expand_v (`float`, defaults to 1.0): Value dimension as a multiple of the key dimension; only 1 is built.
        gdn_activation (`str`, *optional*): "silu" applies SiLU to q, k and v; None applies nothing.
        mamba2_nh (`int`, *optional*): Query heads (of C) of Mamba2 layers; default `num_attention_heads`.
        mamba2_nkv (`int`, *optional*): Key-value heads (of B and x) of Mamba2 layers; default `num_attention_heads`.
        mamba2_use_qk_norm (`bool`, defaults to `True`): Apply RMSNorm to each head of q and k.
        mamba2_use_rope (`bool`, defaults to `True`):
            Apply rotary embedding to q and k, as in the other recurrent layers: a teacher's q and k expect it, and
            HyPE leaves positions to the recurrent layers.
        mamba2_use_gate (`bool`, defaults to `True`): Use a SiLU output gate.

    Attributes:
        auto_map: What transformers needs to find these classes in a program that has not imported hypenet. It is in
            every saved configuration, with the file that it names.

    Raises:
        ValueError: If a field is out of range, or if fields contradict each other.

    Example:
        >>> from hypenet import HypeNetConfig
        >>> config = HypeNetConfig(num_hidden_layers=4, mixer_types=["attn", "lightning", "lightning", "gdn"])
        >>> config.softmax_layers, config.recurrent_layers
        ([0], [1, 2, 3])
        >>> HypeNetConfig(attn_logits_scaling="hype 500").logit_scale_base
        500.0
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
    attention_qkv_bias: bool | None = None
    attention_o_bias: bool | None = None
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    mixer_types: list[str] | None = None
    layer_types: list[str] | None = None

    attn_use_qk_norm: bool = True
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

    mamba2_nh: int | None = None
    mamba2_nkv: int | None = None
    mamba2_use_qk_norm: bool = True
    mamba2_use_rope: bool = True
    mamba2_use_gate: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_sizes()
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        for field in ("attention_qkv_bias", "attention_o_bias"):
            if getattr(self, field) is None:
                setattr(self, field, self.attention_bias)
        for field in ("num_key_value_heads", *RECURRENT_HEADS):
            if getattr(self, field) is None:
                setattr(self, field, self.num_attention_heads)
        if self.lightning_head_dim is None:
            self.lightning_head_dim = self.head_dim
        self.set_mixer_types(self._resolve_mixer_types())
        self._check()
        if kwargs.get("attn_sqrtd"):
            warnings.warn(
                "HypeNetConfig: attn_sqrtd is taken to mean the scale 1/sqrt(head_dim) of softmax layers, which they "
                "always have",
                stacklevel=2,
            )
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)  # not that of a file, which may name code that is in its folder only

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: every saved configuration says where the classes are, and needs no copy of their code."""

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        """Write the configuration and, beside a config.json, the file that `auto_map` names."""
        super().to_json_file(json_file_path, use_diff)
        if Path(json_file_path).name == CONFIG_NAME:
            shutil.copyfile(LOADER, Path(json_file_path).with_name(LOADER.name))

    def set_mixer_types(self, mixer_types: list[str]) -> None:
        """Set `mixer_types`, and `layer_types` accordingly."""
        self.mixer_types = [MIXER_ALIASES.get(mixer, mixer) for mixer in mixer_types]
        self.layer_types = [LAYER_TYPES[mixer] for mixer in self.mixer_types]

    @property
    def mixers(self) -> list[str]:
        """The kind of every layer: `mixer_types`, which is never None once the configuration is built."""
        return cast(list[str], self.mixer_types)

    @property
    def softmax_layers(self) -> list[int]:
        """Indices of the softmax attention layers."""
        return [i for i, mixer in enumerate(self.mixers) if mixer == SOFTMAX]

    @property
    def recurrent_layers(self) -> list[int]:
        """Indices of the recurrent layers."""
        return [i for i, mixer in enumerate(self.mixers) if mixer != SOFTMAX]

    @property
    def logit_scale_base(self) -> float | None:
        """The `a` of the HyPE scale s_t = ln(t + a) / ln(a); None if the softmax layers have no such scale."""
        return parse_logits_scaling(self.attn_logits_scaling)[0]

    @property
    def logit_scale_constant(self) -> float:
        """The constant factor of the attention logits: `attn_logits_scaling` if that is a number, else 1."""
        return parse_logits_scaling(self.attn_logits_scaling)[1]

    def head_sizes(self, mixer: str) -> tuple[int, int, int]:
        """Return (query heads, key-value heads, head dimension) of the layers of kind `mixer`."""
        sizes = {
            SOFTMAX: (self.num_attention_heads, self.num_key_value_heads, self.head_dim),
            LIGHTNING: (self.lightning_nh, self.lightning_nkv, self.lightning_head_dim),
            GDN: (self.gdn_nh, self.gdn_nkv, self.head_dim),
            MAMBA2: (self.mamba2_nh, self.mamba2_nkv, self.head_dim),
        }
        return cast(tuple[int, int, int], sizes[mixer])

    def cache_bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Return the bytes that one token adds to the cache of a sequence: keys and values of all softmax layers.

        Args:
            dtype: Data type of keys and values.
        """
        _, kv_heads, head_dim = self.head_sizes(SOFTMAX)
        return len(self.softmax_layers) * 2 * kv_heads * head_dim * dtype.itemsize

    def state_bytes(self) -> int:
        """Return the bytes of one sequence's recurrent states, in float32; they do not depend on its length."""
        lightning_heads, _, lightning_dim = self.head_sizes(LIGHTNING)
        gdn_heads, _, gdn_dim = self.head_sizes(GDN)
        mamba2_heads, _, mamba2_dim = self.head_sizes(MAMBA2)
        sizes = {
            SOFTMAX: 0,
            LIGHTNING: lightning_heads * lightning_dim**2,
            GDN: gdn_heads * gdn_dim * int(gdn_dim * self.gdn_expand_v),
            MAMBA2: mamba2_heads * mamba2_dim**2,
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

    def _check_sizes(self) -> None:
        for name, largest in MAX_SIZES.items():
            value = getattr(self, name)
            if value is None and name in OPTIONAL_SIZES:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
                raise ValueError(f"HypeNetConfig: {name} must be an integer from 1 to {largest}, got {value!r}")

    def _check(self) -> None:
        parse_logits_scaling(self.attn_logits_scaling)
        if self.attention_dropout:
            raise ValueError(
                f"HypeNetConfig: attention_dropout must be 0 (no kernel has dropout), got {self.attention_dropout}"
            )
        if self.lightning_use_short_conv or self.gdn_use_short_conv:
            raise ValueError(
                "HypeNetConfig: *_use_short_conv must be False (no published model has a convolution), got True"
            )
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
            ("mamba2_nh", "mamba2_nkv"),
        ):
            if getattr(self, heads) % getattr(self, kv_heads):
                raise ValueError(
                    f"HypeNetConfig: {heads} must be a multiple of {kv_heads}, "
                    f"got {getattr(self, heads)} and {getattr(self, kv_heads)}"
                )


class HybridConfig(HypeNetConfig):
    """The name that the first published checkpoints have for `HypeNetConfig`, with model_type "hybrid"."""

    model_type = "hybrid"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """Build the `HypeNetConfig` with the fields of a configuration of this name."""
        fields = config_dict | {"model_type": HypeNetConfig.model_type}
        return cast(Self, HypeNetConfig.from_dict(fields, **kwargs))


def hype_logits_scaling(base: float | None) -> str | None:
    """Return the `attn_logits_scaling` entry for a HyPE base, with all digits, so that it parses to the same number."""
    return None if base is None else f"hype {repr(float(base)).removesuffix('.0')}"


def parse_logits_scaling(value: str | float | None) -> tuple[float | None, float]:
    """Parse an `attn_logits_scaling` entry.

    Args:
        value: None, a constant factor, "hype a" with a base a > 1, or "hype" for the published code's default base;
            all finite.

    Returns:
        (base of the HyPE scale or None, constant factor).

    Raises:
        ValueError: If it is none of these.
    """
    if value is None:
        return None, 1.0
    try:
        if not isinstance(value, str):
            constant = float(value)
            if isinstance(value, bool) or not math.isfinite(constant):
                raise ValueError
            return None, constant
        words = value.split()
        if len(words) not in (1, 2) or words[0].lower() != "hype":
            raise ValueError
        base = float(words[1]) if len(words) == 2 else DEFAULT_HYPE_BASE
        if not 1.0 < base < math.inf:
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(
            f"HypeNetConfig: attn_logits_scaling must be None, a finite number or 'hype <a>' with a > 1, got {value!r}"
        ) from None
    return base, 1.0
