"""HypeNetConfig: derived fields, published values and error messages."""

import json
import math
import re

import numpy as np
import pytest
import torch
from compare import assert_matches_reference
from hypenet_models import small_teacher
from transformers import AutoConfig, Qwen3Config, Qwen3ForCausalLM

from hypenet import HypeNetConfig, HypeNetForCausalLM, config_from_teacher
from hypenet.configuration_hypenet import MAX_SIZES, hype_logits_scaling
from hypenet.mixers import alibi_log_decay
from hypenet_kernels import hype_attention

# Published models: layers, width, MLP, query heads, softmax layers, head tied in the teacher.
SIZES = {
    "2B": (28, 2048, 6144, 16, [2, 3, 6, 8, 9, 21, 25]),
    "5B": (36, 2560, 9728, 32, [0, 1, 7, 14, 15, 22, 24, 31, 33]),
    "9B": (36, 4096, 12288, 32, [1, 2, 4, 6, 7, 10, 24, 33, 34]),
}
GAMMA_16 = """
    0.493069 0.606531 0.702189 0.778801 0.837967 0.882497 0.915405 0.939413
    0.956768 0.969233 0.978145 0.984496 0.989012 0.992218 0.994491 0.996101
"""
GAMMA_32_ODD = """
    0.431324 0.551781 0.656752 0.742820 0.810403 0.861870 0.900224 0.928370
    0.948801 0.963519 0.974064 0.981590 0.986947 0.990752 0.993452 0.995365
"""
SCALES = {
    500: (1.357, 1.676, 1.897, 2.008, 2.231),
    600: (1.322, 1.628, 1.843, 1.951, 2.167),
    900: (1.252, 1.532, 1.733, 1.835, 2.038),
}


def published(size):
    layers, width, mlp, heads, softmax = SIZES[size]
    return HypeNetConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=mlp,
        num_attention_heads=heads,
        mixer_types=["attn" if i in softmax else "lightning-attn" for i in range(layers)],
    )


@pytest.mark.parametrize(
    ("size", "parameters", "teacher_parameters", "cache_bytes", "state_mib"),
    [
        ("2B", 1_926_138_880, 1_720_574_976, 28_672, 21),
        ("5B", 4_824_739_328, 4_022_468_096, 36_864, 54),
        ("9B", 8_851_973_120, 8_190_735_360, 36_864, 54),
    ],
)
def test_published_sizes(size, parameters, teacher_parameters, cache_bytes, state_mib):
    config = published(size)
    teacher = Qwen3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=8,
        tie_word_embeddings=size != "9B",
    )
    with torch.device("meta"):
        assert HypeNetForCausalLM(config).num_parameters() == parameters
        assert Qwen3ForCausalLM(teacher).num_parameters() == teacher_parameters
    assert config.cache_bytes_per_token() == cache_bytes
    assert config.state_bytes() == state_mib * 2**20


def test_decay_table():
    gamma_16 = [float(x) for x in GAMMA_16.split()]
    gamma_32 = [x for pair in zip(map(float, GAMMA_32_ODD.split()), gamma_16, strict=True) for x in pair]
    assert alibi_log_decay(16).exp().tolist() == pytest.approx(gamma_16, abs=1e-6)
    assert alibi_log_decay(32).exp().tolist() == pytest.approx(gamma_32, abs=1e-6)
    # Six heads: the four of H = 4, then the first and third of H = 8.
    expected = [math.exp(-(2**-x)) for x in (2, 4, 6, 8, 1, 3)]
    assert alibi_log_decay(6).exp().tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("base", [1.0000001, 512.3456, 1234567, 2.0**0.5, 1e9, 1e300, np.float64(512.3456)])
def test_base_keeps_every_digit(base):
    assert HypeNetConfig(attn_logits_scaling=hype_logits_scaling(base)).logit_scale_base == base
    teacher = small_teacher(torch.float32)
    assert config_from_teacher(teacher.config, [0], logit_scale_base=base).logit_scale_base == base


def test_base_as_published():
    assert hype_logits_scaling(500.0) == "hype 500" and hype_logits_scaling(None) is None


@pytest.mark.parametrize("base", SCALES)
def test_position_scale_table(base):
    """One of t + 1 keys has logit 1, the others 0, so that its weight w gives the scale: ln(w t / (1 - w))."""
    config = HypeNetConfig(attn_logits_scaling=f"hype {base}")
    assert config.logit_scale_base == base
    for t, expected in zip((2**12, 2**15, 2**17), SCALES[base], strict=False):
        k = torch.zeros(1, t + 1, 1, 4, dtype=torch.float64)
        k[0, -1, 0, 0] = 1
        o = hype_attention(k[:, -1:], k, k, scale=1.0, query_offset=t, logit_scale_base=config.logit_scale_base)
        w = o[0, 0, 0, 0].item()
        assert math.log(w * t / (1 - w)) == pytest.approx(expected, abs=6e-4)


