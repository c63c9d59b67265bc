"""The stage calibrate: what it leaves, resumes, refuses and reports, alone and between transfer and align."""

import json
import shutil

import pytest
import torch
from halo_tiny import LAYERS, config_tree, write_inputs
from safetensors.torch import load_file
from typer.testing import CliRunner

from halo import files, models
from halo.calibration.choice import AUTO
from halo.calibration.layer import observed_layers, relative_error
from halo.cli import app
from halo.compare import compare
from halo.config import make_config
from halo.pipeline import Pipeline
from halo.report import write_report
from halo.settings import HaloError
from halo.stages import calibrate
from halo.stages.calibrate import CalibrateSettings, Calibration, available_length, shortfalls
from hypenet.mixers import alibi_log_decay

MIXERS = ("lightning", "gdn", "mamba2")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    write_inputs(directory)
    return directory


def tree_of(inputs, out, parts="auto", **options):
    tree = config_tree(inputs) | {"out": str(out), "precision": "fp32"} | options
    tree["calibrate"] = tree["calibrate"] | {"parts": parts}
    tree["align"] = tree["align"] | {"steps": 0}
    return tree


def run(tree, *stages):
    pipeline = Pipeline(make_config(tree))
    for stage in stages:
        pipeline.run_stage(stage)
    return pipeline


def weights(directory):
    return load_file(directory / files.MIXERS)


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.mark.parametrize("mixer", MIXERS)
def test_align_starts_from_calibrated_twins(inputs, tmp_path, mixer):
    run(tree_of(inputs, tmp_path, mixer=mixer), "transfer", "calibrate", "align")
    assert same(weights(tmp_path / "align"), weights(tmp_path / "calibrate"))
    assert not same(weights(tmp_path / "transfer"), weights(tmp_path / "calibrate"))
    record = json.loads((tmp_path / "calibrate" / files.CALIBRATION).read_text())
    assert record["parts"] == list(AUTO[mixer]) and record["samples"] == 4 and record["length"] == 64
    assert [row["layer"] for row in record["layers"]] == list(range(LAYERS))
    for row in record["layers"]:
        assert len(row["errors"]) == 1 + len(AUTO[mixer]) and len(row["look_back"]) == len(row["entropy"]) == 4
        assert row["errors"][-1] < row["errors"][0]
    assert not (tmp_path / "calibrate" / files.CHECKPOINTS).exists()


def test_the_published_layout_stays(inputs, tmp_path):
    run(tree_of(inputs, tmp_path), "transfer", "calibrate")
    for name, value in weights(tmp_path / "calibrate").items():
        assert not name.endswith("log_decay") or torch.equal(value, alibi_log_decay(4))


def test_off_is_a_run_without_the_stage(inputs, tmp_path):
    tree = tree_of(inputs, tmp_path, "off")
    run(tree, "transfer", "align")
    assert same(weights(tmp_path / "align"), weights(tmp_path / "transfer"))
    assert "calibrate" not in json.loads((tmp_path / "align" / files.DONE).read_text())["settings"]
    run(tree, "calibrate")
    assert {path.name for path in (tmp_path / "calibrate").iterdir()} == {files.DONE}


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_of_an_older_version_continues_without_calibration(inputs, tmp_path, finished, monkeypatch):
    """Such runs have no directory calibrate, and their align has a result or only a checkpoint."""
    tree = tree_of(inputs, tmp_path, "off")
    tree["align"] |= {"steps": 4, "checkpoint_every": 2}
    if finished:
        run(tree, "transfer", "align")
    else:
        with monkeypatch.context() as patch:
            patch.setattr("halo.models.save_mixers", interrupted(after=1))
            with pytest.raises(KeyboardInterrupt):
                run(tree, "transfer", "align")
    new = tree | {"calibrate": tree["calibrate"] | {"parts": "auto"}}
    with pytest.raises(HaloError) as caught:
        run(new, "calibrate")
    assert str(caught.value) == (
        f"{tmp_path}/align: was made without calibration; continue with --set calibrate.parts=off, or delete it to "
        "calibrate"
    )
    run(tree, "transfer", "calibrate", "align", "select")
    shutil.rmtree(tmp_path / "align")
    shutil.rmtree(tmp_path / "calibrate")
    run(new, "calibrate", "align")


def interrupted(after):
    """Return a function like `save_mixers` that fails at a later call."""
    from halo.models import save_mixers

    calls = []

    def save(state, path):
        calls.append(path)
        if len(calls) > after:
            raise KeyboardInterrupt
        save_mixers(state, path)

    return save


