"""Small models for the tests of hypenet, with every kind of layer and widths that are not multiples of each other."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hypenet import HypeNetConfig, HypeNetForCausalLM

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
MIXED = ["attn", "lightning-attn", "gdn", "mamba2", "attn"]


def small_config(mixer_types=MIXED, **fields):
    sizes = SIZES | {"num_hidden_layers": len(mixer_types), "mixer_types": list(mixer_types)}
    return HypeNetConfig(**(sizes | fields))


def small_model(mixer_types=MIXED, dtype=torch.float64, **fields):
    """Return a HypeNet with weights large enough for every layer, gate and norm to matter."""
    model = HypeNetForCausalLM(small_config(mixer_types, **fields)).eval()
    return _randomised(model).to(dtype)


def small_teacher(dtype=torch.float64, model_type="qwen3", **fields):
    """Return a teacher of the same sizes with four layers; a field given as None is left to the family's default."""
    fields = SIZES | {"num_hidden_layers": 4} | fields
    given = {name: value for name, value in fields.items() if value is not None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **given)).eval()
    return _randomised(model).to(dtype)


def tokens(*shape):
    return torch.randint(1, VOCABULARY, shape)


def _randomised(model):
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight") or "layernorm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
        elif parameter.dim() == 2 and "embed" not in name and "lm_head" not in name:
            torch.nn.init.normal_(parameter, 0.0, parameter.shape[1] ** -0.5)
        elif name.endswith(".bias"):
            torch.nn.init.normal_(parameter, 0.0, 0.5)
    return model
