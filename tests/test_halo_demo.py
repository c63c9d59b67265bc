"""The demo runs both conversions and reports what it measured, shown or not."""

import json

import pytest
import torch
import yaml
from halo_tiny import config_tree, write_inputs
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from halo.cli import app
from halo.demo.demo import CONVERTED, EVEN, TEACHER, UNSCALED, claims


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo")
    write_inputs(directory)
    tree = config_tree(directory) | {"eval": config_tree(directory)["eval"] | {"multiples": [1, 4]}}
    # Without null in the grid a scale is always chosen, so that its absence can be compared.
    tree["scale"] = tree["scale"] | {"grid": [10, 100]}
    (directory / "demo.yaml").write_text(yaml.safe_dump(tree))
    arguments = ["demo", "--config", str(directory / "demo.yaml"), "--out", str(directory / "a run")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return directory / "a run", result.output


def test_demo_compares_four_models(demo):
    out, output = demo
    record = json.loads((out / "demo.json").read_text())
    assert [(row["model"], row["multiple"]) for row in record["rows"]] == [
        (label, multiple) for label in (TEACHER, CONVERTED, UNSCALED, EVEN) for multiple in (1, 4)
    ]
    assert record["layers"][EVEN] == [0] and len(record["layers"][CONVERTED]) == 1
    assert len(record["claims"]) == 5 and "needle recall" in output
    # The second conversion starts from the aligned twins of the first.
    assert "even/align" not in record["seconds"] and record["seconds"]["selected/align"] >= 0


def test_demo_leaves_report_plot_and_checkpoint(demo):
    out, _ = demo
    text = (out / "demo.md").read_text()
    assert "evenly spaced" in text and "## Claims" in text
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    (out / "demo.md").unlink()
    assert CliRunner().invoke(app, ["report", str(out)]).exit_code == 0
    assert (out / "demo.md").read_text() == text
    model = AutoModelForCausalLM.from_pretrained(out / "selected" / "model")
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False).shape == (1, 6)


def test_claims_follow_the_numbers():
    recall = {(TEACHER, 1): 1.0, (CONVERTED, 1): 0.95, (UNSCALED, 1): 0.95, (EVEN, 1): 0.9}
    recall |= {(TEACHER, 4): 0.1, (CONVERTED, 4): 0.8, (UNSCALED, 4): 0.85, (EVEN, 4): 0.75}
    rows = [
        {"model": model, "multiple": multiple, "recall": value, "recall_error": 0.05, "bits_per_byte": 2.0}
        for (model, multiple), value in recall.items()
    ]
    assert [claim["shown"] for claim in claims(rows)] == [True, True, True, False, False]
    for row in rows:
        if row["model"] == CONVERTED:
            row["bits_per_byte"], row["recall"] = 2.3, 0.1
    assert [claim["shown"] for claim in claims(rows)] == [False, False, False, False, False]
