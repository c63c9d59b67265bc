"""What a later stage would miss is listed, all of it, before the first stage begins."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import yaml
from halo_tiny import config_tree, documents, write_inputs
from typer.testing import CliRunner

from halo.cli import app
from halo.config import make_config
from halo.footprint import Sizes, host_bytes
from halo.hardware import this_machine
from halo.pipeline import Pipeline
from halo.preflight import _shortfalls
from halo.settings import HaloError


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    write_inputs(directory)
    return directory


def shortfalls(tree):
    with pytest.raises(HaloError) as caught:
        Pipeline(make_config(tree)).run()
    return str(caught.value)


def changed(inputs, tmp_path, **sections):
    tree = config_tree(inputs) | {"out": str(tmp_path / "out")}
    for name, change in sections.items():
        tree[name] = tree.get(name, {}) | change if isinstance(change, dict) else change
    return tree


def test_every_shortfall_is_listed_at_once(inputs, tmp_path):
    tree = changed(
        inputs,
        tmp_path,
        select={"keep": 9, "recall_length": 40, "language_length": 100_000},
        scale={"length": 100_000},
        eval={"length": 30},
        finetune={"length": 1_000_000},
        align={"batch": 6, "micro_batch": 3, "needle_ratio": 1.0, "length": 20},
    )
    head, *lines = shortfalls(tree).splitlines()
    assert head.endswith(f"{len(lines)} things are missing for the whole conversion")
    expected = (
        "select.keep: must be at most the teacher's 3 layers, got 9",
        "align: ",
        "select.recall_length: must be at least",
        "select.language_length: must leave 2 chunks of held-out text, got 100000 tokens of",
        "finetune: data",
        "scale.length: must leave 2 samples of held-out text, got 100000 tokens of",
        "eval.length: must be at least",
    )
    assert len(lines) == len(expected)
    assert all(line.strip().startswith(start) for line, start in zip(lines, expected, strict=True)), lines
    assert not (tmp_path / "out" / "transfer").exists()


def test_an_architecture_that_does_not_fit_the_teacher(inputs, tmp_path):
    text = shortfalls(changed(inputs, tmp_path, architecture={"lightning_nkv": 3}))
    assert text == "architecture: HypeNetConfig: lightning_nh must be a multiple of lightning_nkv, got 4 and 3"


def test_a_conversion_that_lacks_nothing_starts(inputs, tmp_path):
    Pipeline(make_config(changed(inputs, tmp_path, align={"steps": 0}))).run_stage("transfer")
    assert (tmp_path / "out" / "transfer" / "done.json").exists()


def test_even_layers_need_no_held_out_text(inputs, tmp_path):
    text = shortfalls(
        changed(inputs, tmp_path, select={"policy": "uniform", "language_length": 10**6}, eval={"length": 9})
    )
    assert "select" not in text and text.startswith("eval.length: must be at least")


def test_processes_must_divide_the_batches(inputs, tmp_path):
    from halo import preflight

    config = make_config(changed(inputs, tmp_path, align={"batch": 6, "micro_batch": 2}))
    job = SimpleNamespace(config=config, compute=SimpleNamespace(world=3))
    assert list(preflight._batches(job)) == [
        "distill.batch: must be a multiple of the 3 processes, got 2",
        "finetune.batch: must be a multiple of the 3 processes, got 2",
    ]
    job.compute.world = 2
    assert list(preflight._batches(job)) == [
        "align.micro_batch: must divide each process's 3 sequences, got 2",
    ]


def test_gates_need_samples_that_the_processes_can_share(inputs, tmp_path):
    from halo import preflight

    select = {
        "policy": "joint",
        "joint_batch": 6,
        "joint_micro_batch": 2,
        "joint_length": 20,
        "joint_needle_ratio": 1.0,
    }
    tree = changed(inputs, tmp_path, select=select)
    assert shortfalls(tree).startswith("select: ") and "20" in shortfalls(tree)
    job = SimpleNamespace(config=make_config(changed(inputs, tmp_path, select=select)))
    job.compute = SimpleNamespace(world=2)
    assert list(preflight._batches(job)) == ["select.joint_micro_batch: must divide each process's 3 sequences, got 2"]
    job.compute.world = 4
    assert "select.joint_batch: must be a multiple of the 4 processes, got 6" in list(preflight._batches(job))


def test_full_disk_and_small_memory_are_found(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    text = shortfalls(changed(inputs, tmp_path))
    assert "out: must have 0.0 GiB of free space for checkpoints and models, got 0.0 GiB" in text
    assert "device: must hold 0.0 GiB of weights, gradients and optimizer state" in text
    assert "memory: must hold 0.0 GiB of models while the 1 processes of a node build them" in text


def test_main_memory_for_building_models_is_counted(inputs, tmp_path, monkeypatch):
    """On any device every process of a node builds the student on the CPU, beside the teacher's stored weights."""
    job = Pipeline(make_config(changed(inputs, tmp_path))).job
    sizes = Sizes.of(job.teacher_config, "lightning", [0])
    needed = host_bytes(sizes, 4, 1, this_machine(job.compute))
    assert needed > 4 * (sizes.teacher.parameters + sizes.student.parameters)
    monkeypatch.setattr("halo.preflight.main_memory", lambda: needed)
    assert not any(line.startswith("memory") for line in _shortfalls(job))
    monkeypatch.setattr("halo.preflight.main_memory", lambda: needed - 1)
    text = shortfalls(changed(inputs, tmp_path))
    assert text.startswith("memory: must hold 0.0 GiB of models") and text.endswith("start fewer processes on a node")