def test_layer_and_mixer_types_follow_from_each_other():
    config = HypeNetConfig(num_hidden_layers=4, mixer_types=["attn", "lightning", "gdn", "mamba2"])
    assert config.mixer_types == ["attn", "lightning-attn", "gdn", "mamba2"]
    assert config.layer_types == ["full_attention"] + ["linear_attention"] * 3
    assert (config.softmax_layers, config.recurrent_layers) == ([0], [1, 2, 3])
    config = HypeNetConfig(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    assert config.mixer_types == ["lightning-attn", "attn"]
    assert HypeNetConfig(num_hidden_layers=2, mixer_types=[]).mixer_types == ["attn", "attn"]
    assert HypeNetConfig(num_hidden_layers=5).softmax_layers == [0, 4]


@pytest.mark.parametrize(
    ("value", "base", "constant"),
    [(None, None, 1.0), (0.5, None, 0.5), (2, None, 2.0), ("hype 500", 500.0, 1.0), ("hype", 362.0, 1.0)],
)
def test_logits_scaling_values(value, base, constant):
    config = HypeNetConfig(attn_logits_scaling=value)
    assert (config.logit_scale_base, config.logit_scale_constant) == (base, constant)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixer_types": ["attn", "kda"]}, "mixer_types must hold only .* got 'kda' for layer 1"),
        ({"layer_types": ["full_attention", "conv"]}, "mixer_types must hold only .* got 'conv' for layer 1"),
        ({"mixer_types": ["attn"]}, r"mixer_types must name 2 layers .* got 1"),
        ({"mixer_types": ["attn", "gdn"], "layer_types": ["full_attention"] * 2}, "layer_types must agree"),
        ({"attn_logits_scaling": "hype 1"}, "attn_logits_scaling must be"),
        ({"attn_logits_scaling": "hype a b"}, "attn_logits_scaling must be"),
        ({"attn_logits_scaling": "yarn 4"}, "attn_logits_scaling must be"),
        ({"attn_logits_scaling": "hype inf"}, "attn_logits_scaling must be"),
        ({"attn_logits_scaling": "hype nan"}, "attn_logits_scaling must be"),
        ({"attn_logits_scaling": math.nan}, "attn_logits_scaling must be"),
        ({"attn_logits_scaling": True}, "attn_logits_scaling must be"),
        ({"attn_logits_scaling": ["hype", 5]}, "attn_logits_scaling must be"),
        ({"attention_dropout": 0.1}, "attention_dropout must be 0"),
        ({"lightning_use_short_conv": True}, "short_conv must be False"),
        ({"lightning_scale": "2/d"}, "lightning_scale must be one of"),
        ({"lightning_head_dim": 64}, "lightning_head_dim must equal head_dim"),
        ({"lightning_nkv": 3}, "lightning_nh must be a multiple of lightning_nkv"),
        ({"mamba2_nkv": 3}, "mamba2_nh must be a multiple of mamba2_nkv"),
        ({"gdn_activation": "gelu"}, "gdn_activation must be"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(ValueError, match=message):
        HypeNetConfig(num_hidden_layers=2, **fields)


@pytest.mark.parametrize("field", MAX_SIZES)
@pytest.mark.parametrize("value", [10**12, 1e12, 2.0, "16", True, 0, -1])
def test_sizes_are_checked_before_anything_is_built(field, value, tmp_path):
    message = rf"{field} must be an integer from 1 to \d+, got {re.escape(repr(value))}"
    with pytest.raises(ValueError, match=message):
        HypeNetConfig(**{field: value})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hypenet", field: value}))
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path)


def test_published_field_names_load(tmp_path):
    """A config.json of the published code, with a top-level rope_theta, shared heads, and fields unknown to us."""
    fields = {
        "model_type": "hypenet",
        "num_hidden_layers": 2,
        "mixer_types": ["attn", "lightning-attn"],
        "rope_theta": 1000000,
        "rope_scaling": None,
        "attn_use_rope": False,
        "attn_logits_scaling": "hype 500",
        "lightning_nkv": 16,
        "lightning_rope_scaling": None,
        "expand_kv_proj": True,
        "kda_use_rope": False,
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = HypeNetConfig.from_pretrained(tmp_path)
    assert config.rope_parameters["rope_theta"] == 1000000
    assert config.logit_scale_base == 500
    assert config.expand_kv_proj is True
    config.save_pretrained(tmp_path)
    assert HypeNetConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_constant_logit_scale_multiplies_the_logits():
    q, k, v = torch.randn(3, 1, 9, 2, 8, dtype=torch.float64).unbind()
    scale = 8**-0.5 * HypeNetConfig(attn_logits_scaling=0.25).logit_scale_constant
    logits = torch.einsum("bthd,bshd->bhts", q, k) * 8**-0.5 / 4
    weights = logits.masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf).softmax(-1)
    reference = torch.einsum("bhts,bshd->bthd", weights, v)
    assert_matches_reference("o", hype_attention(q, k, v, scale=scale), reference)
