"""Results and checkpoints on disks that fill up, cut off, or left behind by a kill; weights that overflow last."""

import resource
import shutil
from contextlib import contextmanager

import pytest
import torch
from halo_tiny import config_tree, documents, tiny_teacher, write_inputs

from halo import files, models
from halo.checkpoint import Checkpoints
from halo.compute import Compute
from halo.config import make_config
from halo.pipeline import Pipeline
from halo.settings import HaloError
from halo.stages import STAGES

CPU = Compute(torch.device("cpu"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    write_inputs(directory)
    return directory


@contextmanager
def full_disk(size=4096):
    """Inside the context, no file can be longer than so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_checkpoint(directory):
    teacher = tiny_teacher(300)
    optimizer = torch.optim.AdamW(teacher.parameters())
    Checkpoints(directory, {}, CPU).save(teacher, optimizer, {"step": 1})


WRITES = {
    "mixers": lambda path: models.save_mixers(models.make_twins(tiny_teacher(300), "gdn").state_dict(), path),
    "model": lambda path: files.write_directory(path, tiny_teacher(300).save_pretrained),
    "json": lambda path: files.write_json(path, ["x" * 100] * 100),
    "checkpoint": save_checkpoint,
}


@pytest.mark.parametrize("name", WRITES)
def test_a_full_disk_is_one_line_and_leaves_nothing(name, tmp_path):
    path = tmp_path / "result"
    with full_disk(), pytest.raises(HaloError) as caught:
        WRITES[name](path)
    text = str(caught.value)
    assert text.startswith(str(path)) and text.endswith("free space and run the same command") and "\n" not in text
    assert [*tmp_path.rglob("*")] in ([], [path]) and not path.is_file() and not [*path.glob("*")]
    WRITES[name](path)
    assert path.exists()


def run_until(tree, last):
    for stage in STAGES[: STAGES.index(last) + 1]:
        Pipeline(make_config(tree)).run_stage(stage)


def none_written(state, path):
    raise KeyboardInterrupt


def test_a_checkpoint_that_is_cut_off_is_one_line_and_the_one_before_serves(inputs, tmp_path, monkeypatch, capsys):
    tree = config_tree(inputs) | {"out": str(tmp_path / "out")}
    tree["align"] = tree["align"] | {"checkpoint_every": 1}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        run_until(tree, "calibrate")
        patch.setattr("halo.models.save_mixers", none_written)
        run_until(tree, "align")
    last = tmp_path / "out" / "align" / "checkpoints" / "step-4"
    (weights,) = last.glob("*.distcp")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(HaloError) as caught:
        run_until(tree, "align")
    text = str(caught.value)
    assert text.startswith(f"{last}: must be whole, got ") and "\n" not in text
    assert text.endswith(f"delete it to continue from the one before, or delete {last.parents[1]} to start again")
    (last / "checkpoint.json").write_text("{}")
    with pytest.raises(
        HaloError, match=r"checkpoint.json: must hold identity and world, got \[\]; delete it to continue"
    ):
        run_until(tree, "align")
    files.remove(last)
    run_until(tree, "align")
    assert "align: continues after step 3" in capsys.readouterr().out


def test_text_that_changes_inside_a_stage_is_noticed(inputs, tmp_path, monkeypatch):
    """The stages before tell first; where they were run again, the checkpoint itself does."""
    shutil.copytree(inputs / "text", tmp_path / "text")
    tree = config_tree(inputs) | {"out": str(tmp_path / "out")}
    tree["data"] = tree["data"] | {"source": str(tmp_path / "text")}
    tree["align"] = tree["align"] | {"checkpoint_every": 2}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        run_until(tree, "calibrate")
        patch.setattr("halo.models.save_mixers", none_written)
        run_until(tree, "align")
    (tmp_path / "text" / "new.txt").write_text(documents(seed=9)[0])
    with pytest.raises(HaloError, match=r"was made with other settings .data.fingerprint: "):
        Pipeline(make_config(tree)).run_stage("align")
    for stage in ("transfer", "calibrate"):
        files.remove(tmp_path / "out" / stage)
    run_until(tree, "calibrate")
    with pytest.raises(HaloError, match=r"step-4: comes from another run .data.fingerprint: "):
        Pipeline(make_config(tree)).run_stage("align")
    files.remove(tmp_path / "out" / "align")
    Pipeline(make_config(tree)).run_stage("align")


@pytest.mark.parametrize(("minutes", "expected"), [(1e-9, [1, 2, 3, 4]), (60.0, [4])])
def test_checkpoints_follow_the_clock_and_the_last_step_has_one(inputs, tmp_path, monkeypatch, minutes, expected):
    steps, save = [], Checkpoints.save

    def recorded(self, module, optimizer, record, wait=False):
        steps.append(record["step"])
        save(self, module, optimizer, record, wait)

    monkeypatch.setattr(Checkpoints, "save", recorded)
    tree = config_tree(inputs) | {"out": str(tmp_path / "out")}
    tree["align"] = tree["align"] | {"checkpoint_minutes": minutes}
    run_until(tree, "align")
    assert steps == expected


def test_checkpoints_that_a_kill_left_behind_a_finished_stage_are_removed(inputs, tmp_path):
    tree = config_tree(inputs) | {"out": str(tmp_path / "out")}
    run_until(tree, "align")
    (tmp_path / "out" / "align" / "checkpoints" / "step-4").mkdir(parents=True)
    run_until(tree, "align")
    assert not (tmp_path / "out" / "align" / "checkpoints").exists()


@pytest.mark.parametrize("log_every", [1, 100])
def test_weights_that_overflow_in_the_last_step_are_no_result(inputs, tmp_path, log_every):
    """The loss and the gradient of the step are finite; the weights after it are not."""
    tree = config_tree(inputs) | {"out": str(tmp_path / "out")}
    tree["align"] = tree["align"] | {"steps": 1, "warmup": 0, "learning_rate": 1e39, "log_every": log_every}
    run_until(tree, "transfer")
    for _ in range(2):
        with pytest.raises(HaloError, match="align: weights must stay finite, got infinity or NaN at step 1"):
            run_until(tree, "align")
        assert not (tmp_path / "out" / "align" / "done.json").exists()
        assert not [*(tmp_path / "out" / "align" / "checkpoints").glob("*")]
