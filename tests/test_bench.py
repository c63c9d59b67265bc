"""bench: what it measures, what it refuses to time, records, tables and plots. At these sizes times mean nothing."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import hypenet_kernels as kernels
from bench import __main__ as command
from bench import (
    cases,
    check,
    compare,
    model,
    ops,
    peers,
    plot,
    records,
    report,
    roofline,
    tables,
    targets,
    timing,
)
from bench.peers import PEERS

HEADS = {"B": 1, "H": 2, "K": 32, "V": 32}
ATTENTION = {"B": 1, "H": 2, "HK": 1, "D": 32}
TINY = [
    cases.Case("chunk_gated_delta_rule", {"T": 40, **HEADS}, quick=True),
    cases.Case("chunk_gated_delta_rule", {"T": 40, **HEADS}, backward=True),
    cases.Case("chunk_simple_gla", {"T": 40, **HEADS}, "bfloat16", backward=True),
    cases.Case("chunk_simple_gla", {"T": 40, **HEADS, "split": 1}),
    cases.Case("gated_delta_step", HEADS),
    cases.Case("simple_gla_step", HEADS),
    cases.Case("hype_attention", {"T": 40, **ATTENTION, "gated": 1}, backward=True),
    cases.Case("hype_attention_decode", {"S": 40, **ATTENTION}),
]


REAL_CASES = dict(cases.CASES)


def shrink(patch):
    patch.setitem(cases.CASES, "cpu", TINY)
    patch.setattr(cases, "ROTATED_BYTES", 2**14)
    patch.setitem(roofline.BUFFER_BYTES, "cpu", 2**20)
    patch.setitem(roofline.MATRIX, "cpu", 64)
    for name in ("SECONDS", "QUICK_SECONDS"):
        patch.setattr(ops, name, 0.01)
    for name in PEERS.keys() - {"transformers", "torch SDPA"}:
        patch.delitem(PEERS, name)


@pytest.fixture(autouse=True, scope="module")
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        yield


def run(*arguments, expect=0):
    result = CliRunner().invoke(command.app, [str(argument) for argument in arguments])
    assert result.exit_code == expect, result.output
    return result.output


@pytest.fixture(scope="module")
def ops_json(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ops")
    run("ops", "--device", "cpu", "--out", folder / "ops.json", "--csv", folder / "ops.csv")
    return folder / "ops.json"


def test_ops_are_timed_beside_their_peers(ops_json):
    record = records.load(ops_json)
    assert [row["name"] for row in record["rows"]] == [case.name for case in TINY]
    assert all(row["ours"]["low"] <= row["ours"]["median"] <= row["ours"]["high"] for row in record["rows"])
    assert all(row["fraction"] > 0 and row["bound"] in ("compute", "memory") for row in record["rows"])
    timed = {row["op"]: set(row["peers"]) for row in record["rows"] if all("ratio" in p for p in row["peers"].values())}
    assert timed["chunk_gated_delta_rule"] == timed["gated_delta_step"] == {"transformers"}
    assert timed["hype_attention"] == timed["hype_attention_decode"] == {"torch SDPA"}
    stamp = record["stamp"]
    assert stamp["device"] and stamp["date"] and stamp["commit"] and stamp["versions"]["torch"] == torch.__version__
    assert record["roofs"]["copy"] > 0 and record["roofs"]["matmul"]["float32"] > 0
    lines = ops_json.with_suffix(".csv").read_text().splitlines()
    assert len(lines) == 1 + len(TINY) + sum(len(row["peers"]) for row in record["rows"])


def test_names_dtype_and_quick_select(tmp_path):
    out = tmp_path / "some.json"
    run("ops", "simple_gla_step", "gated_delta_step", "--device", "cpu", "--out", out)
    assert [row["op"] for row in records.load(out)["rows"]] == ["gated_delta_step", "simple_gla_step"]
    assert ops.select([], "cpu", quick=True) == TINY[:1]
    assert ops.select([], "cpu", dtype="bfloat16") == TINY[2:3]
    with pytest.raises(ValueError, match=r"NAME must be one of .*, got softmax"):
        ops.select(["softmax"], "cpu")
    with pytest.raises(ValueError, match="--dtype must be one of bfloat16, float32, got float8"):
        ops.select([], "cpu", dtype="float8")


def test_wrong_op_is_not_timed(tmp_path, monkeypatch):
    right = kernels.chunk_gated_delta_rule
    monkeypatch.setattr(kernels, "chunk_gated_delta_rule", lambda *inputs: (1.1 * right(*inputs)[0], None))
    run("ops", "chunk_gated_delta_rule", "--device", "cpu", "--out", tmp_path / "ops.json", expect=1)
    for row in records.load(tmp_path / "ops.json")["rows"]:
        assert row["ours"] is None and "relative difference 1.0e-01" in row["failure"]


def test_wrong_gradient_is_not_timed(monkeypatch):
    right = kernels.chunk_gated_delta_rule

    def wrong(q, k, v, g, beta):
        return right(q, k, v.detach() + 1.1 * (v - v.detach()), g, beta)

    monkeypatch.setattr(kernels, "chunk_gated_delta_rule", wrong)
    assert check.check(TINY[0], "cpu") is None
    assert "relative difference" in check.check(TINY[1], "cpu")


def test_op_that_raises_does_not_stop_the_others(monkeypatch):
    def refuse(*inputs):
        raise NotImplementedError("simple_gla_step: not built")

    monkeypatch.setattr(kernels, "simple_gla_step", refuse)
    rows = ops.run(["simple_gla_step", "gated_delta_step"], "cpu")["rows"]
    assert rows[0]["ours"] is not None and rows[0]["failure"] is None
    assert rows[1]["ours"] is None and rows[1]["failure"] == "NotImplementedError: simple_gla_step: not built"


def test_peer_is_timed_only_if_it_agrees(monkeypatch):
    def wrong(case, x):
        return lambda: (torch.zeros(1, 40, 2, 32),)

    def broken(case, x):
        raise RuntimeError("no such kernel\nand a long story")

    def missing(case, x):
        raise ModuleNotFoundError

    def without_form(case, x):
        return None

    for peer in (wrong, broken, missing, without_form):
        monkeypatch.setitem(PEERS, peer.__name__, peer)
    (row,) = ops.run(["chunk_gated_delta_rule"], "cpu", quick=True)["rows"]
    assert row["ours"] is not None and set(row["peers"]) == {"transformers", "wrong", "broken"}
    assert "different result" in row["peers"]["wrong"]["error"] and "median" not in row["peers"]["wrong"]
    assert row["peers"]["broken"]["error"] == "RuntimeError: no such kernel"


def test_interrupted_run_keeps_what_it_measured(tmp_path):
    def stop(record):
        records.save(tmp_path / "ops.json", record)
        if len(record["rows"]) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ops.run([], "cpu", save=stop)
    rows = records.load(tmp_path / "ops.json")["rows"]
    assert rows[0]["ours"] is not None and [row["name"] for row in rows if "unfinished" in row] == [TINY[1].name]


DISASTERS = """
import os, pathlib, sys, time
import pytest
import test_bench
from bench import cases, ops, supervise
import hypenet_kernels

