"""Folders that others load, and folders of others: programs that do not import hypenet, published checkpoints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from halo_tiny import tiny_tokenizer
from hypenet_models import small_config, small_model, tokens
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM

from hypenet import HypeNetConfig, HypeNetForCausalLM, HypeNetModel

ROOT = Path(__file__).parent.parent
# A configuration of the published code, of a size for tests: every field that it saves and that has a meaning.
PUBLISHED = {
    "architectures": ["HypeNetForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logits_scaling": "hype 500",
    "attn_use_output_gate": True,
    "attn_use_rope": False,
    "auto_map": {
        "AutoConfig": "configuration_hypenet.HypeNetConfig",
        "AutoModel": "modeling_hypenet.HypeNetModel",
        "AutoModelForCausalLM": "modeling_hypenet.HypeNetForCausalLM",
    },
    "bos_token_id": 3,
    "eos_token_id": 5,
    "expand_kv_proj": True,
    "fused_ce_loss": True,
    "gdn_attn_mode": "chunk",
    "gdn_expand_v": 1,
    "gdn_nh": 4,
    "gdn_nkv": 2,
    "gdn_use_gate": False,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "kda_use_rope": False,
    "lightning_conv_size": 4,
    "lightning_head_dim": 16,
    "lightning_nh": 4,
    "lightning_nkv": 4,
    "lightning_rope_scaling": None,
    "lightning_scale": "1/sqrt(d)",
    "lightning_use_output_gate": True,
    "lightning_use_output_norm": True,
    "lightning_use_qk_norm": True,
    "lightning_use_rope": True,
    "lightning_use_short_conv": False,
    "loss_fn": "kl_div",
    "mamba2_n_groups": 1,
    "max_position_embeddings": 1048576,
    "mixer_types": ["lightning-attn", "attn", "lightning_attn"],
    "model_type": "hypenet",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "shift_labels": True,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.6",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 97,
}
# The first releases have older class names, and a flag without effect.
OLDER = PUBLISHED | {
    "architectures": ["HybridForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_hybrid.HybridConfig",
        "AutoModel": "modeling_hybrid.HybridModel",
        "AutoModelForCausalLM": "modeling_hybrid.HybridForCausalLM",
    },
    "attn_sqrtd": False,
}
SCHEMES = {"hypenet": PUBLISHED, "hybrid classes": OLDER, "hybrid": OLDER | {"model_type": "hybrid"}}
LIGHTNING_SHAPES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "z_proj"), (64, 48)),
    **dict.fromkeys(("q_norm", "k_norm"), (16,)),
    "o_proj": (48, 64),
    "o_norm": (64,),
}
SOFTMAX_SHAPES = {
    **dict.fromkeys(("q_proj", "o_gate"), (64, 48)),
    **dict.fromkeys(("k_proj", "v_proj"), (32, 48)),
    **dict.fromkeys(("q_norm", "k_norm"), (16,)),
    "o_proj": (48, 64),
}
LAYER_SHAPES = {
    **dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (48,)),
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (80, 48)),
    "mlp.down_proj": (48, 80),
}


def published_weights():
    """Return random weights under the names of the published code."""
    shapes = {"model.embed_tokens": (97, 48), "model.norm": (48,)}
    for i, mixer in enumerate((LIGHTNING_SHAPES, SOFTMAX_SHAPES, LIGHTNING_SHAPES)):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in LAYER_SHAPES.items()}
        shapes |= {f"model.layers.{i}.self_attn.{name}": shape for name, shape in mixer.items()}
    weights = {}
    for name, shape in shapes.items():
        x = torch.randn(shape) * shape[-1] ** -0.5 if len(shape) == 2 else 1 + 0.2 * torch.randn(shape)
        weights[f"{name}.weight"] = x.bfloat16()
    return weights


@pytest.fixture(params=SCHEMES)
def published(request, tmp_path):
    """Return a folder as published, the weights in it, and the configuration that it means in our own fields."""
    weights = published_weights()
    (tmp_path / "config.json").write_text(json.dumps(SCHEMES[request.param]))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    fields = {"lightning_nkv": 4, "attn_logits_scaling": "hype 500", "bos_token_id": 3, "eos_token_id": 5}
    return tmp_path, weights, small_config(["lightning", "attn", "lightning"], **fields)


def test_published_checkpoints_load(published):
    folder, weights, config = published
    expected = HypeNetForCausalLM(config).eval()
    missing, unexpected = expected.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    ids = tokens(2, 70)
    for trust in (False, True):
        loaded, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=trust, output_loading_info=True
        )
        assert type(loaded) is HypeNetForCausalLM and type(loaded.config) is HypeNetConfig
        assert not any(report.values())
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, expected(ids).logits)
            assert torch.equal(AutoModel.from_pretrained(folder, dtype=torch.float32)(ids)[0], expected.model(ids)[0])
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


def test_published_checkpoints_are_saved_as_ours(published, tmp_path):
    """The code that a published folder names is not in a folder that we write."""
    folder, _, _ = published
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded.save_pretrained(tmp_path / "own")
    record = json.loads((tmp_path / "own" / "config.json").read_text())
    assert record["model_type"] == "hypenet" and record["architectures"] == ["HypeNetForCausalLM"]
    for name in record["auto_map"].values():
        assert (tmp_path / "own" / f"{name.split('.')[0]}.py").is_file()
    ids = tokens(1, 9)
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "own")
        assert torch.equal(again(ids).logits, loaded(ids).logits)


def test_a_flag_whose_meaning_is_not_known_is_named():
    with pytest.warns(UserWarning, match="attn_sqrtd is taken to mean the scale 1/sqrt"):
        HypeNetConfig(num_hidden_layers=1, attn_sqrtd=True)


# ---- programs that do not import hypenet


def run(program, folder, *, blocked=False):
    """Run a program that has not imported hypenet; `blocked`: as if it were not installed."""
    start = (
        "import sys; from transformers import AutoModel, AutoModelForCausalLM, pipeline\n"
        "assert 'hypenet' not in sys.modules; folder = sys.argv[1]\n"
    )
    if blocked:
        start += (
            "class Blocked:\n"
            "    def find_spec(self, name, *_):\n"
            "        if name == 'hypenet': raise ModuleNotFoundError(f'No module named {name!r}')\n"
            "sys.meta_path.insert(0, Blocked())\n"
        )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", start + program, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)


@pytest.fixture
def saved(tmp_path):
    tokenizer = tiny_tokenizer()
    model = small_model(dtype=torch.float32, vocab_size=len(tokenizer), pad_token_id=0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path, model


def test_a_trusted_folder_loads_without_importing_hypenet(saved):
    folder, model = saved
    program = """
