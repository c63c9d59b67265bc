"""Published sweeps give the published orders of layers, and a file that is no sweep is refused with its place.

published_sweeps/ has the averages of the sweeps that come with the published code, recomputed from its logs. The orders
are those of table 7 of arXiv 2601.22156, which needs another eps for the largest model.
"""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from halo.cli import app
from halo.config import default_config
from halo.replay import read_sweep, replay
from halo.selection.settings import SelectSettings
from halo.settings import HaloError

SWEEPS = Path(__file__).with_name("published_sweeps")
ORDERS = {
    "hypenet-2b": "3 21 2 9 25 6 8 19 16 24 12 26 23 11 27 14 18 4 7 17 13 15 20 10 22 1 0 5",
    "hypenet-5b": "0 7 1 33 24 15 34 22 14 31 5 21 23 16 20 2 18 19 32 27 13 25 30 6 29 17 11 35 8 12 9 10 26 28 4 3",
    "hypenet-9b": "10 6 7 24 33 2 4 1 34 22 13 26 35 20 31 15 9 29 14 5 3 17 23 28 30 21 25 18 8 11 32 12 0 19 27 16",
}
EPS = {"hypenet-2b": 1e-3, "hypenet-5b": 1e-3, "hypenet-9b": 1e-6}
# By the published code, with its eps of 1e-10 and its clip.
BY_CODE = {"hypenet-2b": [3, 8, 2, 9, 21, 25, 6], "hypenet-5b": [0, 7, 1, 33, 24, 15, 34, 22, 14]}


def order(name):
    return [int(layer) for layer in ORDERS[name].split()]


@pytest.mark.parametrize("name", ORDERS)
def test_published_sweep_gives_the_published_order(name):
    chosen = replay(SWEEPS / f"{name}.csv", SelectSettings(policy="halo", eps=EPS[name]))
    assert chosen.order == order(name)
    assert chosen.layers == sorted(order(name)[: len(chosen.order) // 4])


@pytest.mark.parametrize("name", BY_CODE)
def test_published_code_gives_the_same_layers_in_another_order(name):
    chosen = replay(SWEEPS / f"{name}.csv", SelectSettings(policy="halo", eps=1e-10, clip=50))
    assert chosen.order[: len(BY_CODE[name])] == BY_CODE[name] and chosen.scores.max() == 50
    assert chosen.layers == sorted(order(name)[: len(chosen.layers)])


def test_large_eps_changes_the_choice_of_the_largest_model():
    kept = replay(SWEEPS / "hypenet-9b.csv", SelectSettings(policy="halo", eps=1e-3)).layers
    assert set(kept) - set(order("hypenet-9b")[:9]) == {22}


def test_difference_keeps_the_published_layers_of_4b():
    kept = replay(SWEEPS / "hypenet-5b.csv", SelectSettings(policy="difference")).layers
    assert kept == sorted(order("hypenet-5b")[:9])


def test_sweeps_have_the_ranges_of_the_logs():
    ranges = {"hypenet-2b": (0.634, 0.743, 0.311, 0.584), "hypenet-9b": (0.771, 0.809, 0.556, 0.712)}
    for name, expected in ranges.items():
        recall, language = read_sweep(SWEEPS / f"{name}.csv")
        assert (recall.min(), recall.max(), language.min(), language.max()) == pytest.approx(expected, abs=6e-4)


def test_json_and_csv_are_the_same(tmp_path):
    recall, language = read_sweep(SWEEPS / "hypenet-2b.csv")
    rows = [
        {"layer": i, "recall": r, "language": c}
        for i, (r, c) in enumerate(zip(recall.tolist(), language.tolist(), strict=True))
    ]
    (tmp_path / "sweep.json").write_text(json.dumps(rows[::-1]))
    for ours, theirs in zip(read_sweep(tmp_path / "sweep.json"), (recall, language), strict=True):
        assert (ours == theirs).all()


def test_command():
    arguments = ["select", "--replay", str(SWEEPS / "hypenet-2b.csv"), "--set", "select.policy=halo"]
    printed = CliRunner().invoke(app, [*arguments, "--set", "select.eps=1e-3"])
    assert printed.exit_code == 0 and "select.layers: [2, 3, 6, 8, 9, 21, 25]" in printed.stdout
    assert [line.split()[1] for line in printed.stdout.splitlines() if line.startswith("*")] == ORDERS[
        "hypenet-2b"
    ].split()[:7]
    by_default = CliRunner().invoke(app, [*arguments[:3], "--set", "select.eps=1e-3"])
    assert by_default.stdout == printed.stdout
    fewer = CliRunner().invoke(app, [*arguments, "--set", "select.keep=2", "--config", "hypenet-2b"])
    assert "select.layers: [3, 8]" in fewer.stdout
    assert "layer, recall, language" in " ".join(CliRunner().invoke(app, ["select", "--help"]).stdout.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "select.policy=ratio"], "select.policy: must be halo or difference to replay averages, got ratio"),
        (["--set", "select.keep=40"], "select.keep: must be at most the teacher's 28 layers, got 40"),
        (["--set", "select.eps=0"], "--set: select.eps: must be greater than 0, got 0"),
        (["--out", "x"], "select: --out must come without --replay, which writes nothing"),
    ],
)
def test_wrong_settings_are_one_line(arguments, message):
    result = CliRunner().invoke(app, ["select", "--replay", str(SWEEPS / "hypenet-2b.csv"), *arguments])
    assert result.exit_code == 2 and result.stderr == f"halo: {message}\n"


def test_neither_configuration_nor_sweep():
    result = CliRunner().invoke(app, ["select"])
    assert result.exit_code == 2 and result.stderr == "halo: select: must be given --config or --replay\n"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "layer,recall\n0,1", "line 2 must have layer, recall, language, got {'layer': '0', 'recall': '1'}"),
        ("a.csv", "layer,recall,language\n0,1,0.5\n# no\n0,1,0.5", "line 4 must have a layer below 8192 of its own"),
        ("a.csv", "layer,recall,language\n0,70.1,0.5", "line 2 must have recall and language from 0 to 1, got '70.1'"),
        ("a.csv", "layer,recall,language\n0,nan,0.5", "line 2 must have recall and language from 0 to 1, got 'nan'"),
        (
            "a.csv",
            "layer,recall,language\n0,0.5",
            "line 2 must have recall and language from 0 to 1, got '0.5' and None",
        ),
        ("a.csv", "layer,recall,language\n1,0.5,0.5", "must have every layer from 0 on, got none for [0]"),
        ("a.csv", "", "must have every layer from 0 on, got none for [0]"),
        ("a.json", "{}", "must be a list of objects with layer, recall, language, got dict"),
        ("a.json", "[[0]]", "entry 1 must have layer, recall, language, got [0]"),
        ("a.json", "[", "must be JSON"),
    ],
)
def test_file_that_is_no_sweep(name, text, message, tmp_path):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(HaloError) as error:
        read_sweep(path)
    assert str(error.value).startswith(f"{path}: {message}")


def test_missing_file(tmp_path):
    with pytest.raises(HaloError, match="must be a readable text file"):
        read_sweep(tmp_path / "nowhere.csv")


def test_defaults_need_no_file():
    assert default_config(("select.eps=0.5",)).select.eps == 0.5
