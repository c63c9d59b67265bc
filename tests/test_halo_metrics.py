"""What a training stage logs: speed, and on a GPU memory and utilisation."""

import json

import pytest
import torch

from halo import metrics
from halo.compute import Compute
from halo.metrics import Metrics, Work


def test_utilisation_is_the_models_work_over_the_peak_of_all_devices(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    clock = iter([0.0, 10.0, 10.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    compute = Compute(torch.device("cuda", 0), torch.bfloat16, rank=0, world=2)
    with Metrics(tmp_path, compute, 0, 0.0, Work(1000, 1e12), tensorboard=False) as log:
        line = log.log(5, {"loss": 1.0})
    assert line["tokens_per_second"] == 500 and line["memory_gib"] == 3
    assert line["mfu"] == pytest.approx(500 * 1e12 / (2 * 989e12), abs=1e-3)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == line


def test_lines_after_the_checkpoint_are_repeated(tmp_path):
    compute = Compute(torch.device("cpu"))
    with Metrics(tmp_path, compute, 0, 0.0, Work(10), tensorboard=False) as log:
        for step in (1, 2, 3):
            log.log(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # cut off by a kill
    with Metrics(tmp_path, compute, 2, 5.0, Work(10), tensorboard=False) as log:
        log.log(3, {"loss": 30.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [1.0, 2.0, 30.0] and lines[-1]["seconds"] >= 5
    assert "mfu" not in lines[-1]
