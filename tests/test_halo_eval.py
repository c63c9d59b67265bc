"""`halo eval --model` measures a saved model on local text, and hands other tasks to lm-evaluation-harness."""

import json
import re
import sys
import textwrap

import pytest
from halo_tiny import documents, tiny_teacher, tiny_tokenizer
from typer.testing import CliRunner

from halo import extras
from halo.cli import app
from halo.evaluation import ruler

OWN = "recall,bits,s1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    tiny_teacher(tokenizer=tokenizer).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    (directory / "text.txt").write_text("\n".join(documents()))
    return directory


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(ruler, "EXTRA_TOKENS", 2)


def run(folder, *options):
    command = ["eval", "--model", str(folder / "model"), "--haystack", str(folder / "text.txt"), "--device", "cpu"]
    return CliRunner().invoke(app, [*command, "--samples", "2", "--text-tokens", "900", *options])


def error(result):
    assert result.exit_code == 2, result.output
    return result.stderr.strip()


def test_own_tasks(folder, tmp_path):
    out = tmp_path / "rows.json"
    result = run(folder, "--lengths", "500,300", "--tasks", OWN, "--out", str(out))
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["rows"]
    assert [(row["task"], row["length"]) for row in rows if row["metric"] in ("recall", "bits per byte")] == [
        (task, length) for length in (300, 500) for task in OWN.split(",")
    ]
    assert [row["metric"] for row in rows if row["length"] == 300 and row["task"] == "bits"][1:] == [
        "bits per byte at 0 to 255",
        "bits per byte at 256 to 299",
    ]
    assert all(row["samples"] >= 1 and row["value"] >= 0 for row in rows)
    assert len(result.stdout.strip().splitlines()) == len(rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lengths", "50", "--tasks", "s1"), r"halo: eval: lengths must be at least \d+ with this tokenizer, got 50"),
        (("--lengths", "99999", "--tasks", "bits"), r"halo: eval: lengths must be at most the \d+ tokens of text, got"),
        (("--lengths", "12,x"), "halo: eval: --lengths must be positive numbers separated by commas, got 12,x"),
        (("--set", "eval.length=3"), "halo: eval: --set must come with --config, got --model"),
        (("--config", "demo"), "halo: eval: must be given one of --config and --model"),
        (("--haystack", "/no/such.txt"), "halo: data"),
    ],
)
def test_mistakes_are_one_line(folder, options, message):
    line = error(run(folder, *options))
    assert "\n" not in line
    assert re.match(message, line), line


def test_a_model_that_is_none(folder, tmp_path):
    (tmp_path / "model").mkdir()
    result = CliRunner().invoke(app, ["eval", "--model", str(tmp_path / "model"), "--device", "cpu"])
    line = error(result)
    assert line.startswith("halo: eval: the model must be loadable, got ") and "\n" not in line


def test_without_the_extra_other_tasks_are_refused(folder, monkeypatch):
    find = extras.importlib.util.find_spec
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    assert error(run(folder, "--lengths", "300", "--tasks", "recall,arc_easy")) == (
        "halo: eval: arc_easy: must be among recall, bits, s1, s2, s3, multikey, multikey2, multikey3 or tasks of "
        'lm-evaluation-harness, which needs lm_eval; install with: pip install "hypenet[eval]"'
    )


HARNESS = {
    "__init__.py": """
        def simple_evaluate(model, tasks, task_manager, limit, num_fewshot, log_samples, metadata):
            assert metadata == task_manager.metadata and metadata["tokenizer"] == model.tokenizer.name_or_path
            assert (limit, num_fewshot, model.max_length) == (7, 0, 300)
            shared = {"alias": "x", "sample_len": 7}
            return {
                "results": {
                    "arc_easy": shared | {
                        "acc,none": 0.25, "acc_stderr,none": 0.1, "f1,strict": 0.5, "f1_stderr,strict": "N/A"
                    },
                    "niah_single_1": shared | {"300,none": 1.0, "300_stderr,none": "N/A", "4096,none": -1.0},
                },
                "n-samples": {"arc_easy": {"original": 100, "effective": 7}},
            }
        """,
    "models/__init__.py": "",
    "models/huggingface.py": """
        class HFLM:
            def __init__(self, pretrained, tokenizer, batch_size, max_length):
                assert pretrained.config.max_position_embeddings < max_length and batch_size == 8192 // 300
                self.tokenizer, self.max_length = tokenizer, max_length
        """,
    "tasks.py": """
        class TaskManager:
            def __init__(self, metadata):
                self.metadata = metadata

            def match_tasks(self, names):
                return [name for name in names if name in ("arc_easy", "niah_single_1")]
        """,
}


@pytest.fixture
def harness(tmp_path, monkeypatch):
    """A package that is called as lm_eval is, in the places that are used."""
    for name, text in HARNESS.items():
        path = tmp_path / "lm_eval" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        del sys.modules[name]


def test_tasks_of_the_harness(folder, tmp_path, harness):
    out = tmp_path / "rows.json"
    options = ("--lengths", "300", "--tasks", "arc_easy,recall,niah_single_1", "--limit", "7", "--num-fewshot", "0")
    result = run(folder, *options, "--out", str(out))
    assert result.exit_code == 0, result.output
    own, *rows = json.loads(out.read_text())["rows"]
    assert own["task"] == "recall"
    assert rows == [
        {"task": "arc_easy", "length": None, "metric": "acc", "value": 0.25, "error": 0.1, "samples": 7},
        {"task": "arc_easy", "length": None, "metric": "f1 (strict)", "value": 0.5, "error": None, "samples": 7},
        {"task": "niah_single_1", "length": 300, "metric": "300", "value": 1.0, "error": None, "samples": None},
    ]


def test_an_unknown_task_is_refused_before_anything_is_measured(folder, tmp_path, harness):
    out = tmp_path / "rows.json"
    line = error(run(folder, "--lengths", "300", "--tasks", "recall,nope", "--out", str(out)))
    assert line.startswith("halo: eval: tasks must be among recall, bits, s1, ") and line.endswith("got nope")
    assert not out.exists()


def test_the_real_harness_on_a_local_task(folder, tmp_path):
    pytest.importorskip("lm_eval")
    questions = [{"question": f"Is {number} even? ", "answer": number % 2} for number in range(8)]
    (tmp_path / "letters.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions))
    task = tmp_path / "letters.yaml"
    task.write_text(
        f"""
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {tmp_path / "letters.jsonl"}}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    out = tmp_path / "rows.json"
    result = run(folder, "--lengths", "300", "--tasks", str(task), "--out", str(out))
    assert result.exit_code == 0, result.output
    [row] = json.loads(out.read_text())["rows"]
    assert (row["task"], row["metric"], row["samples"]) == ("letters", "acc", 8) and 0 <= row["value"] <= 1
