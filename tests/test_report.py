"""Information about the installation: report(), the log line at first use, python -m hypenet_kernels."""

import json
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import hypenet_kernels
from hypenet_kernels import __main__ as command
from hypenet_kernels import _installation, _native, _selftest

OPS = set(_native.CUDA_OPS)
CAPABILITIES = {"default": "baseline", "avx2": "v3", "avx512": "v4"}  # ATEN_CPU_CAPABILITY -> level
AVAILABLE = list(CAPABILITIES)[: 1 + list(CAPABILITIES.values()).index(_native.level().removesuffix("_bf16"))]


def inputs(dtype=torch.float32, device="cpu"):
    q, k, v = torch.randn(3, 1, 4, 2, 8, dtype=dtype, device=device)
    return q, k, v, -torch.rand(1, 4, 2, device=device), torch.rand(1, 4, 2, device=device)


def test_report_covers_every_op():
    facts = hypenet_kernels.report()
    assert set(facts["ops"]) == OPS == set(_selftest.CASES)
    assert all(devices["cpu"]["implementation"] == f"C++ (_cpu_{facts['level']})" for devices in facts["ops"].values())
    assert {op for op, devices in facts["ops"].items() if devices["cuda"]["implementation"]} <= set(_native.CUDA_OPS)
    assert all(choice["why"] for devices in facts["ops"].values() for choice in devices.values())
    assert facts["threads"] == torch.get_num_threads() and facts["modules"][f"_cpu_{facts['level']}"]
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize("module", ["_cuda", "_cuda_rtc", None])
def test_report_names_the_module_that_a_gpu_would_use(monkeypatch, module):
    def choose(capability):
        assert capability == (9, 0)
        if module is None:
            raise NotImplementedError("hypenet_kernels: the kernels need a driver of CUDA 13")
        return SimpleNamespace(__name__=f"hypenet_kernels.{module}")

    monkeypatch.setattr(_installation, "_gpus", lambda: ["H100"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(_native, "cuda_for", choose)
    found = _installation._on_cuda("hype_attention")
    assert found["implementation"] == (module and f"CUDA ({module})")
    assert found["why"].endswith("H100") if module else found["why"] == "the kernels need a driver of CUDA 13"


def test_first_use_of_an_op_is_logged_once(caplog):
    _native.kernel.cache_clear()
    with caplog.at_level(logging.INFO, logger="hypenet_kernels"):
        for _ in range(2):
            hypenet_kernels.chunk_gated_delta_rule(*inputs())
            hypenet_kernels.hype_attention(*inputs()[:3])
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"{op}: C++ (_cpu_{_native.level()})" for op in ("chunk_gated_delta_rule", "hype_attention")]


def test_wrong_kernel_fails_the_self_test(monkeypatch, capsys):
    def wrong(x):
        return expect(x) * 1.1

    _, expect, differentiated = _selftest.CASES["hype_attention"]
    monkeypatch.setitem(_selftest.CASES, "hype_attention", (wrong, expect, differentiated))
    assert command.main() == 1
    printed = capsys.readouterr().out.splitlines()
    failed = [line.split()[1] for line in printed if line.startswith("  FAIL")]
    assert failed == ["hype_attention", "hype_attention"] and printed[-1] == "  2 failed"


@pytest.mark.parametrize("bf16, best", [(True, "v4_bf16"), (False, "v4"), (None, "v4")])
def test_level_is_the_best_of_the_cpu_unless_the_environment_sets_one(monkeypatch, bf16, best):
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    if bf16 is None:  # this torch cannot tell
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bf16}, raising=False)
    assert _native.level() == best
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert _native.level() == "v3"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx512")
    assert _native.level() == "v4"


@pytest.mark.parametrize("capability", AVAILABLE)
def test_self_test_passes_at_every_level(capability):
    env = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    ran = subprocess.run([sys.executable, "-m", "hypenet_kernels"], env=env, capture_output=True, text=True)
    assert ran.returncode == 0 and "all passed" in ran.stdout, ran.stdout + ran.stderr
    assert f"level {CAPABILITIES[capability]}" in ran.stdout
    assert all(op in ran.stdout for op in OPS)


def test_self_test_passes_on_cuda(device, capsys):
    """Every op, in every dtype that its CUDA kernels support."""
    assert all(_selftest.run(device.type)), capsys.readouterr().out
    printed = capsys.readouterr().out
    assert all(f" {op} " in printed for op in _native.CUDA_OPS) and "float32" in printed


def test_one_openmp_runtime():
    """torch and our modules share one runtime, whichever is used first."""
    use = "import torch, hypenet_kernels as h; q = torch.randn(1, 4, 2, 8); h.hype_attention(q, q, q); (q @ q.mT).sum()"
    show = "print(*h.report()['openmp'], sep='\\n')"
    ran = subprocess.run([sys.executable, "-c", f"{use}; {show}"], capture_output=True, text=True, check=True)
    assert len(ran.stdout.split("\n")) == 2, ran.stdout


def test_params_are_complete_or_refused():
    kernel = _native.cpu().gated_delta_step
    with pytest.raises(TypeError, match="gated_delta_step: missing field dtype"):
        kernel({"B": 1})
    with pytest.raises(TypeError):
        kernel(1)
