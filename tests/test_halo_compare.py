"""`halo compare` shows what differs between runs, whatever state they are in."""

import json
import shutil

import pytest
import torch
import yaml
from halo_tiny import config_tree, write_inputs
from typer.testing import CliRunner

from halo import files
from halo.cli import app
from halo.compare import compare
from halo.compute import Compute
from halo.config import make_config
from halo.pipeline import Pipeline
from halo.settings import HaloError


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run, one that was stopped after align, and one of which only the configuration is there."""
    directory = tmp_path_factory.mktemp("runs")
    write_inputs(directory)
    compute = Compute(torch.device("cpu"))
    whole = Pipeline(make_config(config_tree(directory, "whole")), compute)
    whole.run()
    tree = config_tree(directory, "part")
    tree["align"] = tree["align"] | {"steps": 6}
    part = Pipeline(make_config(tree), compute, whole)
    for stage in ("transfer", "calibrate", "align"):
        part.run_stage(stage)
    started = directory / "started"
    started.mkdir()
    (started / files.CONFIG).write_text(yaml.safe_dump(make_config(config_tree(directory)).model_dump(mode="json")))
    return directory / "whole", directory / "part", started


def rows(found, heading):
    return {row.title: row.values for row in found.get(heading, [])}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("calibrate/calibration.json", '{"parts": ["decay"], "layers": [{}]}'),
        ("scale/scale.json", '{"a": 3, "grid": [7]}'),
    ],
)
def test_damaged_records_name_their_run(runs, tmp_path, file, content):
    run = shutil.copytree(runs[0], tmp_path / "run")
    (run / file).write_text(content)
    with pytest.raises(
        HaloError, match=rf"^{run}: must be whole, got .*; its record of (calibration|scale) is damaged"
    ):
        compare([runs[0], run])


def test_settings_that_differ_and_no_others(runs):
    assert rows(compare(runs[:2]), "settings") == {"align.steps": ["4", "6"]}


def test_numbers_are_those_of_the_files(runs):
    whole, part, _ = runs
    found = compare(runs)
    training = rows(found, "training")
    last = {run: json.loads((run / "align" / files.METRICS).read_text().splitlines()[-1]) for run in (whole, part)}
    assert training["align steps"] == ["4", "6", None]
    assert training["align tokens"] == [f"{4 * 2 * 48}", f"{6 * 2 * 48}", None]
    assert training["align loss"] == [f"{last[whole]['loss']:.4g}", f"{last[part]['loss']:.4g}", None]
    assert training["distill loss"][0] is not None and training["distill loss"][1:] == [None, None]
    selection = json.loads((whole / "select" / files.SELECTION).read_text())
    assert rows(found, "layers")["softmax layers"] == [json.dumps(selection["layers"]), None, None]
    assert rows(found, "layers")["policy"] == ["position", None, None]
    scale = json.loads((whole / "scale" / files.SCALE).read_text())
    assert rows(found, "scale")["a"][0] == ("none" if scale["a"] is None else f"{scale['a']:.4g}")
    done = json.loads((part / "align" / files.DONE).read_text())
    assert float(rows(found, "seconds")["align"][1].replace(",", "")) == pytest.approx(done["seconds"], rel=1e-3)


def test_evaluation_has_a_row_per_model_length_and_measure(runs):
    evaluation = rows(compare(runs), "evaluation")
    results = json.loads((runs[0] / "eval" / files.RESULTS).read_text())["rows"]
    assert any(row["model"] == "converted" for row in results)
    for row in results:
        values = evaluation[f"{row['model']}, recall, {row['length']} tokens"]
        assert values[0].split()[0] == f"{row['recall']:.3f}" and values[1:] == [None, None]
    assert next(iter(evaluation)).startswith("converted, ")


def test_command(runs):
    printed = CliRunner().invoke(app, ["compare", *map(str, runs)])
    assert printed.exit_code == 0
    lines = printed.stdout.splitlines()
    assert lines[0].split() == ["whole", "part", "started"]
    assert ["align.steps", "4", "6", "4"] in [line.split() for line in lines]
    assert any(line.startswith("  distill loss") and line.endswith("-") for line in lines)


def test_line_that_is_being_written_is_left_out(runs, tmp_path):
    copies = [tmp_path / "a", tmp_path / "b"]
    for copy in copies:
        (copy / "align").mkdir(parents=True)
        (copy / files.CONFIG).write_text((runs[0] / files.CONFIG).read_text())
    (copies[0] / "align" / files.METRICS).write_text('{"step": 2, "loss": 0.5}\n{"step": 3, "lo')
    assert rows(compare(copies), "training")["align loss"] == ["0.5", None]
    assert "settings" not in compare(copies)


def test_mistakes_are_one_line(runs, tmp_path):
    with pytest.raises(HaloError, match="compare: must be given at least two directories, got 1"):
        compare(runs[:1])
    with pytest.raises(HaloError, match=r"must be the directory of a conversion \(it has no config.yaml\)"):
        compare([runs[0], tmp_path])
    damaged = tmp_path / "damaged"
    (damaged / "scale").mkdir(parents=True)
    (damaged / files.CONFIG).write_text((runs[0] / files.CONFIG).read_text())
    (damaged / "scale" / files.SCALE).write_text('{"a": ')
    with pytest.raises(HaloError, match=r"scale.json: must be readable JSON.*delete .*scale to run its stage again"):
        compare([runs[0], damaged])
