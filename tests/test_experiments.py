"""The experiments: every arm is a valid configuration, an arm runs, and tables follow the rows."""

import itertools
import json

import pytest
import yaml
from halo_tiny import config_tree, write_inputs

from bench.experiments import calibration, measure, runner, selection, stages, tables
from bench.experiments.__main__ import EXPERIMENTS
from bench.experiments.arms import Arm, Experiment


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_arm_is_a_valid_configuration(name, tmp_path):
    experiment = EXPERIMENTS[name]
    names = [arm.name for arm in experiment.arms]
    assert len({runner.directory_name(name) for name in names}) == len(names)
    for number, arm in enumerate(experiment.arms):
        config = runner.configuration(experiment, arm, 3, tmp_path)
        assert config.seed == 3 and config.out.parent == tmp_path / experiment.name / "seed-3"
        assert arm.base is None or arm.base in names[:number]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("experiment")
    write_inputs(directory)
    tree = config_tree(directory)
    (directory / "config.yaml").write_text(yaml.safe_dump(tree))
    settings = {"select.policy": "given", "select.layers": [1]} | dict.fromkeys(
        ("select.recall_samples", "select.recall_length"), 128
    )
    arms = (
        Arm("all stages", measure.student),
        Arm("no transfer", lambda pipeline: {}, alter=stages.randomise, last="align"),
        Arm("no distillation", measure.student, {"distill.steps": 0}, base="all stages"),
    )
    return Experiment("tiny", "?", arms, tables.quality, str(directory / "config.yaml"), settings), directory


def test_arms_run_and_share_what_is_aligned(tiny, monkeypatch):
    experiment, work = tiny
    for name, value in (("TEXT_LENGTH", 32), ("EPISODE_LENGTH", 128), ("TEXT_CHUNKS", 4), ("EPISODES", 2)):
        monkeypatch.setattr(measure, name, value)
    rows = [runner.run_arm(experiment, arm, 1, work) for arm in experiment.arms]
    whole, random, undistilled = rows
    assert whole["layers"] == [1] and whole["divergence"]["text"] > 0
    assert "align" in whole["seconds"] and "align" not in undistilled["seconds"]
    assert random["seconds"].keys() == {"transfer", "calibrate", "align"}
    place = work / "tiny" / "seed-1"
    transferred = [
        (place / name / "transfer" / "mixers.safetensors").read_bytes() for name in ("all_stages", "no_transfer")
    ]
    assert transferred[0] != transferred[1]
    assert runner.collect(experiment, [1, 2], work)["rows"] == json.loads(json.dumps(rows))
    assert "| all stages |" in experiment.tables(rows)


def test_steps_to_a_target_are_interpolated():
    curve = {"0": 1.0, "10": 0.6, "20": 0.4}
    assert calibration.steps_to(curve, 0.6) == 10 and calibration.steps_to(curve, 0.5) == pytest.approx(15)
    assert calibration.steps_to(curve, 0.3) is None and calibration.steps_to(curve, 2.0) == 0


def test_tables_have_mean_and_spread_over_seeds():
    rows = [{"arm": "a", "x": {"y": 1.0}}, {"arm": "a", "x": {"y": 3.0}}, {"arm": "b", "x": {}}]
    table = tables.by_arm(rows, [("x", tables.at("x", "y"))], digits=1)
    assert table.splitlines() == ["| arm | x |", "|---|---|", "| a | 2.0 ± 1.4 |", "| b | - |"]


def test_calibration_is_compared_with_the_uncalibrated_twins_of_its_mixer_and_seed():
    rows = [
        {"seed": 0, "arm": f"{mixer} {parts}", "relative_error": {"0": [first, first], "100": [last, last]}}
        for mixer, parts, first, last in (
            ("gdn", "off", 1.0, 0.2),
            ("gdn", "gain", 0.6, 0.1),
            ("mamba2", "off", 1.0, 0.4),
        )
    ]
    line = calibration.alignment_table(rows, 100).splitlines()[3]
    assert line == "| gdn gain | 0.600 | 0.100 | 80.000 |"


def test_policies_are_judged_by_the_best_pair_after_training():
    def row(pair):
        kl = 0.1 * sum(pair)
        return {
            "seed": 0,
            "arm": f"pair {pair}",
            "layers": list(pair),
            "divergence": {"text": kl, "episodes": kl},
            "recall": {"4": 1.0},
        }

    table = [{"score": -layer} for layer in range(selection.LAYERS)]
    rows = [row(pair) for pair in itertools.combinations(range(selection.LAYERS), 2)]
    for policy, layers in (("policy kl", [0, 1]), ("policy uniform", [0, 4])):
        chosen = {"layers": layers} | ({"table": table} if policy == "policy kl" else {})
        rows.append({"seed": 0, "arm": policy, "selection": chosen, "seconds": {"select": 2.0}})
    lines = selection.make_tables(rows).splitlines()
    assert lines[2].startswith("| policy kl | 0.00 | 1.00 | 1.00 | ") and lines[3].startswith(
        "| policy uniform | 0.30 |"
    )
    assert "| [0, 1] | 0.100 |" in lines
