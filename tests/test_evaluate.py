"""The final measurement: rows for every model and length, on text and samples that no choice has seen."""

import json
import math
from typing import get_args

import numpy as np
import pytest
import torch
from halo_tiny import documents, tiny_teacher, tiny_tokenizer

from halo.evaluation import ruler
from halo.evaluation.needle import NeedleTask, TooShort, recall_per_episode, token_stream
from halo.evaluation.perplexity import bits_per_byte
from halo.journal import Journal
from halo.report import evaluation_table, position_table
from halo.settings import HaloError
from halo.stages import evaluate as stage
from halo.stages.evaluate import EvalSettings, evaluate, shortfalls

TASKS = ["s1", "multikey"]


class Text:
    """Stands in for a Corpus: one text for each side, and a record of the sides that were used."""

    seed = 5

    def __init__(self, seeds=(("train", 0), ("choose", 1), ("judge", 2))):
        self.tokenizer, self.used, self.needles = tiny_tokenizer(), [], None
        self.streams = {side: token_stream(self.tokenizer, documents(seed=seed)) for side, seed in seeds}

    def stream(self, split):
        self.used.append(split)
        return self.streams[split]

    def task(self, split):
        stream = self.stream(split)
        if self.needles is None:
            self.needles = NeedleTask(self.tokenizer, stream)
        return self.needles.of(stream)


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(ruler, "EXTRA_TOKENS", 2)


@pytest.fixture(scope="module")
def text():
    return Text()


@pytest.fixture(scope="module")
def model(text):
    return tiny_teacher(tokenizer=text.tokenizer)


def settings(**changes):
    small = {
        "length": 200,
        "multiples": [1, 2],
        "recall_samples": 3,
        "text_tokens": 800,
        "tasks": TASKS,
        "task_samples": 2,
        "task_digits": 3,
    }
    return EvalSettings(**small | changes)


def measured(text, model, tmp_path, name="run", **changes):
    return evaluate([("teacher", model, None)], text, settings(**changes), Journal(tmp_path / name, {}))


def test_a_row_for_each_length(text, model, tmp_path):
    text.used.clear()
    rows = measured(text, model, tmp_path)
    assert set(text.used) == {"judge"}
    assert [(row["model"], row["multiple"], row["length"]) for row in rows] == [
        ("teacher", 1, 200),
        ("teacher", 2, 400),
    ]
    for row in rows:
        expected = bits_per_byte(model, text.tokenizer, text.streams["judge"], row["length"], 800)
        assert row["bits_per_byte"] == pytest.approx(expected["bits_per_byte"])
        assert [part["stop"] for part in row["by_position"]] == ([200] if row["multiple"] == 1 else [256, 400])
        assert set(row["tasks"]) == set(TASKS) and row["tasks"]["s1"]["samples"] == 2
        assert 0 <= row["tasks"]["s1"]["recall"] <= 1
    json.loads(json.dumps(rows, allow_nan=False))


def test_samples_are_not_those_of_selection(text, model, tmp_path, monkeypatch):
    """Neither their text nor their keys and values, though both come from one seed of the run."""
    made = []
    monkeypatch.setattr(stage, "recall_per_episode", lambda *a, **k: made.append(a) or recall_per_episode(*a, **k))
    measured(text, model, tmp_path, multiples=[1], tasks=[])
    _, task, length, _, seed = made[0]
    judged = task.episode(np.random.default_rng(seed), length)
    chosen = text.task("choose").episode(np.random.default_rng(text.seed), length)
    assert set(judged.answers).isdisjoint(chosen.answers)
    assert np.array_equal(task.haystack, text.streams["judge"])


