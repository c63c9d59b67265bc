"""The demo runs its conversions and reports what it measured, shown or not."""

import json

import pytest
import torch
import yaml
from halo_tiny import config_tree, write_inputs
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from halo.cli import app
from halo.data.local import DEMO_MARK
from halo.demo.demo import CONVERTED, EVEN, TEACHER, UNCALIBRATED, UNSCALED, claims
from halo.evaluation.paired import bits_ratio, recall_difference


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo")
    write_inputs(directory)
    tree = config_tree(directory) | {"eval": config_tree(directory)["eval"] | {"multiples": [1, 4]}}
    # Without null in the grid a scale is always chosen, so that its absence can be compared.
    tree["scale"] = tree["scale"] | {"grid": [10, 100]}
    tree["threads"] = 2  # so that two conversions run at the same time
    (directory / "demo.yaml").write_text(yaml.safe_dump(tree))
    arguments = ["demo", "--config", str(directory / "demo.yaml"), "--out", str(directory / "a run")]
    threads = torch.get_num_threads()
    result = CliRunner().invoke(app, arguments)
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    return directory / "a run", result.output


def test_demo_compares_five_models(demo):
    out, output = demo
    record = json.loads((out / "demo.json").read_text())
    assert [(row["model"], row["multiple"]) for row in record["rows"]] == [
        (label, multiple) for label in (TEACHER, CONVERTED, UNSCALED, EVEN, UNCALIBRATED) for multiple in (1, 4)
    ]
    assert record["layers"][EVEN] == [0] and len(record["layers"][CONVERTED]) == 1
    assert len(record["claims"]) == 7 and "needle recall" in output
    # The second conversion starts from the aligned twins of the first.
    assert "even/align" not in record["seconds"] and record["seconds"]["selected/align"] >= 0
    assert record["layers"][UNCALIBRATED] == record["layers"][CONVERTED]
    assert not (out / "uncalibrated" / "calibrate" / "mixers.safetensors").exists()


def test_demo_leaves_report_plot_and_checkpoint(demo):
    out, _ = demo
    text = (out / "demo.md").read_text()
    assert "evenly spaced" in text and "## Claims" in text
    assert (out / DEMO_MARK).is_file()  # so that no other run reads these files as text
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    (out / "demo.md").unlink()
    assert CliRunner().invoke(app, ["report", str(out)]).exit_code == 0
    assert (out / "demo.md").read_text() == text
    model = AutoModelForCausalLM.from_pretrained(out / "selected" / "model")
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False).shape == (1, 6)


def rows_of(recall, bits):
    """Return rows of one length each, with four episodes of the same mean recall and two windows of text."""
    return [
        {"model": model, "multiple": multiple, "recall": value, "episode_recall": [value] * 4}
        | {"bits_per_byte": bits[model], "window_bits": [100 * bits[model], 120 * bits[model]]}
        for (model, multiple), value in recall.items()
    ]


def test_claims_follow_the_numbers():
    bits = dict.fromkeys((TEACHER, CONVERTED, UNSCALED, EVEN), 2.0) | {UNCALIBRATED: 2.1}
    recall = {(TEACHER, 1): 1.0, (CONVERTED, 1): 0.98, (UNSCALED, 1): 0.95, (EVEN, 1): 0.9, (UNCALIBRATED, 1): 0.9}
    recall |= {(TEACHER, 4): 0.1, (CONVERTED, 4): 0.8, (UNSCALED, 4): 0.85, (EVEN, 4): 0.75}
    # bits, recall at 1 x and 4 x, above the teacher, with the scale, above evenly spaced, calibrated
    assert [claim["shown"] for claim in claims(rows_of(recall, bits))] == [True, True, False, True, False, True, True]
    recall |= {(CONVERTED, 4): 0.1}
    shown = [claim["shown"] for claim in claims(rows_of(recall, bits | {CONVERTED: 2.11}))]
    assert shown == [False, True, False, True, False, False, False]


def test_differences_are_paired():
    easy, hard = {"episode_recall": [1.0, 0.5, 0.0]}, {"episode_recall": [0.75, 0.25, -0.25]}
    assert recall_difference(easy, hard) == (0.25, 0.0)
    ratio, error = bits_ratio({"window_bits": [11.0, 99.0, 440.0]}, {"window_bits": [10.0, 90.0, 400.0]})
    assert ratio == pytest.approx(1.1) and error == pytest.approx(0, abs=1e-15)
    with pytest.raises(ValueError, match="paired: episode_recall of both rows must have the same length, got 3 and 1"):
        recall_difference(easy, {"episode_recall": [1.0]})
