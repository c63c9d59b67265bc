"""Every stage of a conversion on the CUDA kernels and under their rules, on the emulator or on a GPU."""

import json

import pytest
import torch
from halo_tiny import config_tree, write_inputs
from safetensors.torch import load_file

from halo.compute import Compute
from halo.config import make_config
from halo.pipeline import Pipeline
from halo.settings import HaloError
from halo.stages import STAGES


@pytest.mark.parametrize("mixer", ["lightning", "gdn", "mamba2"])
def test_a_conversion_finishes_on_the_cuda_kernels(device, mixer, tmp_path):
    write_inputs(tmp_path)
    tree = config_tree(tmp_path) | {"mixer": mixer, "precision": "bf16", "device": device.type}
    short = {"steps": 1, "batch": 1, "length": 40, "learning_rate": 1e-3, "warmup": 0}
    tree |= {"align": short, "distill": short, "finetune": short | {"length": 70, "micro_batch": 1}}
    tree["data"] = tree["data"] | {"needle_ratio": 0.0, "isolate_documents": mixer != "lightning"}
    tree["select"] = tree["select"] | {"recall_samples": 2, "recall_length": 128, "language_samples": 2, "batch": 1}
    if mixer == "gdn":
        gates = {"joint_steps": 1, "joint_batch": 1, "joint_length": 40, "joint_needle_ratio": 0.0}
        tree["select"] |= {"policy": "joint", "measure_positions": False} | gates
    else:
        tree["select"] |= {"exchange": 1, "exchange_rounds": 1}
    tree["scale"] = {"grid": [None, 100], "length": 80, "documents": 1}
    tree["eval"] = {"length": 128, "multiples": [1], "recall_samples": 1, "text_tokens": 128}
    pipeline = Pipeline(make_config(tree))
    pipeline.run()
    for stage in STAGES:
        assert (tmp_path / "out" / stage / "done.json").is_file()
    for stage in ("align", "distill", "finetune"):
        lines = [json.loads(line) for line in (tmp_path / "out" / stage / "metrics.jsonl").read_text().splitlines()]
        assert all(0 < line["loss"] < 20 and line["grad_norm"] > 0 for line in lines)
    assert {weight.dtype for weight in load_file(tmp_path / "out" / "model" / "model.safetensors").values()} == {
        torch.float32
    }
    # Models that are only measured are frozen and in the arithmetic's dtype, except the parameters of decays.
    job = pipeline.job
    for module in (job.teacher, job.measured_mixers(), job.measured_student("finetune"), job.measured_student("scale")):
        wide = {name.rsplit(".", 1)[-1] for name, x in module.named_parameters() if x.dtype != torch.bfloat16}
        assert wide == ({"A_log", "dt_bias"} if mixer != "lightning" and module is not job.teacher else set())
        assert not any(x.requires_grad or module.training for x in module.parameters())


def test_what_the_device_cannot_run_is_found_before_the_first_stage(device, tmp_path):
    if device.type == "cuda":
        pytest.skip("the configuration refuses it there")
    write_inputs(tmp_path)
    tree = config_tree(tmp_path) | {"precision": "fp32"}
    expected = "device: a step of the student's layers must run on cpu in fp32, got NotImplementedError: .* on CUDA"
    with pytest.raises(HaloError, match=expected):
        Pipeline(make_config(tree)).run()
    assert not (tmp_path / "out" / "transfer").exists()


def test_float32_on_cuda_is_refused_at_once(monkeypatch):
    """The kernels take no float32 there; without this, a conversion would find out after its first stage is loaded."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(HaloError, match="precision: must be bf16 or auto on CUDA"):
        Compute.start("cuda", "fp32")
    assert Compute.start("cuda", "auto").dtype == torch.bfloat16
    with pytest.raises(HaloError, match="device: must be one of the 1 CUDA devices of this machine, got cuda:3"):
        Compute.start("cuda:3", "auto")
