"""Timing on CUDA with fakes, the state of the GPU, and two builds in one process. No GPU is needed."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import ab, cases, gpu_state, ops, tables, timing
from hypenet_kernels import _native

CASE = cases.Case("chunk_gated_delta_rule", {"T": 40, "B": 1, "H": 2, "K": 32, "V": 32})


@pytest.fixture
def graphs(monkeypatch):
    """Fakes of torch.cuda's graphs and events that log their calls; the first entry names the current stream."""
    log = ["default"]

    class Graph:
        def replay(self):
            log.append("replay")

    class Capture:
        def __init__(self, graph):
            pass

        def __enter__(self):
            log[0] = "capturing"

        def __exit__(self, kind, *_):
            if kind is not None:  # torch raises here too, before it restores the stream
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            log[0] = "default"

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            return 1.0

    class Buffer:
        def sum(self):
            log.append("read")

    fakes = {"CUDAGraph": Graph, "graph": Capture, "Event": Event, "synchronize": lambda: None}
    fakes |= {"current_stream": lambda: log[0], "set_stream": lambda stream: log.__setitem__(0, stream)}
    fakes["_sleep"] = lambda cycles: log.append("hold")
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(timing, "_cycles_per_ms", lambda: 1e6)
    monkeypatch.setattr(gpu_state, "read", lambda: {"sm_mhz": 1980.0})
    monkeypatch.setattr(timing.torch, "ones", lambda *size, device: Buffer())
    return log


def test_short_calls_are_replayed_from_a_graph_after_flushing_the_l2(graphs):
    calls = []
    taken = timing._replayed(lambda: calls.append(1), timing.Timing(0.01, 0.01, 0.01, 7, latency=0.02))
    assert len(calls) == 100 and taken.rounds == timing.GRAPH_ROUNDS
    assert taken.median == 0.01 and taken.latency == 0.02 and taken.note is None and taken.gpu == {"sm_mhz": 1980.0}
    # The first replay measures the host's time, for which the GPU is then held.
    assert graphs == ["default", "replay"] + timing.GRAPH_ROUNDS * ["read", "hold", "event", "replay", "event"]


def test_state_of_the_gpu():
    state = gpu_state.parse("1980, 2619, 412.50, 41, 0x0000000000000004\n")
    assert state == {
        "sm_mhz": 1980,
        "memory_mhz": 2619,
        "watts": 412.5,
        "celsius": 41,
        "throttled": "0x0000000000000004",
    }
    assert gpu_state.parse("1980, 2619, [N/A], 41, [N/A]") == {"sm_mhz": 1980, "memory_mhz": 2619, "celsius": 41}
    assert gpu_state.parse("NVIDIA-SMI has failed") is None


def test_state_of_the_gpu_without_nvidia_smi(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert gpu_state.read() is None


def test_two_builds_in_one_process(tmp_path, monkeypatch):
    """A copy of the module stands for the other build."""
    own = ab.own_module("cpu")
    (tmp_path / "hypenet_kernels").mkdir()
    copy = shutil.copy(own.__file__, tmp_path / "hypenet_kernels")
    other = ab.load(tmp_path, own)
    assert other is not own and other.__file__ == copy
    monkeypatch.setattr(ops, "select", lambda *chosen: [CASE])
    (row,) = ab.run(tmp_path, [], "cpu", seconds=0.01)
    assert row.same_bits and len(row.ratios) == ab.TURNS and row.this_ms > 0 and len(row.cells()) == len(ab.HEADER)
    with pytest.raises(ValueError, match="must be a checkout with a built _cpu_"):
        ab.load(tmp_path / "nowhere", own)
    with pytest.raises(ValueError, match="another checkout than this one"):
        ab.load(Path(own.__file__).parents[1], own)


def test_the_other_build_is_really_used(tmp_path, monkeypatch):
    called = []
    modules = {
        "this": SimpleNamespace(op=lambda fields: called.append("this")),
        "other": SimpleNamespace(op=lambda fields: called.append("other")),
    }
    before = _native.kernel
    with ab._switch(modules) as use:
        for build in ("this", "other", "this"):
            use(build)
            _native.kernel("op", "op", torch.device("cpu"))({})
    assert called == ["this", "other", "this"] and _native.kernel is before


def test_failed_capture_is_noted_and_restores_the_stream(graphs):
    def synchronizes():
        if graphs[0] == "capturing":
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    eager = timing.Timing(0.01, 0.01, 0.01, 7, latency=0.02)
    taken = timing._replayed(synchronizes, eager)
    assert graphs == ["default"] and taken.median == eager.median
    note = "failed in capture: RuntimeError: CUDA error: operation not permitted when stream is capturing"
    assert taken.note == note and note in tables.peer_text("peer", vars(taken) | {"ratio": 2.0})
