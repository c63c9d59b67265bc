"""Transfer of a pretrained transformer's weights into a HypeNet, the start of a conversion; nothing is trained here.

The teachers are decoders whose modules have the names and the arithmetic of Llama. The families differ in QK-norm and
biases, which is one row of `FAMILIES` each. Source: arXiv 2601.22156, sections 3 and 4.
"""

import copy
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hypenet.configuration_hypenet import MIXER_ALIASES, SOFTMAX, HypeNetConfig, hype_logits_scaling
from hypenet.mixers import MIXERS, Mixer
from hypenet.modeling_hypenet import HypeNetForCausalLM, rotary_embedding
from hypenet_kernels.integrations import register_attention


@dataclass(frozen=True)
class Family:
    """A kind of teacher: what its decoder has beside Llama's weights.

    A bias is given as True, as False, or as the name of the boolean field of the teacher's configuration that decides.
    """

    model_type: str
    qk_norm: bool
    qkv_bias: bool | str
    o_bias: bool | str
    mlp_bias: bool | str


FAMILIES = {
    family.model_type: family
    for family in (
        Family("qwen3", qk_norm=True, qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias=False),
        Family("qwen2", qk_norm=False, qkv_bias=True, o_bias=False, mlp_bias=False),
        Family("llama", qk_norm=False, qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    )
}
# Model types that one may expect to work, by their beginning, and why they do not.
REFUSED = {
    "smollm3": "some of its layers have no position encoding (no_rope_layers)",
    "gemma": "its norms, its embeddings and some of its layers' attention are others",
}
COPIED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
# Tables that only rotate. Those of YaRN and LongRoPE also scale q and k, which layers without RoPE would lose; those of
# dynamic scaling depend on the length.
ROPE_TYPES = ("default", "linear", "llama3")


def config_from_teacher(
    teacher: PreTrainedConfig,
    keep_layers: Iterable[int],
    mixer: str = "lightning",
    logit_scale_base: float | None = None,
    **options: Any,
) -> HypeNetConfig:
    """Build the configuration of a HypeNet that a teacher's weights fit.

    Softmax layers have QK-norm if the teacher has it; recurrent layers always have it.

    Args:
        teacher: The teacher's configuration: of Qwen3, of Qwen2 and Qwen2.5, or of Llama 2, Llama 3 and SmolLM2.
        keep_layers: Indices of the layers that stay softmax attention; all others become `mixer`.
        mixer: "lightning", "gdn" or "mamba2".
        logit_scale_base: The base `a` of the HyPE scale ln(t + a) / ln(a), or None for no scale.
        options: Other fields of `HypeNetConfig`. `attn_use_rope=True, attn_use_output_gate=False` keeps the softmax
            layers exactly as in the teacher.

    Returns:
        The configuration.

    Raises:
        ValueError: If the weights of `teacher` cannot become a HypeNet, or another argument is out of range.

    Warns:
        UserWarning: If the teacher has attention dropout, which is dropped.

    Example:
        >>> from transformers import Qwen3Config
        >>> from hypenet import config_from_teacher
        >>> config = config_from_teacher(Qwen3Config(num_hidden_layers=3), keep_layers=[1], logit_scale_base=500.0)
        >>> config.mixer_types, config.attn_logits_scaling
        (['lightning-attn', 'attn', 'lightning-attn'], 'hype 500')
    """
    family = family_of(teacher)
    keep = set(keep_layers)
    if not keep <= set(range(teacher.num_hidden_layers)):
        raise ValueError(
            f"from_teacher: keep_layers must lie in 0..{teacher.num_hidden_layers - 1}, got {sorted(keep)}"
        )
    if MIXER_ALIASES.get(mixer, mixer) not in MIXERS:
        raise ValueError(f"from_teacher: mixer must be one of {[*MIXER_ALIASES, *MIXERS]}, got {mixer!r}")
    if getattr(teacher, "attention_dropout", 0.0):
        warnings.warn(
            f"from_teacher: the teacher's attention_dropout of {teacher.attention_dropout} is dropped "
            "(no kernel has dropout)",
            stacklevel=2,
        )
    fields = {name: getattr(teacher, name) for name in COPIED_FIELDS}
    fields["head_dim"] = getattr(teacher, "head_dim", None)
    fields["rope_parameters"] = dict(cast(dict[str, Any], teacher.rope_parameters))
    fields["attn_use_qk_norm"] = family.qk_norm
    for field, rule in (
        ("attention_qkv_bias", family.qkv_bias),
        ("attention_o_bias", family.o_bias),
        ("mlp_bias", family.mlp_bias),
    ):
        fields[field] = bool(getattr(teacher, rule)) if isinstance(rule, str) else rule
    fields["mixer_types"] = [SOFTMAX if i in keep else mixer for i in range(teacher.num_hidden_layers)]
    fields["attn_logits_scaling"] = hype_logits_scaling(logit_scale_base)
    return HypeNetConfig(**(fields | options))


def from_teacher(
    teacher: PreTrainedModel | str | Path,
    keep_layers: Iterable[int],
    mixer: str = "lightning",
    logit_scale_base: float | None = None,
    *,
    mixers: Mapping[int, Mixer] | None = None,
    gate_init: str = "open",
    **options: Any,
) -> HypeNetForCausalLM:
    """Build a HypeNet from a teacher's weights.

    Softmax layers lose their rotary embedding and gain an output gate. Recurrent layers take the teacher's projections,
    with key and value heads repeated to one per query head. Everything else is copied.

    Args:
        teacher: A causal language model of transformers, of the families that `config_from_teacher` names, or the name
            or directory to load one from. It is not modified, and the result shares no memory with it.
        keep_layers: Indices of the layers that stay softmax attention; all others become `mixer`.
        mixer: "lightning", "gdn" or "mamba2".
        logit_scale_base: The base `a` of the HyPE scale ln(t + a) / ln(a), or None for no scale.
        mixers: Mixers to use instead of new ones, by layer index, such as recurrent layers after alignment. The
            modules themselves become part of the model, not copies of them.
        gate_init: Initialisation of the softmax layers' output gates: "open" for gates that have no effect at the
            start, or "random" as published, N(0, initializer_range^2).
        options: Other fields of `HypeNetConfig`, as for `config_from_teacher`.

    Returns:
        The model, in the teacher's dtype, on its device, and in training mode if the teacher is.

    Raises:
        ValueError: If the weights of `teacher` cannot become a HypeNet, or another argument is out of range.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hypenet import from_teacher
        >>> teacher = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32,
        ...     num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2))
        >>> model = from_teacher(teacher, keep_layers=[1])
        >>> [type(layer.self_attn).__name__ for layer in model.model.layers]
        ['LightningAttention', 'SoftmaxAttention', 'LightningAttention']
    """
    if isinstance(teacher, str | Path):
        family_of(AutoConfig.from_pretrained(teacher))
        teacher = cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(teacher))
    family_of(getattr(teacher, "config", None))
    if teacher.get_output_embeddings() is None:
        raise ValueError(f"from_teacher: teacher must be a causal language model, got {type(teacher).__name__}")
    config = config_from_teacher(teacher.config, keep_layers, mixer, logit_scale_base, **options)
    with torch.device("meta"):
        student = HypeNetForCausalLM._from_config(config, dtype=teacher.dtype)
    _copy_backbone(student, teacher)
    layers = cast(Iterable[torch.nn.Module], teacher.base_model.layers)
    for i, (layer, source) in enumerate(zip(student.model.layers, layers, strict=True)):
        given = None if mixers is None else mixers.get(i)
        if given is None:
            given = MIXERS[config.mixers[i]].from_attention(source.get_submodule("self_attn"), config, i, gate_init)
        elif (given.mixer_type, given.layer_idx) != (config.mixers[i], i):
            raise ValueError(
                f"from_teacher: mixers[{i}] must be of kind {config.mixers[i]!r} for layer {i}, "
                f"got {given.mixer_type!r} for layer {given.layer_idx}"
            )
        layer.self_attn = given
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.train(teacher.training)


