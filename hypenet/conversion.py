"""Weights of a pretrained Qwen3 put into a HypeNet: the transfer at the start of a conversion.

Source: arXiv 2601.22156, sections 3 and 4. No training happens here.
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
    """The configuration of a HypeNet that can take a Qwen3's weights.

    Args:
        teacher: The Qwen3's configuration.
        keep_layers: Indices of the layers that stay softmax attention; all others become `mixer`.
        mixer: "lightning" or "gdn".
        logit_scale_base: The `a` of the HyPE scale ln(t + a) / ln(a), or None for no scale.
        options: Other fields of `HypeNetConfig`. For softmax layers as the teacher has them (the models of the layer
            selection): attn_use_rope=True, attn_use_output_gate=False.
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
    """A HypeNet with a Qwen3's weights: softmax layers lose their positions and gain a gate, recurrent layers get the
    teacher's projections with key and value heads cloned to one for each query head; everything else is copied, an
    untied head as an untied head.

    Args:
        teacher: A `Qwen3ForCausalLM`, or a name or folder to load one from. Never modified, shares no memory.
        keep_layers, mixer, logit_scale_base, options: See `config_from_qwen3`.
        mixers: Mixers to put in instead of fresh ones, by layer: the recurrent layers after alignment. The modules
            themselves are used, not copies.
        gate_init: "random" for the published initialisation (N(0, 0.02^2) in softmax layers, PyTorch's own in
            recurrent ones), or "open" for output gates that start without effect.

    Returns the model in the teacher's dtype, on its device, in training mode like the teacher.
    Raises ValueError if the teacher is not a Qwen3.
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
    """ValueError unless `config` is that of a Qwen3 whose layers all attend to everything before them."""
    model_type = getattr(config, "model_type", type(config).__name__)
    if model_type != "qwen3":
        raise ValueError(f"from_qwen3: teacher must be a Qwen3 language model (model_type 'qwen3'), got {model_type!r}")
    layers = set(getattr(config, "layer_types", ()))
    if layers != {"full_attention"}:
        raise ValueError(f"from_qwen3: teacher must have full attention in every layer, got {sorted(layers)}")


def _copy_backbone(student: HypeNetForCausalLM, teacher: Qwen3ForCausalLM) -> None:
    """Gives a student on the meta device copies of everything in the teacher but its token mixers."""
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
