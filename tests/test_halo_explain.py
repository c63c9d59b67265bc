"""`halo config`: every key has a meaning, and its value is traced to the file, to --set or to the default."""

import pytest
import yaml
from halo_tiny import config_tree
from typer.testing import CliRunner

from halo.cli import app
from halo.config import Config
from halo.data.settings import SourceSettings
from halo.explain import explain, sections
from halo.settings import HOW, LossSettings, Settings, TrainingSettings

MODELS = [Config, SourceSettings, TrainingSettings, LossSettings, *(model for _, model in sections())]


@pytest.fixture
def path(tmp_path):
    written = tmp_path / "run.yaml"
    written.write_text(yaml.safe_dump(config_tree(tmp_path)))
    return str(written)


def found(path, *overrides):
    return {f"{key.section}.{key.name}".lstrip("."): key for key in explain(path, overrides)}


def test_sections_are_those_of_the_configuration():
    assert [name for name, _ in sections()] == [
        "data",
        "calibrate",
        "align",
        "select",
        "distill",
        "finetune",
        "scale",
        "eval",
    ]
    assert set(Settings.__subclasses__()) <= set(MODELS)


@pytest.mark.parametrize("model", MODELS)
def test_every_key_has_a_meaning(model):
    nested = dict(sections(model))
    missing = [name for name, field in model.model_fields.items() if not field.description and name not in nested]
    assert not missing
    assert model.__doc__ and model.__doc__ != Settings.__doc__


def test_every_key_is_listed_with_its_mark(path):
    keys = found(path)
    for section, model in sections():
        for name, field in model.model_fields.items():
            assert keys[f"{section}.{name}"].may_change == (field.json_schema_extra == HOW)
    assert set(Config.model_fields) - dict(sections()).keys() <= keys.keys()
    assert keys["align.micro_batch"].may_change and not keys["align.batch"].may_change


def test_value_default_and_source(path):
    keys = found(path, "align.steps=9", "scale={length: 96}")
    assert (keys["align.steps"].value, keys["align.steps"].default, keys["align.steps"].source) == (
        "9",
        "20000",
        "--set",
    )
    assert (keys["align.length"].value, keys["align.length"].source) == ("48", "file")
    assert (keys["distill.clip"].value, keys["distill.clip"].default, keys["distill.clip"].source) == (
        "1",
        "1",
        "default",
    )
    assert keys["teacher"].default == "required" and keys["teacher"].source == "file"
    # The section is replaced as a whole, so its other keys are no longer those of the file.
    assert (keys["scale.length"].source, keys["scale.documents"].source) == ("--set", "default")
    assert keys["scale.grid"].value == "[null, 30, 100, 300, 500, 600, 900, 2000]"


def test_sources_with_weights_count_as_one_key(tmp_path):
    tree = config_tree(tmp_path) | {"data": {"source": [{"source": "a", "weight": 2}, "b"]}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    key = found(str(path))["data.source"]
    assert key.source == "file" and key.value == '[{"source": "a", "weight": 2}, {"source": "b"}]'


def test_command(path):
    printed = CliRunner().invoke(app, ["config", "--config", path, "--set", "seed=3"])
    assert printed.exit_code == 0
    rows = [line.split() for line in printed.stdout.splitlines()]
    assert ["seed", "3", "[0]", "--set", "seed", "of", "all", "orders,", "samples", "and", "initialisations"] in rows
    assert any(row[:3] == ["*", "micro_batch", "1"] for row in rows)  # finetune's
    assert "select: How to choose the layers that stay softmax attention." in printed.stdout.splitlines()


def test_defaults_without_a_file():
    printed = CliRunner().invoke(app, ["config"])
    assert printed.exit_code == 0 and {key.source for key in explain()} == {"default"}
    rows = [line.split()[:4] for line in printed.stdout.splitlines()]
    assert ["teacher", "required", "[required]", "default"] in rows


def test_mistake_is_one_line(path):
    printed = CliRunner().invoke(app, ["config", "--config", path, "--set", "align.stepz=3"])
    assert printed.exit_code == 2
    assert printed.stderr == f"halo: {path}: align.stepz: is not a key of this section; did you mean align.steps?\n"
