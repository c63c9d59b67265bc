"""The layout of the published checkpoints, for programs that read those: configuration fields and names of weights.

Source: the code of arXiv 2601.22156. Reading needs no conversion; `HypeNetConfig` and `from_pretrained` take both.
"""

import math
from typing import Any

import torch

from hypenet.configuration_hypenet import LIGHTNING, SOFTMAX, HypeNetConfig
from hypenet.mixers import LightningAttention, alibi_log_decay
from hypenet.modeling_hypenet import HypeNetForCausalLM


def published_layout(model: HypeNetForCausalLM) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the content of config.json, and the weights by their names, as the published code has them.

    Args:
        model: The model.

    Returns:
        (fields of the configuration, weights); the published code computes the decays of Lightning layers.

    Raises:
        ValueError: If the published code cannot run such a model, or would compute something else.
    """
    config = model.config
    _check_config(config)
    _check_decays(model)
    fields = config.to_diff_dict()
    rope = dict(fields.pop("rope_parameters"))
    fields["rope_theta"] = rope.pop("rope_theta")
    fields["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    fields.pop("dtype", None)
    fields["torch_dtype"] = str(model.dtype).removeprefix("torch.")
    fields["architectures"] = [type(model).__name__]
    fields["expand_kv_proj"] = config.lightning_nkv != config.num_key_value_heads
    if config.attn_logits_scaling is not None and config.logit_scale_base is None:
        fields["attn_logits_scaling"] = config.logit_scale_constant
    return fields, {name: x for name, x in model.state_dict().items() if not name.endswith(".log_decay")}


def _check_config(config: HypeNetConfig) -> None:
    for i, mixer in enumerate(config.mixers):
        if mixer not in (SOFTMAX, LIGHTNING):
            raise _refusal("mixer_types", f"hold only {SOFTMAX} and {LIGHTNING}", f"{mixer} in layer {i}")
    required = {
        "attn_use_qk_norm": True,
        "attention_qkv_bias": config.attention_bias,
        "attention_o_bias": config.attention_bias,
        "mlp_bias": False,
    }
    for name, value in required.items():
        if getattr(config, name) != value:
            raise _refusal(name, f"be {value}", getattr(config, name))
    base = config.logit_scale_base
    if base is not None and not base.is_integer():
        raise _refusal("the base of attn_logits_scaling", "be a whole number", config.attn_logits_scaling)


def _check_decays(model: HypeNetForCausalLM) -> None:
    for i, layer in enumerate(model.model.layers):
        mixer = layer.self_attn
        if not isinstance(mixer, LightningAttention):
            continue
        decay = mixer.log_decay.float().cpu()
        if not torch.equal(decay, alibi_log_decay(mixer.num_heads)):
            half_lives = ", ".join(f"{x:.1f}" for x in math.log(0.5) / decay)
            raise _refusal(
                "half-lives of Lightning layers", "be those of the ALiBi slopes", f"{half_lives} in layer {i}"
            )


def _refusal(name: str, rule: str, value: object) -> ValueError:
    return ValueError(f"published layout: {name} must {rule}, got {value}")