@pytest.fixture(scope="module", params=MIXERS)
def whole(request, inputs, tmp_path_factory):
    """A mixer, and the output of a calibration of it that was not interrupted."""
    out = tmp_path_factory.mktemp("whole")
    run(tree_of(inputs, out, mixer=request.param), "transfer", "calibrate")
    return request.param, out


@pytest.mark.parametrize("after", range(1, LAYERS + 1))
def test_interrupted_stage_resumes_bit_for_bit(inputs, whole, tmp_path, after, monkeypatch):
    mixer, out = whole
    tree = tree_of(inputs, tmp_path, mixer=mixer)
    shutil.copytree(out / "transfer", tmp_path / "transfer")
    with monkeypatch.context() as patch:
        patch.setattr("halo.models.save_mixers", interrupted(after))
        with pytest.raises(KeyboardInterrupt):
            run(tree, "calibrate")
    assert not (tmp_path / "calibrate" / files.DONE).exists()
    again, apply = [], Calibration.apply
    monkeypatch.setattr(
        Calibration, "apply", lambda self, layer, *rest: again.append(layer) or apply(self, layer, *rest)
    )
    run(tree, "calibrate")
    assert again == list(range(after, LAYERS))
    assert same(weights(out / "calibrate"), weights(tmp_path / "calibrate"))
    errors = [
        [row["errors"] for row in json.loads((run_of / "calibrate" / files.CALIBRATION).read_text())["layers"]]
        for run_of in (out, tmp_path)
    ]
    assert errors[0] == errors[1]


def interrupt(tree, monkeypatch):
    """Run transfer, and interrupt calibrate at its third layer."""
    run(tree, "transfer")
    with monkeypatch.context() as patch:
        patch.setattr("halo.models.save_mixers", interrupted(2))
        with pytest.raises(KeyboardInterrupt):
            run(tree, "calibrate")


def test_other_settings_start_again(inputs, tmp_path, monkeypatch, capsys):
    tree = tree_of(inputs, tmp_path)
    interrupt(tree, monkeypatch)
    tree["calibrate"] |= {"parts": "decay"}
    run(tree, "calibrate")
    assert "is of other settings; the measurement starts again" in capsys.readouterr().err
    assert json.loads((tmp_path / "calibrate" / files.CALIBRATION).read_text())["parts"] == ["decay"]
    tree["calibrate"] |= {"parts": "gain"}
    with pytest.raises(HaloError, match=r"was made with other settings .calibrate.parts: decay there, gain now"):
        run(tree, "calibrate")


def test_auto_is_its_parts(inputs, tmp_path):
    run(tree_of(inputs, tmp_path), "transfer", "calibrate")
    run(tree_of(inputs, tmp_path, "gain+rank"), "calibrate", "align")


def test_a_layer_that_is_gone_is_one_line(inputs, tmp_path, monkeypatch):
    tree = tree_of(inputs, tmp_path)
    interrupt(tree, monkeypatch)
    shutil.rmtree(tmp_path / "calibrate" / files.CHECKPOINTS)
    with pytest.raises(
        HaloError, match=r"layer-0.safetensors: must be whole.*delete .*/calibrate to run its stage again"
    ):
        run(tree, "calibrate")


def test_another_runs_alignment_includes_its_calibration(inputs, tmp_path, capsys):
    run(tree_of(inputs, tmp_path / "a", "decay"), "transfer", "calibrate", "align")
    for where in (tmp_path / "a", tmp_path / "a" / "align"):
        tree = tree_of(inputs, tmp_path / f"b-{where.name}", aligned=str(where))
        pipeline = run(tree, "transfer", "calibrate", "align", "select")
        assert pipeline.job.directory("align") == tmp_path / "a" / "align"
        assert not (pipeline.out / "calibrate").exists()
    assert "calibrate  taken from" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"isolate": True}, {"mixer": "gdn", "isolate": True}])
def test_arithmetic_and_documents_of_the_run(inputs, tmp_path, options):
    options = dict(options)
    tree = tree_of(inputs, tmp_path)
    tree["data"] = tree["data"] | {"isolate_documents": options.pop("isolate", False)}
    run(tree | options, "transfer", "calibrate")
    record = json.loads((tmp_path / "calibrate" / files.CALIBRATION).read_text())
    assert all(row["errors"][-1] < row["errors"][0] for row in record["layers"])
    assert {value.dtype for value in weights(tmp_path / "calibrate").values()} == {torch.float32}