def test_results_are_those_of_an_interrupted_run(text, model, tmp_path, monkeypatch):
    whole = measured(text, model, tmp_path)
    calls = []

    def dies(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return ruler.generated_recall(*args, **options)

    monkeypatch.setattr(stage, "generated_recall", dies)
    with pytest.raises(KeyboardInterrupt):
        measured(text, model, tmp_path, "killed")
    assert measured(text, model, tmp_path, "killed") == whole
    assert len(calls) == 5, "the two finished parts are not measured again"


def test_batches_do_not_change_the_results(text, model, tmp_path):
    one = measured(text, model, tmp_path, "one", batch_tokens=1)
    many = measured(text, model, tmp_path, "many", batch_tokens=10_000)
    for a, b in zip(one, many, strict=True):
        assert a["tasks"] == b["tasks"] and a["recall"] == b["recall"]
        assert a["bits_per_byte"] == pytest.approx(b["bits_per_byte"], rel=1e-5)


def test_the_scale_is_that_of_the_label(text, model, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(stage, "_measure", lambda model, *rest: seen.append(model.config.attn_logits_scaling) or {})
    labelled = [("a", model, "hype_100"), ("b", model, None)]
    evaluate(labelled, text, settings(multiples=[1], tasks=[]), Journal(tmp_path / "run", {}))
    assert seen == ["hype_100", None]


def test_text_that_is_too_short_leaves_bits_out(model, tmp_path):
    short = Text()
    short.streams["judge"] = short.streams["judge"][:300]
    first, second = measured(short, model, tmp_path, tasks=[])
    assert first["bits_per_byte"] > 0 and second["bits_per_byte"] is second["by_position"] is None
    assert second["episodes"] == 3 and not math.isnan(second["recall"])


def test_one_sample_has_no_error(text, model, tmp_path):
    [row] = measured(text, model, tmp_path, multiples=[1], recall_samples=1, task_samples=1, text_tokens=200)
    assert row["recall_error"] is row["bits_per_byte_error"] is row["tasks"]["s1"]["recall_error"] is None
    assert row["by_position"][0]["stderr"] is None


def test_a_short_length_is_named_beforehand(text, model, tmp_path):
    task = ruler.RulerTask("multikey", text.tokenizer, text.streams["judge"], 3)
    lines = list(shortfalls(settings(length=100), text))
    least = text.task("judge").min_length()
    assert f"eval.length: must be at least {least} for recall with this tokenizer, got 100" in lines
    assert f"eval.length: must be at least {task.min_length()} for multikey with this tokenizer, got 100" in lines
    assert not list(shortfalls(settings(), text))
    with pytest.raises(TooShort, match="length must be at least"):
        measured(text, model, tmp_path, length=100)
    assert issubclass(TooShort, HaloError) and issubclass(TooShort, ValueError)


def test_every_task_can_be_asked_for():
    [names] = [get_args(item) for item in get_args(EvalSettings.model_fields["tasks"].annotation)]
    assert set(names) == set(ruler.KINDS)


def test_models_of_half_precision_are_measured(text, model, tmp_path):
    half = tiny_teacher(tokenizer=text.tokenizer).to(torch.bfloat16)
    [row] = measured(text, half, tmp_path, multiples=[1])
    [whole] = measured(text, model, tmp_path, "fp32", multiples=[1])
    assert row["bits_per_byte"] == pytest.approx(whole["bits_per_byte"], rel=0.02)


def test_the_report_has_a_column_for_each_length_and_position(text, model, tmp_path):
    rows = measured(text, model, tmp_path)
    table = evaluation_table(rows)
    assert [line.split(" | ")[0] for line in table.splitlines() if " (1x) " in line] == [
        "| needle recall",
        "| s1, generated",
        "| multikey, generated",
        "| bits per byte",
    ]
    recall = rows[1]["tasks"]["s1"]
    assert f"{recall['recall']:.2f} ± {recall['recall_error']:.2f}" in table
    positions = position_table(rows).splitlines()
    assert positions[0] == "| bits per byte by position, at 400 tokens | 0 to 255 | 256 to 399 |"
    assert f"{rows[1]['by_position'][1]['bits_per_byte']:.3f} ± " in positions[2]
    assert position_table([row | {"by_position": None} for row in rows]) == ""
