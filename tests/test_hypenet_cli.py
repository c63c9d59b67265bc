"""The `hypenet` command on a small saved model."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypenet_models import MIXED, VOCABULARY, small_model, small_teacher
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from halo.hypenet_cli import app

PROMPT = "w1 w20 w3"
RATE = r"[\d,]+ tokens in \d+\.\d\d s( \([\d,.]+ tokens/s\))?"
SPEED = re.compile(f"prefill {RATE}, decode {RATE}\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"))


def save(path, mixers=MIXED):
    torch.manual_seed(0)
    small_model(mixers, dtype=torch.float32, attn_logits_scaling="hype 50").save_pretrained(path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(path)
    return path


def run(*arguments, **options):
    return CliRunner().invoke(app, [str(x) for x in arguments], **options)


def continuation(*arguments, **options):
    result = run("generate", *arguments, **options)
    assert result.exit_code == 0, result.output
    assert SPEED.fullmatch(result.stderr), result.stderr
    return result.stdout.strip()


def test_generate_streams_the_continuation(folder):
    text = continuation("--model", folder, "--prompt", PROMPT, "--max-new-tokens", 5)
    assert text.startswith(PROMPT)
    words = text.removeprefix(PROMPT).split()
    assert words and set(words) <= {f"w{i}" for i in range(VOCABULARY)}
    assert continuation("--model", folder, "--prompt", "-", "--max-new-tokens", 5, input=PROMPT) == text


def test_a_model_saved_in_float16_runs_on_the_cpu(folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(folder).half().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert len(continuation("--model", tmp_path, "--prompt", PROMPT, "--max-new-tokens", 5)) > len(PROMPT)


def test_the_default_samples(folder):
    """With a fixed seed: greedy decoding of a small model soon repeats itself."""
    options = ("--model", folder, "--prompt", PROMPT, "--max-new-tokens", 30)
    text = continuation(*options)
    assert text == continuation(*options, "--temperature", 0.7) != continuation(*options, "--temperature", 0)


def test_sampling_follows_the_seed(folder):
    def sample(seed):
        return continuation(
            "--model", folder, "--prompt", PROMPT, "--max-new-tokens", 20, "--temperature", 1.5, "--seed", seed
        )

    assert sample(1) == sample(1) != sample(2)


def test_info(folder):
    result = run("info", folder, env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    for fact in ("lightning-attn layers", "1: 1", "2: 0 4", "logit scale hype 50", "256 B in bfloat16", "12,288 B"):
        assert fact in result.output, fact


def refusal(*arguments, **options):
    """Return the only line that a command that fails prints."""
    result = run(*arguments, **options)
    lines = result.stderr.splitlines()
    assert result.exit_code == 2 and len(lines) == 1, result.output
    assert not isinstance(result.exception, Exception)
    assert lines[0].startswith("hypenet: ") and len(lines[0]) < 600
    return lines[0]


@pytest.fixture
def copy(folder, tmp_path):
    """Return a copy of the folder, to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.mark.parametrize("command", [("generate", "--prompt", "w1", "--model"), ("info",)])
def test_folders_without_a_model(command, tmp_path):
    for place in (tmp_path, tmp_path / "none", Path(__file__)):
        assert "must be the directory of a saved model, with config.json, got" in refusal(*command, place)
    (tmp_path / "config.json").write_text("{")
    assert f"{tmp_path}" in refusal(*command, tmp_path)