def halo(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_output_that_is_a_file_is_one_line(inputs, tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config_tree(inputs)))
    (tmp_path / "file").write_text("")
    result = halo("convert", "--config", tmp_path / "c.yaml", "--out", tmp_path / "file")
    assert result.exit_code == 2 and f"{tmp_path / 'file'}" in result.stderr and "must be writable" in result.stderr
    assert "Traceback" not in result.stderr


def test_two_runs_in_one_folder_are_refused(inputs, tmp_path):
    import fcntl

    tree = changed(inputs, tmp_path)
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4711")
        lock.flush()
        with pytest.raises(HaloError, match="out: must not be in use by another run, got process 4711"):
            Pipeline(make_config(tree)).run_stage("transfer")
    Pipeline(make_config(tree)).run_stage("transfer")


def test_a_run_keeps_others_out_before_it_reads_anything(inputs, tmp_path):
    """Two runs once tokenised into one folder at the same time, and each deleted what the other was writing."""
    import fcntl

    tree = changed(inputs, tmp_path)
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(HaloError, match="out: must not be in use by another run"):
            Pipeline(make_config(tree)).run()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_a_single_stage_is_refused_for_what_a_later_one_misses(inputs, tmp_path):
    tree = changed(inputs, tmp_path, scale={"length": 100_000}, eval={"length": 30})
    with pytest.raises(HaloError, match="2 things are missing for the whole conversion") as caught:
        Pipeline(make_config(tree)).run_stage("transfer")
    assert "scale.length" in str(caught.value) and "eval.length" in str(caught.value)


@pytest.fixture(scope="module")
def selected(inputs, tmp_path_factory):
    """The output of the stages up to select."""
    directory = tmp_path_factory.mktemp("selected")
    pipeline = Pipeline(make_config(changed(inputs, directory)))
    for stage in ("transfer", "calibrate", "align", "select"):
        pipeline.run_stage(stage)
    return directory / "out"


@pytest.fixture
def aligned(inputs, selected, tmp_path):
    """The configuration of such an output, a copy of it to change, and the latter."""
    return changed(inputs, tmp_path), shutil.copytree(selected, tmp_path / "out")


DAMAGES = {
    "empty done.json": ("select/done.json", b"", "must be readable JSON"),
    "done.json of another kind": ("select/done.json", b"[]", "must be a JSON object, got list"),
    "selection.json cut off": ("select/selection.json", b'{"layers": [0', "must be readable JSON"),
    "selection of missing layers": ("select/selection.json", b'{"layers": [7]}', "layers must be numbers below 3"),
    "weights cut off": ("align/mixers.safetensors", None, "must be whole"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_results_are_one_line_that_says_what_to_do(aligned, name):
    tree, out = aligned
    file, content, message = DAMAGES[name]
    path = out / file
    path.write_bytes(path.read_bytes()[:100] if content is None else content)
    with pytest.raises(HaloError) as caught:
        Pipeline(make_config(tree)).run_stage("distill")
    text = str(caught.value)
    assert str(path) in text and message in text and "\n" not in text
    assert f"delete {path.parent} to run its stage again" in text


@pytest.mark.parametrize(("name", "remedy"), [("mixers.safetensors", "align"), ("selection.json", "select")])
def test_results_that_are_gone_are_one_line(aligned, name, remedy):
    tree, out = aligned
    (out / remedy / name).unlink()
    with pytest.raises(HaloError) as caught:
        Pipeline(make_config(tree)).run_stage("distill")
    text = str(caught.value)
    assert str(out / remedy / name) in text and f"delete {out / remedy} to run its stage again" in text


def test_another_teacher_under_the_same_name_is_noticed(aligned, inputs):
    tree, _ = aligned
    path = inputs / "teacher" / "model.safetensors"
    before = path.read_bytes()
    try:
        path.write_bytes(before[:-4] + bytes(4))
        with pytest.raises(HaloError, match=r"was made with other settings .teacher_fingerprint: "):
            Pipeline(make_config(tree)).run_stage("distill")
    finally:
        path.write_bytes(before)


def test_changed_text_is_noticed(inputs, tmp_path):
    shutil.copytree(inputs / "text", tmp_path / "text")
    tree = changed(inputs, tmp_path, data={"source": str(tmp_path / "text")})
    Pipeline(make_config(tree)).run_stage("transfer")
    (tmp_path / "text" / "new.txt").write_text(documents(seed=9)[0])
    with pytest.raises(HaloError, match=r"was made with other settings .data.fingerprint: "):
        Pipeline(make_config(tree)).run_stage("calibrate")


def test_how_a_stage_is_computed_may_change_at_any_time(aligned):
    tree, _ = aligned
    how = {"micro_batch": 1, "log_every": 3, "checkpoint_minutes": 1.0, "checkpoint_every": 2, "held_out_every": None}
    tree = json.loads(json.dumps(tree))
    tree["align"] |= how
    tree["calibrate"] |= {"block": 5}
    tree["select"] |= {"batch": 3}
    tree["threads"] = 1
    pipeline = Pipeline(make_config(tree))
    for stage in ("transfer", "calibrate", "align", "select"):
        pipeline.run_stage(stage)


def test_output_that_cannot_be_made_is_listed_with_the_rest(inputs, tmp_path):
    (tmp_path / "file").write_text("")
    tree = changed(inputs, tmp_path, out=str(tmp_path / "file" / "out"), select={"keep": 9})
    text = shortfalls(tree)
    assert f"{tmp_path}/file/out: must be writable, got NotADirectoryError" in text and "select.keep" in text
    assert "free space" not in text and "choose another place" in text