patch = pytest.MonkeyPatch()
test_bench.shrink(patch)
chosen = [case for case in test_bench.TINY if case.quick or case.op.endswith("_step")]
patch.setitem(cases.CASES, "cpu", chosen)
patch.delattr(hypenet_kernels, "simple_gla_step")


def crashes(case, x):
    if case.op == "chunk_gated_delta_rule":
        os.abort()
    supervise.STEP_SECONDS = 1  # for the next peer, which hangs


def hangs(case, x):
    if case.op == "gated_delta_step":
        time.sleep(600)


def refuses(case, x):
    supervise.STEP_SECONDS = 60
    sys.exit("no such GPU")


for peer in (crashes, hangs, refuses):
    patch.setitem(ops.PEERS, peer.__name__, peer)
device, out, *flags = sys.argv[1:]
main = lambda *given: supervise.main(*given, command=[sys.executable, __file__])
start = supervise.work if "--work" in flags else main
sys.exit(start(device, pathlib.Path(out), *flags))
"""


def test_a_crash_or_hang_costs_one_number(tmp_path):
    """One peer crashes, one hangs, one of our ops is missing: each is named, and everything else is measured."""
    (tmp_path / "disasters.py").write_text(DISASTERS)
    command = [sys.executable, tmp_path / "disasters.py", "cpu", tmp_path / "ops.json"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (records.ROOT, records.ROOT / "tests")))}
    ran = subprocess.run(command, env=env, capture_output=True, text=True)
    record = records.load(tmp_path / "ops.json")
    chunk, step, wrong = record["rows"]
    assert chunk["ours"]["median"] > 0 and step["ours"]["median"] > 0 and not chunk["failure"] and not step["failure"]
    assert chunk["peers"].pop("crashes")["error"] == step["peers"].pop("hangs")["error"] == ops.ENDED
    assert chunk["peers"].pop("refuses") == step["peers"].pop("refuses") == {"error": "SystemExit: no such GPU"}
    assert set(chunk["peers"]) == set(step["peers"]) == {"transformers"} and chunk["peers"]["transformers"]["ratio"] > 0
    assert wrong["op"] == "simple_gla_step" and wrong["ours"] is None and wrong["failure"].startswith("AttributeError")
    assert not any("unfinished" in row for row in record["rows"])
    assert ran.returncode == 1 and ran.stderr.splitlines()[-1] == f"not timed: {wrong['name']}", ran.stderr


class Gpu:
    """A fake GPU: every call fails once it is `broken`."""

    broken = False

    def synchronize(self):
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nand advice")


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    monkeypatch.setattr(ops, "_is_cuda", lambda device: True)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    return gpu


def test_faulting_peer_does_not_invalidate_ours_and_ends_the_process(gpu, monkeypatch):
    def faults(case, x):
        gpu.broken = True
        gpu.synchronize()

    monkeypatch.setitem(PEERS, "faults", faults)
    saved = []
    save = lambda record: saved.append(json.loads(json.dumps(record)))  # noqa: E731
    with pytest.raises(ops.DeviceLost, match=r"faults, chunk_gated_delta_rule fwd.*illegal memory access"):
        ops.run(["chunk_gated_delta_rule"], "cpu", save=save)
    (row,) = saved[-1]["rows"]
    assert row["ours"]["median"] > 0 and row["failure"] is None and row["unfinished"]
    assert row["peers"]["faults"]["error"].endswith("an illegal memory access was encountered")
    gpu.broken = False  # a new process
    rows = ops.run(["chunk_gated_delta_rule"], "cpu", record=saved[-1])["rows"]
    assert rows[0]["ours"] == row["ours"] and "median" in rows[0]["peers"]["transformers"]
    assert "unfinished" not in rows[0] and "not tried again" in rows[1]["peers"]["faults"]["error"]


def test_faulting_op_is_not_tried_again(gpu, monkeypatch):
    def faults(*inputs):
        gpu.broken = True
        gpu.synchronize()

    monkeypatch.setattr(kernels, "simple_gla_step", faults)
    saved = []
    with pytest.raises(ops.DeviceLost):
        ops.run(["simple_gla_step"], "cpu", save=saved.append)
    gpu.broken = False
    (row,) = ops.run(["simple_gla_step"], "cpu", record=saved[-1])["rows"]
    assert row["ours"] is None and "illegal memory access" in row["failure"]


def test_interrupted_step_is_undone_in_the_record(monkeypatch):
    def stopped(case, x):
        raise KeyboardInterrupt

    monkeypatch.setitem(PEERS, "stopped", stopped)
    saved = []
    with pytest.raises(KeyboardInterrupt):
        ops.run(["simple_gla_step"], "cpu", save=saved.append)
    (row,) = saved[-1]["rows"]
    assert row["failure"] is None and "stopped" not in row["peers"] and row["unfinished"]


def test_record_of_another_commit_is_not_resumed(ops_json):
    record = records.load(ops_json)
    assert ops.run([], "cpu", record=record)["rows"] == record["rows"]
    record["stamp"]["commit"] = "0123abc"
    with pytest.raises(ValueError, match="must be of"):
        ops.run([], "cpu", record=record)


def test_non_finite_result_is_not_timed(monkeypatch):
    right = kernels.chunk_gated_delta_rule
    long = lambda q, *inputs: right(q if q.shape[1] == cases.SHRUNK_TOKENS else q * float("nan"), *inputs)  # noqa: E731
    monkeypatch.setattr(kernels, "chunk_gated_delta_rule", long)
    (row,) = ops.run(["chunk_gated_delta_rule"], "cpu", quick=True)["rows"]
    assert row["ours"] is None and "must be finite" in row["failure"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_shrunk_case_keeps_head_dimensions_groups_and_options(device):
    for case in REAL_CASES[device]:
        small = cases.shrunk(case)
        same = ("K", "V", "D", "gated", "split")
        assert [small.sizes.get(name) for name in same] == [case.sizes.get(name) for name in same]
        for heads, kv_heads in (("HV", "H"), ("H", "HK")):
            if heads in case.sizes and kv_heads in case.sizes:
                ratios = [x.sizes[heads] / x.sizes[kv_heads] for x in (case, small)]
                assert ratios[0] == ratios[1]


@pytest.mark.parametrize(
    ("chunk", "delta", "backward", "thousands"),
    [(16, True, 0, 106), (32, True, 0, 115), (64, True, 0, 131), (64, False, 0, 82), (64, True, 1, 131 + 320)],
)
def test_flops_per_token_and_head(chunk, delta, backward, thousands):
    """K = V = 128; triangular products count half, except one C x C x K product in the backward of the delta rule."""
    flops = cases.chunk_flops({"B": 1, "T": 1, "H": 1, "K": 128, "V": 128}, chunk, delta, backward)
    assert round(flops / 1000) == thousands


def test_bytes_count_each_input_and_output_once():
    def moved(workload, outputs):
        return sum(x.nbytes for x in workload.tensors.values() if torch.is_tensor(x)) + outputs

    case = cases.Case("chunk_gated_delta_rule", {"T": 40, "B": 2, "H": 1, "HV": 2, "K": 32, "V": 16}, "bfloat16")
    workload = cases.build(case, "cpu")
    assert workload.bytes == moved(workload, workload.run()[0].nbytes)
    case = cases.Case("hype_attention", {"T": 40, **ATTENTION, "gated": 1}, "bfloat16")
    workload = cases.build(case, "cpu")
    assert workload.bytes == moved(workload, workload.run()[0].nbytes)
    workload = cases.build(cases.Case("gated_delta_step", HEADS, "bfloat16"), "cpu")
    state = workload.tensors["states"][0].nbytes
    assert workload.bytes == moved(workload, workload.run()[0].nbytes) + 2 * state
    workload = cases.build(cases.Case("hype_attention_decode", {"S": 40, **ATTENTION}, "bfloat16"), "cpu")
    lengths = workload.tensors["cache_seqlens"].nbytes
    assert workload.bytes == moved(workload, workload.run()[0].nbytes) - lengths


def test_decode_rotates_through_copies():
    """Every call uses another copy until all have been used."""
    workload = cases.build(cases.Case("hype_attention_decode", {"S": 40, **ATTENTION}), "cpu")
    sizes = [k.nbytes + v.nbytes for k, v in workload.tensors["caches"]]
    assert 0.5 * cases.ROTATED_BYTES <= sum(sizes) <= cases.ROTATED_BYTES
    step = cases.build(cases.Case("gated_delta_step", HEADS), "cpu")
    assert len(step.tensors["states"]) > 1
    assert len(cases.build(cases.Case("gated_delta_step", {**HEADS, "cached": 1}), "cpu").tensors["states"]) == 1
    before = [state.clone() for state in step.tensors["states"]]
    for _ in before:
        step.run()
    assert not any(torch.equal(old, new) for old, new in zip(before, step.tensors["states"], strict=True))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_op_is_measured(device):
    known = REAL_CASES[device]
    assert {case.op for case in known} == set(cases.BUILDERS) and len({case.name for case in known}) == len(known)
    assert {case.op for case in known if case.quick} == set(cases.BUILDERS)


def test_fraction_is_of_the_binding_roof():
    roofs = roofline.Roofs(copy=1e9, read=2e9, matmul={"float32": 1e12})
    assert roofs.seconds(1e12, 1e9, "float32") == 1.0 and roofs.bound(1e12, 1e9, "float32") == "compute"
    assert roofs.seconds(1e10, 4e9, "float32") == 2.0 and roofs.bound(1e10, 4e9, "float32") == "memory"


def test_stamp_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert records.stamp("cpu")["commit"] == ""
    monkeypatch.setenv("COMMIT", "0123abc")
    assert records.stamp("cpu")["commit"] == "0123abc"


def test_ours_and_peers_are_interleaved():
    order = []
    functions = {name: lambda name=name: order.append(name) for name in ("ours", "theirs")}
    times = timing.measure(functions, "cpu", 0.001)
    assert {"ours", "theirs"} == set(times) and order[-1] == "theirs"
    assert times["ours"].rounds == times["theirs"].rounds >= timing.MIN_ROUNDS
    assert timing.summary([4.0, 1.0, 2.0, 3.0, 5.0]) == timing.Timing(3.0, 2.0, 4.0, 5)


def test_latency_is_shown_if_it_is_longer_than_the_kernel():
    assert tables.time_of({"median": 0.0123, "latency": 0.0456}) == "12.3 µs (call 45.6 µs)"
    assert tables.time_of({"median": 12.34, "latency": 12.5}) == tables.time_of({"median": 12.34, "latency": None})


def test_change_within_the_spread_is_no_change():
    def record(**medians):
        rows = [
            {"name": name, "ours": {"median": ms, "low": 0.9 * ms, "high": 1.1 * ms}} for name, ms in medians.items()
        ]
        return {"kind": "ops", "rows": rows}

    changes, alone = compare.compare(record(a=1.0, b=1.0, c=1.0, d=1.0), record(a=1.1, b=2.0, c=0.5, e=1.0))
    assert [(change.name, change.verdict) for change in changes] == [
        ("a", "no change"),
        ("b", "slower"),
        ("c", "faster"),
    ]
    assert changes[2].ratio == 2 and alone == ["d", "e"]


def test_compare_reads_records(ops_json):
    printed = run("compare", ops_json, ops_json)
    assert printed.count("no change") == len(TINY)


@pytest.fixture
def small_model(monkeypatch):
    widths = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    monkeypatch.setitem(model.WIDTHS, "cpu", widths | {"head_dim": 16, "vocab_size": 64})
    monkeypatch.setattr(model, "COMMON", model.COMMON | widths | {"head_dim": 16, "vocab_size": 64})
    monkeypatch.setattr(model, "LAYERS", 4)
    monkeypatch.setattr(model, "IMPORTS", {"transformers": "import json", "hypenet": "import json"})  # seconds less
    for lengths in (model.QUICK_LENGTHS, model.LENGTHS):
        monkeypatch.setitem(lengths, "cpu", (64, 128))
    monkeypatch.setitem(model.PREFILL_LENGTHS, "cpu", (128,))


def test_model_is_measured_against_its_teacher(tmp_path, small_model):
    run("model", "--device", "cpu", "--quick", "--out", tmp_path / "model.json")
    record = records.load(tmp_path / "model.json")
    assert all(0 < record["import_s"][package] < 5 for package in ("transformers", "hypenet"))
    rows = record["rows"]
    assert [(row["dtype"], row["length"], row["model"]) for row in rows] == [
        (dtype, length, name)
        for dtype in ("bfloat16", "float32")
        for length in (64, 128)
        for name in ("Qwen3", "HypeNet")
    ]
    assert all((row["prefill_s"] is None) == (row["length"] == 64) for row in rows)
    cache = {(row["model"], row["length"]): row["cache_bytes"] for row in rows if row["dtype"] == "float32"}
    growth = {name: cache[name, 128] - cache[name, 64] for name in ("Qwen3", "HypeNet")}
    assert 0 < growth["HypeNet"] < growth["Qwen3"]  # one softmax layer of four
    assert all(row["decode_low_ms"] <= row["decode_ms"] <= row["decode_high_ms"] for row in rows)


def test_models_are_compared_in_their_faster_dtype():
    def row(name, dtype, prefill, decode, cache):
        return {
            "model": name,
            "dtype": dtype,
            "length": 64,
            "prefill_s": prefill,
            "decode_ms": decode,
            "cache_bytes": cache,
        }

    rows = [row("Qwen3", "bfloat16", 9, 4, 100), row("Qwen3", "float32", 6, 5, 200)]
    rows += [row("HypeNet", "bfloat16", None, 2, 30), row("HypeNet", "float32", 4, 3, 60)]
    assert tables.student_cells({"rows": rows}) == [["64", "1.50", "2.00", "30"]]
    rows[3]["prefill_s"] = None
    assert tables.student_cells({"rows": rows}) == [["64", "", "2.00", "30"]]


def test_results_and_plots_come_from_the_records(tmp_path, ops_json, small_model, monkeypatch):
    results = tmp_path / "bench" / "results"
    (results / "some-device").mkdir(parents=True)
    shutil.copy(ops_json, results / "some-device" / "ops.json")
    run("model", "--device", "cpu", "--out", results / "some-device" / "model.json")
    (results / "facts.md").write_text("## Measured facts\n\n- one\n")
    text = report.write(results, tmp_path / "RESULTS.md").read_text()
    for picture in ("roofline", "speed", "context"):
        assert f"![{picture}](bench/results/some-device/{picture}.png)" in text
        assert (results / "some-device" / f"{picture}.png").stat().st_size > 1000
    assert all(case.name in text for case in TINY) and "HypeNet" in text and text.rstrip().endswith("- one")
    monkeypatch.setattr(records, "RESULTS", results)
    printed = run("plot", results / "some-device")
    assert "roofline.png" in printed


def test_wrong_usage_exits_with_1(tmp_path):
    result = CliRunner().invoke(command.app, ["ops", "softmax", "--device", "cpu", "--out", str(tmp_path / "x.json")])
    assert result.exit_code == 1 and not (tmp_path / "x.json").exists()
    result = CliRunner().invoke(command.app, ["plot", str(tmp_path)])
    assert result.exit_code == 1


def test_records_are_plain_json(ops_json):
    assert json.loads(ops_json.read_text()) == records.load(ops_json)
    assert records.folder("cpu").parent == records.RESULTS


def test_peers_of_attention_take_gate_and_scale():
    case = cases.Case("hype_attention", {"T": 40, **ATTENTION, "gated": 1})
    workload = cases.build(case, "cpu")
    (o,) = peers.torch_sdpa(case, workload.tensors)()
    assert check.relative_error(o, workload.run()[0]) < 1e-5


def test_bandwidth_is_measured_beside_every_case_that_it_bounds(monkeypatch):
    rates = iter(({"copy": 1e9, "read": 3e9}, {"copy": 2e9, "read": 5e9}))
    monkeypatch.setattr(ops, "NOT_SMALL", 0)
    monkeypatch.setattr(roofline, "memory", lambda *_: next(rates))
    record = {"roofs": {"copy": 1.0, "read": 1.0, "matmul": {"float32": 1e15}}, "rows": [], "checks": {}}
    row = {"ours": None, "peers": {}, "failure": None}
    case = cases.Case("gated_delta_step", HEADS)
    ops.Measurement(row, case, "cpu", 0.01, record, save=lambda record: None).time()
    assert row["memory"] == {"copy": 1.5e9, "read": 4e9}
    assert row["fraction"] == pytest.approx(1e3 * row["bytes"] / 4e9 / row["ours"]["median"])
    assert "of memory's 4 GB/s" in tables.op_cells({"name": case.name, **row})[4]


def test_targets_name_cases_that_are_measured():
    known = {case.name for case in REAL_CASES["cpu"]}
    assert targets.TARGETS
    assert all(case.name in known for target in targets.TARGETS for case in (*target.cases, *target.against))


def test_targets_of_a_record():
    name = "hype_attention_decode fwd B={} S=32768 H=32 HK=8 D=128 float32"
    measured = {"bytes": 4e6, "ours": {"median": 1.0}, "memory": {"copy": 8e9, "read": 1e9}, "peers": {}}
    rows = [{"name": name.format(B)} | measured | {"bytes": bytes} for B, bytes in ((1, 4e6), (8, 7e6))]
    record = {"stamp": {"threads": 2}, "rows": rows}

    def decode(record):
        found = targets.cells(record)
        assert len(found) == len(targets.TARGETS)
        return [cells for cells in found if cells[0] == "HyPE decode, 32k keys, batch 1, 8"]

    assert decode(record) == [["HyPE decode, 32k keys, batch 1, 8", "80 % of a copy", "50, 87.5", "1 of 2"]]
    assert decode(record | {"rows": rows[:1]})[0][2:] == ["50, not measured", "no"]
    no_peer = targets.Target("x", [cases.Case("simple_gla_step", HEADS)], 2, "x peer", targets._over("peer"))
    row = {"name": no_peer.cases[0].name, "peers": {"peer": {"error": "crashed"}}}
    assert no_peer.cells({row["name"]: row})[2:] == ["not measured", "no"]
    assert targets.cells(record | {"stamp": {"threads": None}}) == []


def test_overview_is_drawn_from_the_records(tmp_path, small_model):
    run("model", "--device", "cpu", "--out", tmp_path / "some-device" / "model.json")
    assert plot.draw_overview(tmp_path) is None
    (tmp_path / "demo").mkdir()
    shutil.copy(records.RESULTS / "demo" / "demo.json", tmp_path / "demo")
    assert plot.draw_overview(tmp_path) == tmp_path / "overview.png"
    assert (tmp_path / "overview.png").stat().st_size > 1000
