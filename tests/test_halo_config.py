"""An error in a configuration is one line that names file, key, rule and value; the shipped files are valid."""

import pytest
import yaml
from halo_tiny import config_tree
from typer.testing import CliRunner

from halo.cli import app
from halo.config import Config, load_config, make_config
from halo.settings import HaloError
from halo.stages import STAGE_HELP

PAPER = {
    "hypenet-2b": ("Qwen/Qwen3-1.7B-Base", 7, 1e-4),
    "hypenet-5b": ("Qwen/Qwen3-4B-Base", 9, 5e-5),
    "hypenet-9b": ("Qwen/Qwen3-8B-Base", 9, 3e-5),
}


def halo(*arguments):
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def write(tmp_path):
    def write_tree(tree):
        path = tmp_path / "my config.yaml"
        path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
        return path

    return write_tree


# (change of the valid configuration, expected message after the file name)
MISTAKES = {
    "unknown key": ({"alin": {}}, "alin: is not a key of a configuration; did you mean align?"),
    "unknown key in a section": (
        {"align": {"stepz": 3}},
        "align.stepz: is not a key of this section; did you mean align.steps?",
    ),
    "key of a section, outside it": (
        {"recall_length": 3},
        "recall_length: is not a key of a configuration; did you mean select.recall_length?",
    ),
    "path of a wrong type": ({"out": ["x"]}, "out: must be a path, got ['x']"),
    "missing key": ({"data": {}}, "data.source: must be given"),
    "wrong type": ({"seed": "many"}, "seed: must be a valid integer, unable to parse string as an integer, got 'many'"),
    "out of range": ({"align": {"steps": -1}}, "align.steps: must be greater than or equal to 0, got -1"),
    "not a choice": ({"mixer": "mamba"}, "mixer: must be 'lightning', 'gdn' or 'mamba2', got 'mamba'"),
    "not a device": ({"device": "tpu"}, r"device: must match pattern '^(auto|cpu|cuda(:\d+)?)$', got 'tpu'"),
    "too few": ({"scale": {"grid": []}}, "scale.grid: must have at least 1 item after validation, not 0, got []"),
    "micro batch": ({"distill": {"batch": 6, "micro_batch": 4}}, "distill: micro_batch must divide batch (6), got 4"),
    "scale grid": ({"scale": {"grid": [1.0]}}, "scale: grid must hold numbers of at least 1.01 or null, got 1.0"),
}


def test_all_mistakes_are_listed(write, tmp_path):
    path = write(config_tree(tmp_path) | {"alin": {}, "seed": -1, "data": {"path": "x"}})
    result = halo("convert", "--config", str(path))
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        f"halo: {path}: 4 mistakes",
        "  seed: must be greater than or equal to 0, got -1",
        "  data.source: must be given",
        "  data.path: is not a key of this section",
        "  alin: is not a key of a configuration; did you mean align?",
    ]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("finetune.betas=[1.5, 0.9]", "finetune: betas must be in [0, 1), got [1.5, 0.9]"),
        ("seed=1180591620717411303424", "seed: must be less than 2147483648"),
        ("scale.grid=[.inf]", "scale.grid.0: must be a finite number"),
        ("scale.grid=[300, .nan]", "scale.grid.1: must be a finite number"),
        ("scale.grid=[1.0000001]", "scale: grid must hold numbers of at least 1.01 or null, got 1.0000001"),
        ("threads=10000", "threads: must be less than or equal to 1024"),
        ("finetune.vocab_chunk=1", "finetune.vocab_chunk: must be greater than or equal to 256"),
        ("finetune.steps=1" + "0" * 30, "finetune.steps: must be less than or equal to 1000000000"),
        ("architecture.vocab_size=3", "architecture: keys must be among attn_use_qk_norm, attn_use_rope,"),
        ("architecture.attn_use_rope='no'", "architecture: attn_use_rope must be true or false, got 'no'"),
        ("align.steps=[1", "--set: the value of align.steps must be YAML, got [1"),
        ("data=./text", "data: must be a section of keys, such as data.source, got './text'"),
    ],
)
def test_values_that_torch_would_refuse_late_are_refused_here(change, expected, write, tmp_path):
    path = write(config_tree(tmp_path))
    result = halo("convert", "--config", str(path), "--set", change)
    assert result.exit_code == 2 and expected in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line(name, write, tmp_path):
    change, expected = MISTAKES[name]
    path = write(config_tree(tmp_path) | change)
    result = halo("convert", "--config", str(path))
    assert result.exit_code == 2
    assert result.stderr == f"halo: {path}: {expected}\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1", "must be YAML"),
        ("- 1", "must be a mapping of keys, got list"),
        ("teacher: x\nout: y", "data: must be given"),
    ],
)
def test_file_that_is_no_config(text, expected, write):
    result = halo("align", "--config", str(write(text)))
    assert result.exit_code == 2 and expected in result.stderr and _one_line(result.stderr)