def test_info_is_of_a_hypenet(tmp_path):
    small_teacher(torch.float32).save_pretrained(tmp_path)
    assert "must hold a HypeNet, got model_type 'qwen3'" in refusal("info", tmp_path)


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def cut(folder):
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def point(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def drop_weights(folder):
    (folder / "model.safetensors").unlink()


def drop_one_weight(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["model.norm.weight"]
    save_file(weights, path, metadata={"format": "pt"})


def drop_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "must be a whole safetensors file of"),
        (point, "got a git-lfs pointer; run: git lfs pull"),
        (drop_weights, "must hold weights"),
        (drop_one_weight, "must hold the weights that its configuration names, got missing model.norm.weight"),
        (drop_tokenizer, "copy the folder again"),
        (lambda folder: change_config(folder, hidden_size=32), "got mismatched model.embed_tokens.weight, "),
        (lambda folder: change_config(folder, num_hidden_layers=3), "mixer_types must name 3 layers"),
        (
            lambda folder: change_config(folder, num_hidden_layers=2, mixer_types=["attn"] * 2, layer_types=None),
            "must hold the weights that its configuration names, got",
        ),
        (lambda folder: change_config(folder, lightning_nh=10**12), "lightning_nh must be an integer from 1 to"),
        (lambda folder: change_config(folder, model_type="unheard-of", auto_map={}), "unheard-of"),
    ],
)
def test_damaged_models(damage, message, copy):
    damage(copy)
    assert message in refusal("generate", "--model", copy, "--prompt", "w1", "--max-new-tokens", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", ""), "--prompt: must hold at least one token, got an empty text"),
        (("--prompt", "w1\udcff"), "--prompt: must be UTF-8, got byte 0xff at 2"),
        (("--seed", "-1"), "--seed: must be from 0 to 4294967295, got -1"),
        (("--seed", str(2**32)), "--seed: must be from 0 to 4294967295, got 4294967296"),
        (("--temperature", "nan"), "--temperature: must be a finite number of at least 0, got nan"),
        (("--temperature", "-1"), "--temperature: must be a finite number of at least 0, got -1.0"),
        (("--device", "gpu"), "device: must be auto, cpu, cuda or cuda:N, got gpu"),
        (("--device", "meta"), "device: must be auto, cpu, cuda or cuda:N, got meta"),
        (("--device", "cuda:999"), "CUDA devices of this machine, got cuda:999"),
        (("--max-new-tokens", str(10**13)), "must have memory for the model and 3 + 10000000000000 tokens on cpu"),
    ],
)
def test_options_that_cannot_be(arguments, message, folder):
    assert message in refusal("generate", "--model", folder, "--prompt", PROMPT, *arguments)


def test_standard_input_that_is_no_text(folder):
    arguments = ("generate", "--model", folder, "--prompt", "-")
    assert "standard input: must be UTF-8, got byte 0xff at 3" in refusal(*arguments, input=b"w1 \xff")
    assert "standard input: must be UTF-8, got byte 0xff at 0" in refusal(*arguments, input="w1".encode("utf-16"))
    assert "at least one token" in refusal(*arguments, input=b"")


def test_without_cuda(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "must be one of the 0 CUDA devices" in refusal(
        "generate", "--model", folder, "--prompt", "w1", "--device", "cuda"
    )
    assert continuation("--model", folder, "--prompt", "w1", "--max-new-tokens", 1).startswith("w1")


def test_a_long_prompt_is_read_in_pieces_and_shown(folder, monkeypatch):
    prompt = " ".join(f"w{1 + i % 90}" for i in range(50))
    arguments = ("--model", folder, "--prompt", prompt, "--max-new-tokens", 5, "--temperature", 0)
    expected = continuation(*arguments)
    shown = []
    monkeypatch.setattr(Progress, "advance", lambda self, task, tokens: shown.append(tokens))
    assert continuation(*arguments, "--prefill-chunk", 16) == expected
    assert shown[:4] == [16, 16, 16, 2]


@pytest.mark.slow
def test_a_compiled_model_writes_the_same(tmp_path, monkeypatch):
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, "g++"))  # not CXX, which may be a command with arguments
    folder = save(tmp_path, ["attn", "lightning"])
    arguments = ("--model", folder, "--prompt", PROMPT, "--max-new-tokens", 8, "--temperature", 0)
    assert continuation(*arguments, "--compile") == continuation(*arguments)
    monkeypatch.setattr(torch.nn.Module, "__call__", _uncompilable)
    line = refusal("generate", *arguments, "--compile")
    assert line == "hypenet: --compile: must be possible with this machine's compiler, got no compiler"


def _uncompilable(*arguments, **options):
    from torch._dynamo.exc import TorchDynamoException

    raise TorchDynamoException("no compiler\nand details")


def test_a_context_is_put_before_the_prompt(folder, tmp_path):
    (tmp_path / "notes.txt").write_text("w5 w6\nw7 ")
    options = ("--model", folder, "--max-new-tokens", 5, "--temperature", 0)
    whole = continuation(*options, "--prompt", f"w5 w6\nw7 {PROMPT}")
    parts = continuation(*options, "--prompt", PROMPT, "--context", tmp_path / "notes.txt")
    assert parts.startswith(PROMPT) and parts.removeprefix(PROMPT) == whole.removeprefix(f"w5 w6\nw7 {PROMPT}")
    assert parts != continuation(*options, "--prompt", PROMPT)


def test_contexts_that_cannot_be_read(folder, tmp_path):
    arguments = ("generate", "--model", folder, "--prompt", PROMPT, "--context")
    assert "--context: must be a file that can be read, got" in refusal(*arguments, tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"w1 \xff")
    assert "latin.txt: must be UTF-8, got byte 0xff at 3" in refusal(*arguments, tmp_path / "latin.txt")


def test_an_interruption_is_one_line(folder, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", interrupted)
    result = run("generate", "--model", folder, "--prompt", "w1")
    assert result.exit_code == 130 and result.stderr.splitlines() == ["hypenet: interrupted"]
