"""The whole conversion from the command line, with a teacher of three layers: results, reuse and error messages."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from halo_tiny import LAYERS, config_tree, documents, tiny_teacher, tiny_tokenizer, write_inputs
from hypenet_models import small_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

import hypenet
from halo import models, report
from halo.cli import app
from halo.config import make_config
from halo.data import Corpus, DataSettings
from halo.journal import Journal
from halo.pipeline import Pipeline
from halo.report import every_digit
from halo.selection.policies import spaced_layers
from halo.settings import HaloError
from halo.stages import STAGES
from halo.stages.scale import ScaleSettings, choose_scale, long_samples


def halo(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("in puts")
    write_inputs(directory)
    (directory / "config.yaml").write_text(yaml.safe_dump(config_tree(directory)))
    return directory


@pytest.fixture(scope="module")
def converted(inputs):
    result = halo("convert", "--config", inputs / "config.yaml")
    assert result.exit_code == 0, result.output
    return SimpleNamespace(out=inputs / "out", config=inputs / "config.yaml", output=result.output)


def test_every_stage_leaves_its_result(converted):
    for stage in STAGES:
        record = json.loads((converted.out / stage / "done.json").read_text())
        assert record["stage"] == stage and record["settings"]["data"]["needle_ratio"] == 0.3
    for stage in ("align", "distill", "finetune"):
        lines = [json.loads(line) for line in (converted.out / stage / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        assert {"loss", "lr", "grad_norm", "seconds", "tokens_per_second"} <= lines[0].keys()
        assert not (converted.out / stage / "checkpoints").exists()
        # The output is not a terminal: plain lines with loss and speed.
        assert f"{stage:10} 4/4  loss {lines[-1]['loss']:.4f}" in converted.output and "tokens/s" in converted.output


def test_a_conversion_says_first_what_it_will_take(converted):
    first = converted.output.splitlines()[0]
    stages = r"calibrate \d+ s, align \d+ s, select .*, eval \d+ s"
    assert re.fullmatch(rf"estimate   \d+ (s|min) for [\d.]+k tokens \({stages}\); details: halo plan", first), first


def test_finished_model_is_a_hypenet_without_the_teacher(converted):
    model = hypenet.HypeNetForCausalLM.from_pretrained(converted.out / "model")
    selection = json.loads((converted.out / "select" / "selection.json").read_text())
    scale = json.loads((converted.out / "scale" / "scale.json").read_text())
    assert model.config.softmax_layers == selection["layers"] and len(selection["layers"]) == 1
    assert model.config.logit_scale_base == scale["a"] == min(scale["grid"], key=lambda row: row["loss"])["a"]
    tokenizer = AutoTokenizer.from_pretrained(converted.out / "model")
    ids = torch.tensor([tokenizer("quiet river")["input_ids"]])
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape[1] == ids.shape[1] + 5
    lengths = [row["length"] for row in json.loads((converted.out / "eval" / "results.json").read_text())["rows"]]
    longest = max(scale["length"], *lengths)
    assert model.config.max_position_embeddings == longest > tiny_teacher(8).config.max_position_embeddings
    assert tokenizer.model_max_length >= longest
    finetuned = models.load_hypenet(converted.out / "finetune" / "model", torch.device("cpu")).state_dict()
    assert all(torch.equal(value, finetuned[key]) for key, value in model.state_dict().items())


def test_evaluation_covers_models_and_lengths(converted):
    record = json.loads((converted.out / "eval" / "results.json").read_text())
    labels = {row["model"] for row in record["rows"]}
    assert {"teacher", "converted"} <= labels
    assert [(row["length"], row["multiple"]) for row in record["rows"]] == [(160, 1), (320, 2)] * len(labels)
    for row in record["rows"]:
        assert 0 <= row["recall"] <= 1 and 0 < row["bits_per_byte"] < 20
        assert row["episodes"] == (4 if row["multiple"] == 1 else 2)


@pytest.mark.parametrize("stage", ["select", "scale", "eval"])
def test_interrupted_measurement_resumes(converted, tmp_path, monkeypatch, stage):
    config = make_config(yaml.safe_load((converted.out / "config.yaml").read_text()))
    result = {"select": "selection.json", "scale": "scale.json", "eval": "results.json"}[stage]
    directory = converted.out / stage
    expected, lines = json.loads((directory / result).read_text()), (directory / "metrics.jsonl").read_text()
    # Keep the settings and two entries; the third is truncated, as by a kill.
    whole = lines.splitlines(keepends=True)[:3]
    (directory / "metrics.jsonl").write_text("".join(whole) + lines.splitlines()[3][:20])
    for name in ("done.json", result):
        (directory / name).unlink()
    counted = []
    monkeypatch.setattr(Journal, "once", _counting(Journal.once, counted))
    Pipeline(config).run_stage(stage)
    assert json.loads((directory / result).read_text()) == expected
    assert (directory / "metrics.jsonl").read_text() == lines
    assert counted.count(False) == 2 and counted.count(True) == len(counted) - 2 > 0


def _counting(once, counted):
    """Wrap Journal.once to record for every entry whether it had to be measured."""

    def counting(self, key, measure):
        counted.append(key not in self.pieces)
        return once(self, key, measure)

    return counting


def test_journal_of_other_settings_starts_anew(tmp_path, capsys):
    Journal(tmp_path, {"a": 1}).once("x", lambda: 3)
    assert Journal(tmp_path, {"a": 1}).once("x", lambda: 4) == 3
    assert Journal(tmp_path, {"a": 2}).once("x", lambda: 4) == 4
    assert "is of other settings; the measurement starts again" in capsys.readouterr().err


def test_processes_share_the_parts_of_a_measurement(tmp_path):
    """Each measures its own parts and takes those that others have finished from their journals."""
    measured = []

    def part(name):
        return lambda: measured.append(name) or name.upper()

    first = Journal(tmp_path, {}, SimpleNamespace(rank=0, world=2, gather=lambda own: [own]))
    with pytest.raises(KeyError):  # The other process has measured nothing yet.
        first.measure({name: part(name) for name in "abcd"})
    assert measured == ["a", "c"]
    second = Journal(tmp_path, {}, SimpleNamespace(rank=1, world=2, gather=lambda own: [first.pieces, own]))
    assert second.measure({name: part(name) for name in "abcd"}) == {"a": "A", "b": "B", "c": "C", "d": "D"}
    assert measured == ["a", "c", "b", "d"]
    alone = Journal(tmp_path, {})
    assert alone.measure({name: part(name) for name in "abcd"}) == {"a": "A", "b": "B", "c": "C", "d": "D"}
    assert len(measured) == 4


def test_report_tells_the_run(converted):
    text = (converted.out / "report.md").read_text()
    for heading in (
        "## Training",
        "## Selection",
        "## Scale",
        "## Evaluation",
        "| needle recall |",
        "| bits per byte |",
    ):
        assert heading in text
    for plot in ("training.png", "selection.png", "evaluation.png"):
        assert (converted.out / plot).read_bytes().startswith(b"\x89PNG") and f"({plot})" in text
    before = (converted.out / "report.md").read_text()
    (converted.out / "report.md").unlink()
    assert halo("report", converted.out).exit_code == 0
    assert (converted.out / "report.md").read_text() == before


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("eval/results.json", "{", "must be readable JSON"),
        ("eval/results.json", "[]", "must be a JSON object, got list"),
        ("eval/results.json", "{}", "must be whole, got KeyError"),
        ("scale/scale.json", '{"grid": [3]}', "must be whole, got "),
        ("select/selection.json", "", "must be readable JSON"),
        ("config.yaml", "a: [", "must be whole, got "),
        ("config.yaml", "[]", "must be whole, got "),
    ],
)
def test_report_of_a_damaged_file_is_one_line(converted, tmp_path, file, content, message):
    out = shutil.copytree(converted.out, tmp_path / "copy")
    (out / file).write_text(content)
    result = halo("report", out)
    assert result.exit_code == 2 and result.stderr.startswith(f"halo: {out / file}: {message}"), result.output
    assert result.stderr.count("\n") == 1


def test_report_does_not_depend_on_the_locale(converted, tmp_path):
    out = shutil.copytree(converted.out, tmp_path / "copy")
    environment = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PATH": os.environ["PATH"]}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    code = "import locale, sys; from pathlib import Path; from halo.report import write_report; "
    code += "assert locale.getencoding() != 'UTF-8'; write_report(Path(sys.argv[1]))"
    ran = subprocess.run([sys.executable, "-c", code, out], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert (out / "report.md").read_bytes() == (converted.out / "report.md").read_bytes()


def test_report_that_cannot_be_written_is_one_line(converted, tmp_path):
    out = shutil.copytree(converted.out, tmp_path / "copy")
    (out / "report.md").unlink()
    (out / "report.md").mkdir()
    result = halo("report", out)
    assert result.exit_code == 2 and result.stderr.startswith(f"halo: {out / 'report.md'}: must be writable, got ")
    assert result.stderr.count("\n") == 1


def test_a_saved_model_that_lacks_weights_is_refused(converted, tmp_path):
    """transformers fills them with random numbers."""
    folder = shutil.copytree(converted.out / "model", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("layers.1.mlp.up_proj.weight")]
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        HaloError, match=f"must hold the weights .*, got missing {re.escape(name)}; run its stage again"
    ):
        models.load_hypenet(folder, torch.device("cpu"))


def test_report_of_a_run_that_is_writing(converted, tmp_path):
    out = shutil.copytree(converted.out, tmp_path / "copy")
    with (out / "align" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert halo("report", out).exit_code == 0
    assert (out / "report.md").read_text() == (converted.out / "report.md").read_text()


def test_an_interruption_says_that_the_same_command_continues(converted, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "run", interrupted)
    result = halo("convert", "--config", converted.config)
    assert result.exit_code == 130
    assert result.stderr == "halo: interrupted; the same command continues after what is finished\n"


def test_fewer_samples_than_asked_for_are_said(converted, tmp_path, capsys):
    tree = yaml.safe_load((converted.out / "config.yaml").read_text()) | {"out": str(tmp_path / "out")}
    tree["select"]["language_samples"] = 10_000
    tree["scale"] |= {"documents": 1000, "length": 200}
    for stage in ("transfer", "calibrate", "align"):
        shutil.copytree(converted.out / stage, tmp_path / "out" / stage)
    pipeline = Pipeline(make_config(tree))
    pipeline.run_stage("select")
    chunks = pipeline.job.corpus.count_chunks("choose", 32)
    assert f"warning: select: the held-out text has {chunks} chunks of 32 tokens, not 10000" in capsys.readouterr().err
    rows = long_samples(pipeline.job.corpus, pipeline.config.scale)
    line = f"warning: scale: the held-out text has {len(rows)} samples of 200 tokens, not 1000"
    assert line in capsys.readouterr().err


def test_one_sample_has_no_error_estimate_and_says_so(converted, tmp_path, capsys):
    tree = yaml.safe_load((converted.out / "config.yaml").read_text()) | {"out": str(tmp_path / "out")}
    tree["scale"] |= {"documents": 1}
    for stage in STAGES[: STAGES.index("scale")]:
        shutil.copytree(converted.out / stage, tmp_path / "out" / stage)
    Pipeline(make_config(tree)).run_stage("scale")
    expected = "the choice of the scale's base has no error estimate, since there is one sample; measure more"
    assert f"warning: {expected}\n" in capsys.readouterr().err


def test_mamba2_goes_through_every_stage(inputs, tmp_path):
    """The finished model is exported, loads, and generates from its cache what it generates without one."""
    arguments = ["--config", inputs / "config.yaml", "--out", tmp_path / "out", "--set", "mixer=mamba2"]
    result = halo("convert", *arguments)
    assert result.exit_code == 0, result.output
    assert all((tmp_path / "out" / stage / "done.json").is_file() for stage in STAGES)
    result = halo("export", tmp_path / "out", "--dtype", "fp32")
    assert result.exit_code == 0, result.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "export").eval()
    assert model.config.mixers.count("mamba2") == LAYERS - 1
    ids = AutoTokenizer.from_pretrained(tmp_path / "out" / "export")("river stone quiet", return_tensors="pt").input_ids
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(ids, **options)
    assert generated.shape[1] == ids.shape[1] + 12
    assert torch.equal(generated, model.generate(ids, use_cache=False, **options))


def test_second_run_skips_what_is_done(converted):
    files = {path: path.stat().st_mtime_ns for path in converted.out.glob("*/*") if path.is_file()}
    result = halo("convert", "--config", converted.config)
    assert result.exit_code == 0 and result.output.count("done already in") == len(STAGES)
    assert files == {path: path.stat().st_mtime_ns for path in converted.out.glob("*/*") if path.is_file()}


def test_result_of_other_settings_is_not_used(converted):
    result = halo("distill", "--config", converted.config, "--set", "align.steps=5")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert (
        "was made with other settings (align.steps: 4 there, 5 now); give another --out or delete it" in result.stderr
    )


def test_stage_needs_the_one_before(inputs, tmp_path):
    for stage, options, before in (
        ("calibrate", (), "transfer"),
        ("align", (), "calibrate"),
        ("align", ("--set", "calibrate.parts=off"), "transfer"),
    ):
        result = halo(stage, "--config", inputs / "config.yaml", "--out", tmp_path, *options)
        assert result.exit_code == 2 and f"run `halo {before}` first" in result.stderr
        assert result.stderr.count("\n") == 1


def test_even_conversion_reuses_aligned_twins(converted, inputs, tmp_path):
    tree = config_tree(inputs) | {"out": str(tmp_path / "even"), "aligned": str(converted.out)}
    tree["select"] = tree["select"] | {"policy": "uniform"}
    (tmp_path / "even.yaml").write_text(yaml.safe_dump(tree))
    pipeline = Pipeline(make_config(tree))
    for stage in ("transfer", "calibrate", "align", "select", "distill"):
        pipeline.run_stage(stage)
    assert pipeline.job.softmax_layers() == spaced_layers(LAYERS, 1) == [0]
    assert not (tmp_path / "even" / "align").exists()
    assert pipeline.job.directory("align") == converted.out / "align"


def test_aligned_must_be_a_finished_conversion(inputs, tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config_tree(inputs) | {"aligned": str(tmp_path)}))
    result = halo("select", "--config", tmp_path / "c.yaml", "--out", tmp_path / "out")
    assert result.exit_code == 2 and "aligned: must be the directory of a finished conversion" in result.stderr


def test_aligned_must_have_the_same_mixer(converted, inputs, tmp_path):
    options = [
        "--config",
        inputs / "config.yaml",
        "--out",
        tmp_path,
        "--set",
        f"aligned={json.dumps(str(converted.out))}",
    ]
    result = halo("select", *options, "--set", "mixer=gdn")
    assert result.exit_code == 2 and "other settings (mixer: lightning there, gdn now)" in result.stderr
    result = halo("select", *options, "--set", "architecture.lightning_use_rope=false")
    assert result.exit_code == 2 and "other settings (architecture.lightning_use_rope" in result.stderr


def test_architecture_reaches_the_finished_model(inputs, tmp_path):
    tree = config_tree(inputs) | {"out": str(tmp_path / "out"), "select": {"layers": [1]}}
    tree["architecture"] = {"lightning_nkv": 2, "lightning_use_rope": False, "attn_use_rope": True}
    Pipeline(make_config(tree)).run()
    config = hypenet.HypeNetForCausalLM.from_pretrained(tmp_path / "out" / "model").config
    assert {name: getattr(config, name) for name in tree["architecture"]} == tree["architecture"]


def test_given_layers_are_kept(converted, inputs, tmp_path):
    options = [
        "--config",
        inputs / "config.yaml",
        "--out",
        tmp_path,
        "--set",
        f"aligned={json.dumps(str(converted.out))}",
    ]
    assert halo("select", *options, "--set", "select.layers=[2, 0]").exit_code == 0
    assert json.loads((tmp_path / "select" / "selection.json").read_text())["layers"] == [0, 2]
    result = halo("select", *options[:2], "--out", tmp_path / "b", *options[4:], "--set", "select.layers=[3]")
    assert result.exit_code == 2 and "select.layers: must be layers below 3, got [3]" in result.stderr


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("{tmp}/gpt2", "teacher: must be of model_type qwen3, qwen2, llama, got 'gpt2' ("),
        ("{tmp}/nothing", "teacher: must be an existing directory, a .gguf file or a Hugging Face name, got"),
        ("{tmp}/empty", "teacher: must hold config.json, got"),
        ("{tmp}/no tokenizer", "teacher: must come with its tokenizer (tokenizer.json, "),
    ],
)
def test_unusable_teacher_is_one_line(inputs, tmp_path, teacher, message):
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=50)).save_pretrained(tmp_path / "gpt2")
    tiny_teacher(vocab_size=300).save_pretrained(tmp_path / "no tokenizer")
    (tmp_path / "empty").mkdir()
    tree = config_tree(inputs) | {"teacher": teacher.format(tmp=tmp_path), "out": str(tmp_path / "out")}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    result = halo("convert", "--config", tmp_path / "c.yaml")
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1


def test_missing_data_is_one_line(inputs, tmp_path):
    result = halo(
        "convert", "--config", inputs / "config.yaml", "--out", tmp_path, "--set", "data.source=./nowhere.txt"
    )
    assert result.exit_code == 2
    assert result.stderr == "halo: data.source: must be an existing file or directory, got ./nowhere.txt\n"


@pytest.fixture(scope="module")
def corpus(inputs):
    return Corpus(DataSettings(source=str(inputs / "text"), held_out=0.3, needle_ratio=0.3), tiny_tokenizer())


class NextTokenOracle(nn.Module):
    """Predicts the next token with a confidence that depends on its scale base."""

    def __init__(self, vocabulary, rows=None):
        super().__init__()
        self.head = nn.Linear(vocabulary, vocabulary, bias=False)
        nn.init.eye_(self.head.weight)
        self.config = SimpleNamespace(attn_logits_scaling=None)
        self.mistakes = []
        self.certainty = {None: 2.0, "hype 10": 0.0, "hype 100": 4.0, "hype 1000": 3.0}

    @property
    def base_model(self):
        return self

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache):
        following = input_ids.roll(-1, dims=1).clone()
        for row, position in self.mistakes:
            following[row, position - 1] += 1
        hidden = nn.functional.one_hot(following, self.head.in_features).float()
        return SimpleNamespace(last_hidden_state=hidden * self.certainty[self.config.attn_logits_scaling])


@pytest.mark.parametrize(("best", "expected"), [("hype 100", 100), (None, None), ("hype 10", 10)])
def test_scale_takes_the_base_with_the_least_loss(corpus, tmp_path, best, expected):
    model = NextTokenOracle(len(corpus.tokenizer))
    model.certainty[best] = 9.0
    settings = ScaleSettings(grid=[None, 10, 100, 1000], length=60, documents=4, needle_ratio=0.0)
    rows = choose_scale(model, long_samples(corpus, settings), settings.grid, 40, Journal(tmp_path, {}))
    assert rows[0]["a"] == expected
    assert [row["loss"] for row in rows] == sorted(row["loss"] for row in rows)
    assert rows[0]["advantage"] == 0 and rows[1]["advantage"] == pytest.approx(rows[1]["loss"] - rows[0]["loss"])


def test_scale_base_keeps_every_digit(corpus):
    model = NextTokenOracle(len(corpus.tokenizer))
    model.config = hypenet.HypeNetConfig()
    models.set_logit_scale_base(model, 512.3456)
    assert model.config.logit_scale_base == 512.3456 and every_digit(512.3456) == "512.3456"
    models.set_logit_scale_base(model, None)
    assert model.config.logit_scale_base is None and every_digit(500.0) == "500"


def test_scale_documents_may_hold_episodes(tmp_path):
    for i, text in enumerate(documents(words=150)):
        (tmp_path / f"{i}.txt").write_text(text)
    corpus = Corpus(DataSettings(source=str(tmp_path), held_out=0.3), tiny_tokenizer())
    settings = ScaleSettings(length=90, documents=4, needle_ratio=0.5)
    rows = long_samples(corpus, settings)
    assert rows.shape == (4, 90)
    assert ["The magic number for" in corpus.tokenizer.decode(row) for row in rows] == [False, False, True, True]


def test_a_saved_model_promises_the_longest_measured_context(tmp_path):
    tokenizer = tiny_tokenizer()
    model = small_model(["attn", "lightning-attn"], torch.float32, vocab_size=len(tokenizer))
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    for folder, given in ((tmp_path / "a", 512), (tmp_path / "b", hypenet.HypeNetConfig.max_position_embeddings)):
        model.config.max_position_embeddings = tokenizer.model_max_length = given
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for length, expected in ((100, given), (2 * given, 2 * given), (given, 2 * given)):
            models.raise_context_length(folder, length)
            config = hypenet.HypeNetConfig.from_pretrained(folder)
            assert config.max_position_embeddings == expected
            assert AutoTokenizer.from_pretrained(folder).model_max_length == expected
    loaded = hypenet.HypeNetForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(x, loaded[name]) for name, x in weights.items())


def test_skipped_records_are_named(inputs, tmp_path, capsys):
    folder = tmp_path / "text"
    shutil.copytree(inputs / "text", folder)
    (folder / "a.jsonl").write_text('{"text": 5}\nnot json\n{"body": "x"}\n{"text": "y"}\n[]\n')
    (folder / "b.txt").write_bytes(b"words of plain text " * 99 + b"\xff")
    tree = config_tree(inputs, str(tmp_path / "out"))
    tree["data"] |= {"source": str(folder), "max_skipped": 0.2}
    Pipeline(make_config(tree)).run_stage("transfer")
    first, second = (line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: data"))
    assert "4 of 66 records were skipped" in first and "a.jsonl:2: is not JSON" in first and "and 1 more" in first
    assert "1 documents have bytes that are no text" in second


def test_single_sample_has_no_error():
    row = {"model": "m", "multiple": 1, "length": 9, "recall": 0.5, "recall_error": None, "tasks": {}}
    part = {"start": 0, "stop": 9, "bits_per_byte": 1.25, "stderr": None}
    row |= {"bits_per_byte": 1.25, "bits_per_byte_error": None, "by_position": [part]}
    tables = report.evaluation_table([row]) + report.position_table([row])
    assert tables.count("1.250 |") == 2 and "0.50 |" in tables and "±" not in tables