def test_missing_file_names_the_shipped_ones():
    result = halo("align", "--config", "nowhere.yaml")
    assert result.exit_code == 2 and _one_line(result.stderr)
    names = "demo, hypenet-2b, hypenet-2b-fast, hypenet-5b, hypenet-5b-fast, hypenet-9b, hypenet-9b-fast, smollm2-135m"
    assert f"nowhere.yaml: must be an existing file or one of {names}" in result.stderr


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("align.steps", "--set: must look like key=value, got align.steps"),
        ("seed.x=1", "--set: seed.x: seed is not a section"),
        ("finetune.steps=x", "finetune.steps: must be a valid integer"),
    ],
)
def test_wrong_override(override, expected, write, tmp_path):
    result = halo("align", "--config", str(write(config_tree(tmp_path) | {"seed": 3})), "--set", override)
    assert result.exit_code == 2 and expected in result.stderr and _one_line(result.stderr)


def test_override_changes_one_key(write, tmp_path):
    path = write(config_tree(tmp_path))
    config = load_config(path, ("distill.steps=7", "scale.grid=[null, 50]", "data.isolate_documents=true"))
    assert config.distill.steps == 7 and config.scale.grid == [None, 50] and config.data.isolate_documents
    assert config.distill.batch == load_config(path).distill.batch


def test_override_of_a_section_that_an_alias_shares(write, tmp_path):
    tree = config_tree(tmp_path)
    assert tree["align"] is tree["distill"]  # so YAML has an anchor and an alias
    path = write(tree)
    assert "*id001" in path.read_text()
    config = load_config(path, ("align.steps=7",))
    assert (config.align.steps, config.distill.steps) == (7, 4)


def test_values_are_fixed_after_reading(tmp_path):
    config = make_config(config_tree(tmp_path))
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1


@pytest.mark.parametrize("name", [*PAPER, "demo"])
def test_shipped_config_is_valid(name):
    assert load_config(name).select.policy == "position"


@pytest.mark.parametrize("name", PAPER)
def test_shipped_recipe_is_the_published_one(name):
    config, (teacher, keep, rate) = load_config(name), PAPER[name]
    assert (config.teacher, config.select.keep, config.distill.learning_rate) == (teacher, keep, rate)
    tokens = [stage.steps * stage.batch * stage.length for stage in (config.align, config.distill, config.finetune)]
    assert tokens == [327_680_000, 983_040_000, 1_048_576_000]
    for stage in (config.align, config.distill, config.finetune):
        assert (stage.betas, stage.weight_decay, stage.warmup, stage.clip) == ((0.9, 0.95), 0.0, 50, 1.0)
        assert stage.final_learning_rate == 1e-5


def test_defaults_are_the_published_recipe():
    config = Config(teacher="x", out="y", data={"source": "z"})
    published = load_config("hypenet-2b")
    for section in ("align", "distill", "finetune"):
        ours, theirs = (getattr(c, section).model_dump() for c in (config, published))
        memory = {"micro_batch": None, "checkpoint_activations": None}
        assert ours | memory == theirs | memory


def test_help_lists_every_command():
    text = halo("--help").stdout
    for name in (*STAGE_HELP, "convert", "report", "demo"):
        assert name in text


def test_error_class_is_for_users():
    with pytest.raises(HaloError, match=r"^config: out: must be given$"):
        make_config({"teacher": "x", "data": {"source": "y"}})


def _one_line(text):
    return text.count("\n") == 1 and text.startswith("halo: ")


def test_key_given_twice_is_not_dropped(write):
    result = halo("convert", "--config", str(write("out: a\nalign: {steps: 1}\nalign: {length: 9}\n")))
    assert result.exit_code == 2
    assert result.stderr.endswith("my config.yaml: must be YAML: align is given twice at line 3\n")


def test_merged_keys_may_be_given_again(write, tmp_path):
    text = yaml.safe_dump(config_tree(tmp_path) | {"align": None, "distill": None})
    text = text.replace("align: null", "align: &a {steps: 5}").replace("distill: null", "distill: {<<: *a, steps: 6}")
    config = load_config(write(text))
    assert (config.align.steps, config.distill.steps) == (5, 6)
