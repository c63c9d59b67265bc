"""Each family of teachers: its logits in an all-softmax HypeNet, its recurrent twins, and what is refused."""

import json
import re

import pytest
import torch
from compare import assert_matches_reference
from hypenet_models import small_config, small_model, small_teacher, tokens
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hypenet import HypeNetConfig, HypeNetForCausalLM, config_from_teacher, from_teacher
from hypenet.conversion import FAMILIES

TEACHER_FORM = {"attn_use_rope": True, "attn_use_output_gate": False}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
QKV_BIASES = {"q_proj", "k_proj", "v_proj"}
TEACHERS = {  # (fields of the teacher's configuration, modules with a bias)
    "Qwen3": ({"model_type": "qwen3"}, set()),
    "Qwen3 with biases": ({"model_type": "qwen3", "attention_bias": True}, QKV_BIASES | {"o_proj"}),
    "Qwen2.5": (
        {"model_type": "qwen2", "head_dim": None, "num_attention_heads": 3, "num_key_value_heads": 1},
        QKV_BIASES,
    ),
    "Llama 2": ({"model_type": "llama", "head_dim": None, "num_key_value_heads": None}, set()),
    "Llama 3": ({"model_type": "llama", "rope_parameters": LLAMA3}, set()),
    "Llama, linear scaling": (
        {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        set(),
    ),
    "SmolLM2": ({"model_type": "llama", "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": None}, set()),
    "Llama with biases": (
        {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
        QKV_BIASES | {"o_proj", "gate_proj", "up_proj", "down_proj"},
    ),
}
SIZES_OF_SMOLLM2 = {"hidden_size": 72}


def make_teacher(name, **options):
    fields, _ = TEACHERS[name]
    return small_teacher(**((SIZES_OF_SMOLLM2 if name == "SmolLM2" else {}) | fields | options))


def test_every_family_is_here():
    assert {fields["model_type"] for fields, _ in TEACHERS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", TEACHERS)
def test_teachers_have_the_biases_that_they_are_here_for(name):
    biased = {path.split(".")[-2] for path, x in make_teacher(name).named_parameters() if path.endswith(".bias")}
    assert biased == TEACHERS[name][1]
    for path, x in make_teacher(name).named_parameters():
        assert not path.endswith(".bias") or x.abs().min() > 0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", TEACHERS)
def test_all_softmax_with_rope_is_the_teacher(name, tied):
    teacher = make_teacher(name, dtype=torch.float32, tie_word_embeddings=tied)  # its norms are in float32 at best
    student = from_teacher(teacher, range(4), **TEACHER_FORM)
    ids = tokens(2, 33)
    with torch.no_grad():
        expected, logits = teacher(ids).logits, student(ids).logits
    assert_matches_reference("logits", logits, expected)
    assert (logits - expected).abs().max() < 1e-5 < expected.abs().max()
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied


def test_llama3_scaling_matters_at_these_lengths():
    teacher = make_teacher("Llama 3")
    student = from_teacher(
        teacher, range(4), **TEACHER_FORM, rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    )
    ids = tokens(1, 33)
    with torch.no_grad():
        assert (student(ids).logits - teacher(ids).logits).abs().max() > 1e-2


@pytest.mark.parametrize("mixer", ["lightning", "gdn", "mamba2"])
@pytest.mark.parametrize("name", TEACHERS)
def test_recurrent_twins_run(name, mixer, tmp_path):
    teacher = make_teacher(name, dtype=torch.float32)
    student = from_teacher(teacher, [1], mixer=mixer)
    twin, source = student.model.layers[0].self_attn, teacher.model.layers[0].self_attn
    for proj in (*QKV_BIASES, "o_proj"):
        own, given = getattr(twin, proj).bias, getattr(source, proj).bias
        assert (own is None) == (given is None) == (proj not in TEACHERS[name][1])
        if proj in ("q_proj", "o_proj") and own is not None:
            assert torch.equal(own, given)
    assert (
        twin.q_norm is not None
        and (student.model.layers[1].self_attn.q_norm is None) != FAMILIES[teacher.config.model_type].qk_norm
    )
    gate = twin.z_proj if mixer == "lightning" else twin.g_proj
    assert gate.bias is None
    ids = tokens(2, 19)
    loss = student(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite() and all(x.grad.isfinite().all() for x in student.parameters())
    student.save_pretrained(tmp_path)
    loaded = HypeNetForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, student.eval()(ids).logits)


def test_attention_dropout_is_dropped_with_a_line():
    teacher = small_teacher(attention_dropout=0.1)
    with pytest.warns(UserWarning, match=r"^from_teacher: the teacher's attention_dropout of 0.1 is dropped"):
        assert config_from_teacher(teacher.config, [0]).attention_dropout == 0


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("smollm3", {}, "got 'smollm3': some of its layers have no position encoding (no_rope_layers)"),
        ("gemma2", {}, "got 'gemma2': its norms, its embeddings and some of its layers' attention are others"),
        ("qwen3_moe", {}, "got 'qwen3_moe': it is a mixture of experts"),
        ("mixtral", {}, "got 'mixtral': it is a mixture of experts"),
        ("gpt2", {}, "teacher must be of model_type qwen3, qwen2, llama, got 'gpt2'"),
        (
            "qwen2",
            {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 8, "num_hidden_layers": 4},
            "teacher must have full attention in every layer, got ['full_attention', 'sliding_attention']",
        ),
        (
            "qwen3",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}},
            "teacher must have a rope_type of default, linear, llama3, got 'yarn', whose tables scale q and k",
        ),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "not quantised, got gptq"),
    ],
)
def test_refused_with_the_reason(model_type, fields, message):
    config = AutoConfig.for_model(model_type, **fields)
    with pytest.raises(ValueError, match=rf"^from_teacher: .*{re.escape(message)}") as error:
        config_from_teacher(config, [0])
    assert "\n" not in str(error.value)


