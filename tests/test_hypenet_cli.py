"""The `hypenet` command on a small saved model."""

import pytest
import torch
from hypenet_models import VOCABULARY, small_model, small_teacher
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from halo.hypenet_cli import app

PROMPT = "w1 w20 w3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    small_model(dtype=torch.float32, attn_logits_scaling="hype 50").save_pretrained(path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(path)
    return path


def run(*arguments, **options):
    return CliRunner().invoke(app, [str(x) for x in arguments], **options)


def continuation(*arguments, **options):
    result = run("generate", *arguments, **options)
    assert result.exit_code == 0, result.output
    return result.output.strip()


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


def test_sampling_follows_the_seed(folder):
    def sample(seed):
        return continuation(
            "--model", folder, "--prompt", PROMPT, "--max-new-tokens", 20, "--temperature", 1.5, "--seed", seed
        )

    assert sample(1) == sample(1) != sample(2)


def test_info(folder):
    result = run("info", folder, env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    for fact in ("lightning-attn layers", "1: 1", "2: 0 3", "logit scale hype 50", "256 B in bfloat16", "8,192 B"):
        assert fact in result.output, fact


def test_errors_are_one_line(folder, tmp_path):
    assert run("info", tmp_path / "none").exit_code == 2
    result = run("generate", "--model", tmp_path, "--prompt", "w1")
    assert result.exit_code == 2 and "Traceback" not in result.output
    small_teacher(torch.float32).save_pretrained(tmp_path)
    result = run("info", tmp_path)
    assert result.exit_code == 2 and "qwen3" in result.output
    result = run("generate", "--model", folder, "--prompt", "")
    assert result.exit_code == 2 and "at least one token" in result.output
