"""halo export: a folder that needs nothing of the run, with the run's own numbers, in both layouts."""

import json

import pytest
import torch
import yaml
from halo_tiny import tiny_tokenizer, write_inputs
from hypenet_models import small_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

from halo import cli
from halo.export import export, measured_length, push_to_hub
from halo.settings import HaloError
from hypenet import HypeNetForCausalLM

LAYERS = ["lightning-attn", "attn", "lightning-attn"]
STAGE = {"batch": 8, "length": 512}
TOKENS = (40 + 100 + 20) * 8 * 512


def row(model, length, recall, bits):
    multiple = length // 512
    errors = {"recall_error": 0.01, "bits_per_byte_error": 0.02, "episodes": 4}
    return {"model": model, "multiple": multiple, "length": length, "recall": recall, "bits_per_byte": bits} | errors


def write_run(directory, mixers=LAYERS, model=None, **keys):
    """Write what a finished conversion leaves, without training anything."""
    run = directory / "a private place" / "run"
    write_inputs(directory)
    tokenizer = tiny_tokenizer()
    fields = {"vocab_size": len(tokenizer), "attn_logits_scaling": "hype 30", "eos_token_id": 0, "bos_token_id": 0}
    model = model or small_model(mixers, torch.float32, **fields)
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.6, eos_token_id=0, pad_token_id=0)
    model.save_pretrained(run / "model")
    AutoTokenizer.from_pretrained(directory / "teacher").save_pretrained(run / "model")
    config = {
        "teacher": str(directory / "teacher"),
        "aligned": None,
        "data": {"source": str(directory / "text")},
        **dict.fromkeys(("align", "distill", "finetune"), STAGE),
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config | keys))
    for stage, steps in (("align", 40), ("distill", 100), ("finetune", 20)):
        (run / stage).mkdir()
        lines = [{"step": step, "loss": 9.0 / step, "seconds": 1.0} for step in (1, steps)]
        (run / stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "eval").mkdir()
    rows = [
        row("teacher", 512, 0.99, 1.0),
        row("teacher", 8192, 0.11, 1.5),
        row("converted", 512, 0.98, 1.1),
        row("converted", 2048, 0.87, None),
        row("converted", 8192, None, None),
    ]
    (run / "eval" / "results.json").write_text(json.dumps({"training_length": 512, "rows": rows}))
    return run, model


def assert_names_no_place_of_the_run(folder, directory):
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            assert str(directory) not in path.read_text(), path.name
    assert not {"is_local", "name_or_path"} & json.loads((folder / "tokenizer_config.json").read_text()).keys()


def test_the_folder_stands_alone(tmp_path):
    run, _ = write_run(tmp_path)
    folder = export(run)
    assert folder == run / "export"
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "load_hypenet.py",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert_names_no_place_of_the_run(folder, tmp_path)
    weights = load_file(folder / "model.safetensors")
    assert {name for name, x in weights.items() if x.dtype != torch.bfloat16} == {
        f"model.layers.{layer}.self_attn.log_decay" for layer in (0, 2)
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["layer_types"] == ["linear_attention", "full_attention", "linear_attention"]
    assert (config["max_position_embeddings"], config["dtype"]) == (2048, "bfloat16")

    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    expected = HypeNetForCausalLM.from_pretrained(run / "model", dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == 2048
    ids = tokenizer("river stone quiet", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected(ids).logits)
    assert (loaded.generation_config.temperature, loaded.generation_config.eos_token_id) == (0.6, 0)


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16)])
def test_other_precisions(tmp_path, name, dtype):
    run, model = write_run(tmp_path, ["attn", "gdn", "mamba2"])
    folder = export(run, tmp_path / "out", dtype=name, max_position_embeddings=1048576)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == dtype and loaded.config.max_position_embeddings == 1048576
    for (key, x), expected in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(x, expected if ".decay_bias." in key else expected.to(dtype)), key