def recurrent_twins(teacher: PreTrainedModel, mixer: str = "lightning", **options: Any) -> torch.nn.ModuleList:
    """Build the recurrent twin of every attention layer from its weights (arXiv 2601.22156, section 4.1).

    These are the mixers of `from_teacher(teacher, keep_layers=[], mixer=mixer)`, without a copy of anything else.

    Args:
        teacher: As for `from_teacher`.
        mixer: "lightning", "gdn" or "mamba2".
        options: Other fields of `HypeNetConfig`, as for `from_teacher`.

    Returns:
        A mixer for each layer, in the teacher's dtype, on its device.

    Raises:
        ValueError: If the weights of `teacher` cannot become a HypeNet, or `mixer` is none of these.
    """
    config = config_from_teacher(teacher.config, [], mixer, **options)
    layers = cast(Iterable[torch.nn.Module], teacher.base_model.layers)
    twins = (
        MIXERS[config.mixers[i]].from_attention(layer.get_submodule("self_attn"), config, i)
        for i, layer in enumerate(layers)
    )
    return torch.nn.ModuleList(twins)


def empty_twins(teacher: PreTrainedConfig, mixer: str = "lightning", **options: Any) -> torch.nn.ModuleList:
    """Build what `recurrent_twins` does for a teacher of this configuration, on the meta device.

    Returns:
        The mixers, whose values `load_state_dict(state, assign=True)` sets.
    """
    config = config_from_teacher(teacher, [], mixer, **options)
    with torch.device("meta"):
        return torch.nn.ModuleList(MIXERS[kind](config, i) for i, kind in enumerate(config.mixers))