trusted = {"trust_remote_code": True}
model = AutoModelForCausalLM.from_pretrained(folder, **trusted)
import hypenet, torch
assert type(model) is hypenet.HypeNetForCausalLM and type(model.config) is hypenet.HypeNetConfig
assert type(AutoModel.from_pretrained(folder, **trusted)) is hypenet.HypeNetModel
torch.save(model(torch.arange(7)[None]).logits.detach(), folder + "/logits.pt")
text = pipeline("text-generation", model=folder, max_new_tokens=3, **trusted)("river stone")[0]["generated_text"]
print(repr(text))  # a random model writes line breaks too
model.save_pretrained(folder + "/again")
"""
    done = run(program, folder)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        torch.testing.assert_close(torch.load(folder / "logits.pt"), model(torch.arange(7)[None]).logits)
    text = done.stdout.splitlines()[-1]
    assert text[1:].startswith("river stone")
    assert {path.name for path in (folder / "again").iterdir()} == {
        "config.json",
        "generation_config.json",
        "load_hypenet.py",
        "model.safetensors",
    }


def test_what_a_folder_that_is_not_trusted_asks_for(saved):
    folder, _ = saved
    program = """
try:
    AutoModelForCausalLM.from_pretrained(folder)
except ValueError as error:
    print(error)
import hypenet
print(type(AutoModelForCausalLM.from_pretrained(folder)).__name__)
"""
    done = run(program, folder)
    message, _, name = done.stdout.strip().rpartition("\n")
    assert "contains custom code" in message and "trust_remote_code=True" in message, done.stderr
    assert "upgrade" not in message + done.stderr and name == "HypeNetForCausalLM"
    assert "import hypenet" in (folder / "load_hypenet.py").read_text()


def test_what_a_machine_without_hypenet_needs(saved):
    folder, _ = saved
    done = run("AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)", folder, blocked=True)
    assert done.returncode != 0
    assert "requires the following packages that were not found in your environment: hypenet" in done.stderr


def test_every_configuration_says_where_its_classes_are(tmp_path):
    """TRL looks for the Auto class of a model in `config.auto_map`, also of one that was never saved."""
    config = small_config()
    assert config.auto_map == {
        "AutoConfig": "load_hypenet.HypeNetConfig",
        "AutoModel": "load_hypenet.HypeNetModel",
        "AutoModelForCausalLM": "load_hypenet.HypeNetForCausalLM",
        "AutoModelForQuestionAnswering": "load_hypenet.HypeNetForQuestionAnswering",
        "AutoModelForSequenceClassification": "load_hypenet.HypeNetForSequenceClassification",
        "AutoModelForTokenClassification": "load_hypenet.HypeNetForTokenClassification",
    }
    config.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "load_hypenet.py"]
    assert HypeNetConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    for saved_class in (HypeNetConfig, HypeNetModel, HypeNetForCausalLM):
        saved_class.register_for_auto_class()
        assert not saved_class.is_remote_code()