def test_the_card_has_the_numbers_of_the_run(tmp_path):
    run, model = write_run(tmp_path, teacher="Qwen/Qwen3-1.7B-Base", data={"source": "org/corpus"})
    card = (export(run, license_name="apache-2.0", repository="me/mine") / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "apache-2.0" and front["base_model"] == "Qwen/Qwen3-1.7B-Base"
    assert front["datasets"] == ["org/corpus"] and front["library_name"] == "transformers"
    for line in (
        "| distill | 100 | 409,600 | 512 | 0.09 |",
        f"{TOKENS:,} tokens in all.",
        "| converted | 0.98 ± 0.01 | 0.87 ± 0.01 | ",
        "- softmax attention in 1 of 3 layers: 1",
        "- Lightning attention in 2 of 3 layers: 0, 2",
        "- attention scale ln(t + 30) / ln(30) at position t",
        f"- {model.num_parameters():,} parameters, bfloat16",
        'from_pretrained("me/mine")',
        "pretrained=me/mine,trust_remote_code=True",
        "`max_position_embeddings` is 2,048.",
    ):
        assert line in card, line


def test_the_card_without_a_license_says_so(tmp_path):
    run, _ = write_run(tmp_path, data={"source": [{"source": "stdlib"}, {"source": "./notes/*.md"}]})
    card = (export(run) / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "unknown"
    assert "halo export --license" in card and "HypeNet from teacher" in card
    assert "the text of Python's standard library, local files" in card and "notes" not in card


# ---- the published layout


def test_the_published_layout(tmp_path):
    run, model = write_run(tmp_path)
    folder = export(run, layout="published", dtype="fp32")
    config = json.loads((folder / "config.json").read_text())
    assert "rope_parameters" not in config and "dtype" not in config
    expected = {
        "architectures": ["HypeNetForCausalLM"],
        "attn_logits_scaling": "hype 30",
        "attn_use_output_gate": True,
        "attn_use_rope": False,
        "expand_kv_proj": True,
        "lightning_nh": 4,
        "lightning_nkv": 4,
        "mixer_types": LAYERS,
        "model_type": "hypenet",
        "rope_scaling": None,
        "rope_theta": 1e4,
        "torch_dtype": "float32",
    }
    assert {name: config[name] for name in expected} == expected
    weights = load_file(folder / "model.safetensors")
    assert not any("log_decay" in name for name in weights)
    assert {name.split("self_attn.")[1] for name in weights if "layers.0.self_attn" in name} == {
        f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "z_proj", "q_norm", "k_norm", "o_norm")
    }
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def calibrated(size):
    model = small_model(LAYERS, torch.float32, vocab_size=size)
    model.model.layers[2].self_attn.log_decay.mul_(0.5)
    return model


REFUSED = {
    "gdn": (lambda size: small_model(["attn", "gdn"], torch.float32, vocab_size=size), "got gdn in layer 1"),
    "mamba2": (lambda size: small_model(["attn", "mamba2"], torch.float32, vocab_size=size), "got mamba2 in layer 1"),
    "half-lives": (calibrated, r"half-lives .* must be those of the ALiBi slopes, got 5\.5, .* in layer 2"),
    "base": (
        lambda size: small_model(LAYERS, torch.float32, vocab_size=size, attn_logits_scaling="hype 30.5"),
        "must be a whole number, got hype 30.5",
    ),
    "norms": (
        lambda size: small_model(LAYERS, torch.float32, vocab_size=size, attn_use_qk_norm=False),
        "attn_use_qk_norm must be True, got False",
    ),
    "biases": (
        lambda size: small_model(LAYERS, torch.float32, vocab_size=size, attention_qkv_bias=True),
        "attention_qkv_bias must be False, got True",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_published_code_cannot_run_is_refused(case, tmp_path):
    make, message = REFUSED[case]
    run, _ = write_run(tmp_path, model=make(len(tiny_tokenizer())))
    with pytest.raises(HaloError, match=f"published layout: .*{message}"):
        export(run, layout="published")
    assert not (run / "export").exists()
    assert export(run).is_dir()


# ---- mistakes


def test_mistakes(tmp_path):
    run, _ = write_run(tmp_path)
    with pytest.raises(HaloError, match=r"nowhere/config.yaml: must exist; is it the directory of a conversion"):
        export(tmp_path / "nowhere")
    with pytest.raises(HaloError, match=r"dtype: must be one of bf16, fp16, fp32, got int8"):
        export(run, dtype="int8")
    with pytest.raises(HaloError, match=r"must be a new or empty directory"):
        export(run, run)
    assert (run / "config.yaml").exists()
    (run / "eval" / "results.json").write_text(json.dumps({"rows": [row("teacher", 512, 1.0, 1.0)]}))
    with pytest.raises(HaloError, match=r"must have a measurement of the converted model; run `halo eval`, or give"):
        measured_length(run)
    (run / "eval" / "results.json").write_text("{")
    with pytest.raises(HaloError, match=r"results.json: must be readable JSON"):
        export(run)
    (run / "eval" / "results.json").unlink()
    with pytest.raises(
        HaloError, match=r"results.json: must exist; run `halo eval`, or give --max-position-embeddings"
    ):
        export(run)
    weights = run / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(HaloError, match=r"got one whose header is damaged; delete it and run `halo scale` again"):
        export(run, max_position_embeddings=512)
    (run / "model").rename(run / "else")
    with pytest.raises(HaloError, match="model: must exist; run `halo scale`"):
        export(run)


class Hub:
    """In place of the Hub's client."""

    def __init__(self):
        self.uploads = []

    def __call__(self):
        return self

    def create_repo(self, name, exist_ok):
        if name == "forbidden":
            raise OSError("401 Client Error\nmore words")
        return type("Address", (), {"repo_id": f"me/{name}"})

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.uploads.append((repo_id, folder_path))
        return f"https://hub/{repo_id}"


def test_upload(tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    assert push_to_hub(tmp_path, "mine") == "https://hub/me/mine" and hub.uploads == [("me/mine", tmp_path)]
    with pytest.raises(
        HaloError, match=r"--push-to-hub: forbidden must be writable, got 401 Client Error; the model is in"
    ):
        push_to_hub(tmp_path, "forbidden")


def test_command(tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    run, _ = write_run(tmp_path)
    options = ["--to", str(tmp_path / "out"), "--dtype", "fp32", "--layout", "published", "--license", "mit"]
    done = CliRunner().invoke(cli.app, ["export", str(run), *options, "--push-to-hub", "mine"])
    assert done.exit_code == 0, done.output
    assert str(tmp_path / "out") in done.output and "https://hub/me/mine" in done.output
    assert hub.uploads == [("me/mine", tmp_path / "out")]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()
    done = CliRunner().invoke(cli.app, ["export", str(run), "--to", str(tmp_path / "out")])
    assert done.exit_code == 2 and "must be a new or empty directory" in done.output