def test_training_text_calibrates_and_held_out_text_does_not(inputs, tmp_path):
    tree = tree_of(inputs, tmp_path)
    tree["data"] |= {"needle_ratio": 0.0}
    pipeline = run(tree, "transfer")
    corpus = pipeline.job.corpus
    batch = calibrate.calibration_batch(corpus, pipeline.config.calibrate)
    assert batch.input_ids.shape == (6, 64)
    streams = {split: corpus.stream(split).tolist() for split in ("train", "choose", "judge")}

    def is_part(ids, stream):
        return any(stream[start : start + len(ids)] == ids for start in range(len(stream)))

    for ids in batch.input_ids.tolist():
        assert not any(is_part(ids[20:44], streams[split]) for split in ("choose", "judge"))
    assert sum(is_part(ids[20:32], streams["train"]) for ids in batch.input_ids.tolist()) >= 4


def test_short_text_is_cut_into_shorter_sequences(inputs, tmp_path, capsys):
    corpus = Pipeline(make_config(tree_of(inputs, tmp_path))).job.corpus
    tokens = corpus.store("train").num_tokens
    settings = CalibrateSettings(samples=8, held_samples=2, length=10**6)
    assert available_length(corpus, settings) == tokens // 10
    assert calibrate.calibration_batch(corpus, settings).input_ids.shape == (10, tokens // 10)
    assert "warning: calibrate: the training text has 10 sequences" in capsys.readouterr().err
    assert not list(shortfalls(settings, corpus))
    many = CalibrateSettings(samples=tokens, held_samples=2)
    (line,) = shortfalls(many, corpus)
    assert line.startswith("calibrate.samples: must leave 32 tokens of training text") and line.endswith("to off")
    assert not list(shortfalls(many.model_copy(update={"parts": "off"}), corpus))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("calibrate.parts=gate", "calibrate.parts: must be auto, off or some of rank, decay, gain, ridge joined by +"),
        ("calibrate.parts=rank+decay", "rank and decay not together, got rank+decay"),
        ("calibrate.gain=layer", "calibrate.gain: must "),
        ("calibrate.length=31", "calibrate.length: must be greater than or equal to 32, got 31"),
        ("calibrate.held_samples=0", "calibrate.held_samples: must be greater than 0, got 0"),
        ("calibrate.ridge=0", "calibrate.ridge: must be greater than 0, got 0"),
        ("calibrate.text=a", "calibrate.text: is not a key of this section"),
    ],
)
def test_mistakes_are_one_line(inputs, tmp_path, change, message):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(tree_of(inputs, tmp_path / "out")))
    result = CliRunner().invoke(app, ["calibrate", "--config", str(path), "--set", change])
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1


def test_command_report_and_comparison(inputs, tmp_path):
    for name, parts in (("a", "auto"), ("b", "off")):
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(tree_of(inputs, tmp_path / name, parts, mixer="gdn")))
        for stage in ("transfer", "calibrate", "align"):
            result = CliRunner().invoke(app, [stage, "--config", str(path)])
            assert result.exit_code == 0, result.output
            if (stage, name) == ("calibrate", "a"):
                assert "decay+beta+gate+gain: relative error" in result.output
    text = write_report(tmp_path / "a").read_text()
    assert "| layer | look-back | entropy | before | + decay | + beta | + gate | + gain |" in text
    record = json.loads((tmp_path / "a" / "calibrate" / files.CALIBRATION).read_text())
    assert f"| {record['layers'][2]['errors'][-1]:.3f} |\n| mean |" in text
    assert "Calibration" not in write_report(tmp_path / "b").read_text()
    rows = {row.title: row.values for row in compare([tmp_path / "a", tmp_path / "b"])["calibration"]}
    assert rows["parts"] == ["decay+beta+gate+gain", None]
    last = sum(row["errors"][-1] for row in record["layers"]) / LAYERS
    assert rows["relative error after, mean of layers"] == [f"{last:.4g}", None]


@pytest.mark.parametrize(("mixer", "parts"), [*((mixer, "auto") for mixer in MIXERS), ("lightning", "decay+ridge")])
def test_recorded_errors_are_those_of_the_result_in_bfloat16(inputs, tmp_path, mixer, parts):
    tree = tree_of(inputs, tmp_path, parts, mixer=mixer, precision="bf16")
    job = run(tree, "transfer", "calibrate").job
    twins, batch = job.load_mixers("calibrate"), calibrate.calibration_batch(job.corpus, job.config.calibrate)
    found = {}

    def observe(layer, data):
        found[layer] = relative_error(twins[layer], data[-job.config.calibrate.held_samples :])

    with torch.no_grad(), job.compute.autocast(), observed_layers(job.teacher, batch, False, observe):
        models.hidden_states(job.teacher, batch)
    record = json.loads((tmp_path / "calibrate" / files.CALIBRATION).read_text())
    assert [row["errors"][-1] for row in record["layers"]] == pytest.approx([found[i] for i in range(LAYERS)], rel=1e-6)
