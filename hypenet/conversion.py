"""Transfer of a pretrained Qwen3's weights into a HypeNet, the start of a conversion; nothing is trained here.

Source: arXiv 2601.22156, sections 3 and 4.
"""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, PreTrainedConfig, Qwen3Config, Qwen3ForCausalLM

from hypenet.configuration_hypenet import MIXER_ALIASES, SOFTMAX, HypeNetConfig, hype_logits_scaling
from hypenet.mixers import MIXERS, Mixer
from hypenet.modeling_hypenet import HypeNetForCausalLM, rotary_embedding

QWEN3_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


def config_from_qwen3(
    teacher: Qwen3Config,
    keep_layers: Iterable[int],
    mixer: str = "lightning",
    logit_scale_base: float | None = None,
    **options: Any,
) -> HypeNetConfig:
    """Build the configuration of a HypeNet that a Qwen3's weights fit.

    Args:
        teacher: The Qwen3's configuration.
        keep_layers: Indices of the layers that stay softmax attention; all others become `mixer`.
        mixer: "lightning" or "gdn".
        logit_scale_base: The base `a` of the HyPE scale ln(t + a) / ln(a), or None for no scale.
        options: Other fields of `HypeNetConfig`. `attn_use_rope=True, attn_use_output_gate=False` keeps the softmax
            layers exactly as in the teacher.

    Returns:
        The configuration.

    Raises:
        ValueError: If `teacher` is not a Qwen3 with full attention in every layer, or another argument is out of range.

    Example:
        >>> from transformers import Qwen3Config
        >>> from hypenet import config_from_qwen3
        >>> config = config_from_qwen3(Qwen3Config(num_hidden_layers=3), keep_layers=[1], logit_scale_base=500.0)
        >>> config.mixer_types, config.attn_logits_scaling
        (['lightning-attn', 'attn', 'lightning-attn'], 'hype 500')
    """
    check_teacher(teacher)
    keep = set(keep_layers)
    if not keep <= set(range(teacher.num_hidden_layers)):
        raise ValueError(f"from_qwen3: keep_layers must lie in 0..{teacher.num_hidden_layers - 1}, got {sorted(keep)}")
    if MIXER_ALIASES.get(mixer, mixer) not in MIXERS:
        raise ValueError(f"from_qwen3: mixer must be one of {[*MIXER_ALIASES, *MIXERS]}, got {mixer!r}")
    fields = {name: getattr(teacher, name) for name in QWEN3_FIELDS}
    fields["rope_parameters"] = dict(cast(dict[str, Any], teacher.rope_parameters))
    fields["mixer_types"] = [SOFTMAX if i in keep else mixer for i in range(teacher.num_hidden_layers)]
    fields["attn_logits_scaling"] = hype_logits_scaling(logit_scale_base)
    return HypeNetConfig(**(fields | options))


def from_qwen3(
    teacher: Qwen3ForCausalLM | str | Path,
    keep_layers: Iterable[int],
    mixer: str = "lightning",
    logit_scale_base: float | None = None,
    *,
    mixers: Mapping[int, Mixer] | None = None,
    gate_init: str = "random",
    **options: Any,
) -> HypeNetForCausalLM:
    """Build a HypeNet from a Qwen3's weights.

    Softmax layers lose their rotary embedding and gain an output gate. Recurrent layers take the teacher's projections,
    with key and value heads repeated to one per query head. Everything else is copied.

    Args:
        teacher: A `Qwen3ForCausalLM`, or the name or directory to load one from. It is not modified, and the result
            shares no memory with it.
        keep_layers: Indices of the layers that stay softmax attention; all others become `mixer`.
        mixer: "lightning" or "gdn".
        logit_scale_base: The base `a` of the HyPE scale ln(t + a) / ln(a), or None for no scale.
        mixers: Mixers to use instead of new ones, by layer index, such as recurrent layers after alignment. The
            modules themselves become part of the model, not copies of them.
        gate_init: "random" for the published initialisation of output gates (N(0, 0.02^2) in softmax layers, PyTorch's
            default in recurrent ones), or "open" for gates that have no effect at the start.
        options: Other fields of `HypeNetConfig`, as for `config_from_qwen3`.

    Returns:
        The model, in the teacher's dtype, on its device, and in training mode if the teacher is.

    Raises:
        ValueError: If `teacher` is not a Qwen3 with full attention in every layer, or another argument is out of range.

    Example:
        >>> from transformers import Qwen3Config, Qwen3ForCausalLM
        >>> from hypenet import from_qwen3
        >>> teacher = Qwen3ForCausalLM(Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=32, head_dim=8,
        ...     num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2))
        >>> model = from_qwen3(teacher, keep_layers=[1], gate_init="open")
        >>> [type(layer.self_attn).__name__ for layer in model.model.layers]
        ['LightningAttention', 'SoftmaxAttention', 'LightningAttention']
    """
    if isinstance(teacher, str | Path):
        check_teacher(AutoConfig.from_pretrained(teacher))
        teacher = Qwen3ForCausalLM.from_pretrained(teacher)
    check_teacher(getattr(teacher, "config", None))
    config = config_from_qwen3(teacher.config, keep_layers, mixer, logit_scale_base, **options)
    with torch.device("meta"):
        student = HypeNetForCausalLM._from_config(config, dtype=teacher.dtype)
    _copy_backbone(student, teacher)
    for i, layer in enumerate(student.model.layers):
        given = None if mixers is None else mixers.get(i)
        if given is None:
            attention = teacher.model.layers[i].self_attn
            given = MIXERS[config.mixers[i]].from_qwen3(attention, config, i, gate_init=gate_init)
        elif (given.mixer_type, given.layer_idx) != (config.mixers[i], i):
            raise ValueError(
                f"from_qwen3: mixers[{i}] must be of kind {config.mixers[i]!r} for layer {i}, "
                f"got {given.mixer_type!r} for layer {given.layer_idx}"
            )
        layer.self_attn = given
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.train(teacher.training)


def check_teacher(config: PreTrainedConfig | None) -> None:
    """Check that a configuration is that of a Qwen3 with full attention in every layer.

    Raises:
        ValueError: If it is not.
    """
    model_type = getattr(config, "model_type", type(config).__name__)
    if model_type != "qwen3":
        raise ValueError(f"from_qwen3: teacher must be a Qwen3 language model (model_type 'qwen3'), got {model_type!r}")
    layers = set(getattr(config, "layer_types", ()))
    if layers != {"full_attention"}:
        raise ValueError(f"from_qwen3: teacher must have full attention in every layer, got {sorted(layers)}")


def _copy_backbone(student: HypeNetForCausalLM, teacher: Qwen3ForCausalLM) -> None:
    """Copy everything but the token mixers from the teacher into a student on the meta device."""
    weights = {name: x.detach().clone() for name, x in teacher.state_dict().items() if ".self_attn." not in name}
    if student.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    result = student.load_state_dict(weights, strict=False, assign=True)
    left = [name for name in result.missing_keys if ".self_attn." not in name and name != "lm_head.weight"]
    if left or result.unexpected_keys:
        raise ValueError(
            f"from_qwen3: teacher must have the weights of a Qwen3, missing {left}, unknown {result.unexpected_keys}"
        )
    student.tie_weights()
    with torch.device(teacher.device):
        student.model.rotary_emb = rotary_embedding(student.config)
