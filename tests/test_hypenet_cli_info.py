"""The estimates of `hypenet info`."""

import re

import pytest
import torch
from hypenet_models import small_config, small_model
from typer.testing import CliRunner

from halo import describe
from halo.describe import DecodeTraffic, decode_estimates, measured_bandwidth, softmax_teacher
from halo.hypenet_cli import app
from hypenet import HypeNetForCausalLM

MIXERS = ["attn", "lightning", "lightning", "lightning"]


@pytest.fixture
def folder(tmp_path):
    small_model(MIXERS, dtype=torch.bfloat16).save_pretrained(tmp_path)
    return tmp_path


def info(*arguments):
    return CliRunner().invoke(app, ["info", *map(str, arguments)], env={"COLUMNS": "160"})


def test_the_traffic_is_that_of_the_tensors():
    """Weights, states and cache of a model that has run, by their own sizes."""
    model = HypeNetForCausalLM(small_config(MIXERS, tie_word_embeddings=False)).bfloat16().eval()
    cache = model(torch.ones(1, 7, dtype=torch.long)).past_key_values
    traffic = DecodeTraffic.of(model.config, torch.bfloat16)
    read = [p for name, p in model.named_parameters() if "embed_tokens" not in name]
    assert traffic.weights == sum(p.numel() * 2 for p in read)
    states = sum(layer.state.nbytes for layer in cache.layers[1:])
    assert traffic.states == 2 * states
    assert traffic.per_token == 2 * 2 * 2 * 16  # keys and values of two heads of 16, two bytes each
    assert traffic.step(1000) == traffic.weights + traffic.states + 1000 * traffic.per_token


def test_the_teacher_is_softmax_attention_without_additions():
    teacher = softmax_teacher(small_config(MIXERS))
    names = {name for name, _ in HypeNetForCausalLM(teacher).named_parameters()}
    assert teacher.mixers == ["attn"] * 4 and not any("o_gate" in name or "z_proj" in name for name in names)
    assert DecodeTraffic.of(teacher, torch.float32).states == 0


def test_the_crossover_is_the_first_context_with_less_traffic():
    config = small_config(MIXERS)
    own, teacher = (DecodeTraffic.of(x, torch.bfloat16) for x in (config, softmax_teacher(config)))
    least = own.crossover(teacher)
    assert least > 0
    assert own.step(least) < teacher.step(least) and own.step(least - 1) >= teacher.step(least - 1)
    assert own.crossover(own) is None and teacher.crossover(own) == 0


def test_info_estimates_the_decode_time(folder):
    result = info(folder, "--bandwidth", 0.001)
    assert result.exit_code == 0, result.output
    traffic = DecodeTraffic.of(small_config(MIXERS), torch.bfloat16)
    assert "Estimated decode time, one sequence, bfloat16: memory traffic / 0.001 GB/s (stated)" in result.output
    rows = dict(re.findall(r"│ +([\d,]+) +│ +([\d.,e+]+) ms", result.output.replace("┃", "│")))
    assert float(rows["1,024"].replace(",", "")) == pytest.approx(traffic.step(1024) / 1e6 * 1e3, rel=5e-3)
    assert re.search(r"Estimate: faster than the teacher from [\d,]+ tokens of context on", result.output)


def test_a_model_of_softmax_layers_only_has_no_crossover():
    rows, line = decode_estimates(small_config(["attn", "attn"]), torch.float32, 1e9)
    assert len(rows) == 6 and line.startswith("never faster")


def test_the_bandwidth_is_measured_by_a_copy(folder, monkeypatch):
    monkeypatch.setattr(describe, "COPY_BYTES", 2**22)
    monkeypatch.setattr(describe, "COPY_SECONDS", 0.02)
    assert 1e8 < measured_bandwidth(torch.device("cpu")) < 1e13
    assert "GB/s (measured, a copy on cpu)" in info(folder, "--device", "cpu").output


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_bandwidths_that_cannot_be(value, folder):
    result = info(folder, "--bandwidth", value)
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [f"hypenet: --bandwidth: must be a finite number above 0, got {float(value)}"]