def attend_with_kernels(teacher: PreTrainedModel) -> None:
    """Let a teacher compute its attention by the kernels that the student's attention layers use."""
    teacher.set_attn_implementation(register_attention())


def family_of(config: PreTrainedConfig | None) -> Family:
    """Return the family of a teacher's configuration.

    Raises:
        ValueError: If its weights cannot become a HypeNet, with the reason.
    """
    model_type = getattr(config, "model_type", type(config).__name__)
    if config is None or model_type not in FAMILIES:
        reasons = [reason for name, reason in REFUSED.items() if model_type.startswith(name)]
        if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
            reasons = ["it is a mixture of experts"]
        reason = f": {reasons[0]}" if reasons else ""
        raise ValueError(
            f"from_teacher: teacher must be of model_type {', '.join(FAMILIES)}, got {model_type!r}{reason}"
        )
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layers != {"full_attention"}:
        raise ValueError(f"from_teacher: teacher must have full attention in every layer, got {sorted(layers)}")
    rope_type = cast(dict[str, Any], config.rope_parameters)["rope_type"]
    if rope_type not in ROPE_TYPES:
        raise ValueError(
            f"from_teacher: teacher must have a rope_type of {', '.join(ROPE_TYPES)}, got {rope_type!r}, whose tables "
            "scale q and k or depend on the length"
        )
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else type(quantization).__name__
        raise ValueError(f"from_teacher: teacher must have weights that are not quantised, got {method}")
    return FAMILIES[model_type]


def _copy_backbone(student: HypeNetForCausalLM, teacher: PreTrainedModel) -> None:
    """Copy everything but the token mixers from the teacher into a student on the meta device."""
    weights = {name: x.detach().clone() for name, x in teacher.state_dict().items() if ".self_attn." not in name}
    if student.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    result = student.load_state_dict(weights, strict=False, assign=True)
    left = [name for name in result.missing_keys if ".self_attn." not in name and name != "lm_head.weight"]
    if left or result.unexpected_keys:
        raise ValueError(
            f"from_teacher: teacher must have the weights of a {teacher.config.model_type}, missing {left}, "
            f"unknown {result.unexpected_keys}"
        )
    student.tie_weights()
    with torch.device(teacher.device):
        student.model.rotary_emb = rotary_embedding(student.config)