def test_a_folder_of_another_family_and_a_model_without_a_head_are_refused(tmp_path):
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=9)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="got 'gpt2'"):
        from_teacher(tmp_path, [0])
    with pytest.raises(ValueError, match="from_teacher: teacher must be a causal language model, got Qwen3Model"):
        from_teacher(AutoModel.from_config(small_teacher().config), [0])


def test_attention_bias_of_older_configurations(tmp_path):
    """It gave biases to every projection, with the gates of Lightning layers and without those of gated DeltaNet."""
    mixer_types = ["attn", "lightning-attn", "gdn"]
    model = small_model(mixer_types, torch.float32, attention_bias=True)
    fields = json.loads(model.config.to_json_string())
    new = ("attention_qkv_bias", "attention_o_bias", "mlp_bias", "attn_use_qk_norm")
    old = {name: value for name, value in fields.items() if name not in new}
    assert len(old) == len(fields) - len(new)
    config = HypeNetConfig(**old)
    assert config.attention_qkv_bias and config.attention_o_bias and config.attn_use_qk_norm and not config.mlp_bias
    assert config.to_dict() == model.config.to_dict()
    assert not any(getattr(small_config(), name) for name in ("attention_qkv_bias", "attention_o_bias"))
    attn, lightning, gdn = (layer.self_attn for layer in model.model.layers)
    assert lightning.z_proj.bias is not None and attn.o_proj.bias is not None and gdn.g_proj.bias is None

    for proj in (gdn.q_proj, gdn.k_proj, gdn.v_proj, gdn.o_proj):
        torch.nn.init.zeros_(proj.bias)
    weights = {
        name: x for name, x in model.state_dict().items() if not re.search(r"layers\.2\.self_attn\..*_proj\.bias", name)
    }
    model.save_pretrained(tmp_path, state_dict=weights)
    (tmp_path / "config.json").write_text(json.dumps(old))
    ids = tokens(1, 20)
    with torch.no_grad():
        assert torch.equal(HypeNetForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, model(ids).logits)
