"""The configuration of a conversion: a YAML file as checked models.

Every number of the paper's recipe (HALO, arXiv 2601.22156, section 4 and appendix) is a key here, with the paper's
value as its default; the files in halo/configs/ name their differences. A stage's section is in the stage's file.
"""

import difflib
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, PositiveInt, ValidationError, field_validator, model_validator

from halo.calibration.choice import chosen_parts
from halo.calibration.settings import CalibrateSettings
from halo.data import DataSettings
from halo.selection.settings import SelectSettings
from halo.settings import HOW, HaloError, Settings
from halo.stages.align import AlignSettings
from halo.stages.distill import DistillSettings
from halo.stages.evaluate import EvalSettings
from halo.stages.finetune import FinetuneSettings
from halo.stages.scale import ScaleSettings
from hypenet import HypeNetConfig

# Fields of HypeNetConfig by their beginnings that decide what the student's layers are made of.
ARCHITECTURE = ("attn_use_", "lightning_", "gdn_", "mamba2_")


class Config(Settings):
    """The configuration of one conversion."""

    teacher: str = Field(description='directory, .gguf file or Hugging Face name of a teacher, or "demo"')
    mixer: Literal["lightning", "gdn", "mamba2"] = Field("lightning", description="kind of the recurrent layers")
    architecture: dict[str, bool | int | str] = Field(
        {}, description="the student's other HypeNetConfig fields: attn_use_*, lightning_*, gdn_*, mamba2_*"
    )
    out: Path = Field(description="directory of all results")
    aligned: Path | None = Field(
        None, description="output of another conversion (or its align directory), used instead of training align"
    )
    seed: int = Field(0, ge=0, lt=2**31, description="seed of all orders, samples and initialisations")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="arithmetic of forward passes; auto: bf16 on CUDA and on CPUs that multiply it; "
        "trained weights are always fp32",
    )
    threads: PositiveInt | None = Field(
        None, le=1024, json_schema_extra=HOW, description="CPU threads; default: torch's choice"
    )
    tensorboard: bool = Field(False, json_schema_extra=HOW, description="write TensorBoard's event files too")
    data: DataSettings
    calibrate: CalibrateSettings = CalibrateSettings()
    align: AlignSettings = AlignSettings()
    select: SelectSettings = SelectSettings()
    distill: DistillSettings = DistillSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    scale: ScaleSettings = ScaleSettings()
    eval: EvalSettings = EvalSettings()

    @property
    def calibration_parts(self) -> tuple[str, ...]:
        """The parts of the calibration, in the order in which they are applied; none for `calibrate.parts` off."""
        gated = self.architecture.get(f"{self.mixer}_use_gate", True) is True
        return chosen_parts(self.calibrate.parts, self.mixer, gated)

    @property
    def attention_has_positions(self) -> bool:
        """Whether the student's attention layers have a rotary embedding, as they do not in HyPE."""
        return self.architecture.get("attn_use_rope", False) is True

    @field_validator("architecture")
    @classmethod
    def _known(cls, fields: dict[str, bool | int | str]) -> dict[str, bool | int | str]:
        known = [name for name in HypeNetConfig.__annotations__ if name.startswith(ARCHITECTURE)]
        for name, value in fields.items():
            if name not in known:
                raise ValueError(f"keys must be among {', '.join(known)}, got {name}")
            if "_use_" in name and not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false, got {value!r}")
        return fields

    @model_validator(mode="after")
    def _mixer_has_the_parts(self) -> Self:
        _ = self.calibration_parts
        return self


class UniqueKeys(yaml.SafeLoader):
    """A safe YAML loader that refuses a key given twice, of which YAML would drop the first without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping as a dict; keys that `<<` merges in may be given again."""
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_config(path: str | Path, overrides: tuple[str, ...] = ()) -> Config:
    """Read and check a configuration.

    Args:
        path: A YAML file, or the name of a shipped configuration such as "demo" or "hypenet-2b".
        overrides: Changes such as "distill.steps=10"; the value is read as YAML.

    Raises:
        HaloError: If the file cannot be read or has mistakes, all of which are listed.
    """
    tree, name = read_tree(path)
    for override in overrides:
        apply_override(tree, override)
    return make_config(tree, name)


def default_config(overrides: tuple[str, ...] = ()) -> Config:
    """Return the defaults with some keys changed, for what needs neither teacher nor data.

    Raises:
        HaloError: If a change has mistakes.
    """
    tree: dict[str, Any] = {"teacher": "none", "out": "none", "data": {"source": "none"}}
    for override in overrides:
        apply_override(tree, override)
    return make_config(tree, "--set")


def read_tree(path: str | Path) -> tuple[dict[str, Any], str]:
    """Read a configuration as plain data, unchecked, and return it with the path to name in messages.

    Args:
        path: As for `load_config`.

    Raises:
        HaloError: If it cannot be read.
    """
    path = find_config(path)
    try:
        tree = yaml.load(path.read_text("utf-8"), UniqueKeys) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark else ""
        raise HaloError(f"{path}: must be YAML: {getattr(error, 'problem', 'not readable')}{place}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise HaloError(f"{path}: must be a readable text file: {error}") from None
    if not isinstance(tree, dict):
        raise HaloError(f"{path}: must be a mapping of keys, got {type(tree).__name__}")
    return tree, str(path)


def make_config(tree: dict[str, Any], name: str = "config") -> Config:
    """Check a configuration given as plain data; `name` begins the message of a HaloError."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        mistakes = list(dict.fromkeys(_explain(mistake) for mistake in error.errors()))
        if len(mistakes) == 1:
            raise HaloError(f"{name}: {mistakes[0]}") from None
        raise HaloError("\n  ".join([f"{name}: {len(mistakes)} mistakes", *mistakes])) from None


def find_config(path: str | Path) -> Path:
    """Return the path itself if it is a file, else the shipped configuration of that name."""
    if Path(path).is_file():
        return Path(path)
    shipped = resources.files("halo") / "configs"
    names = sorted(entry.name.removesuffix(".yaml") for entry in shipped.iterdir() if entry.name.endswith(".yaml"))
    if str(path) in names:
        return Path(str(shipped / f"{path}.yaml"))
    raise HaloError(f"{path}: must be an existing file or one of {', '.join(names)}")


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Change one key of a configuration as plain data, by a text such as "distill.steps=10"."""
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise HaloError(f"--set: must look like key=value, got {override}")
    *sections, name = key.split(".")
    for section in sections:
        inner = tree.get(section, {})
        if not isinstance(inner, dict):
            raise HaloError(f"--set: {key}: {section} is not a section")
        tree[section] = dict(inner)  # a copy, since an alias in the file makes sections one and the same
        tree = tree[section]
    try:
        tree[name] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise HaloError(f"--set: the value of {key} must be YAML, got {value}") from None


def _explain(error: Mapping[str, Any]) -> str:
    """Format one of pydantic's errors as `key: rule, got value`."""
    parts = [str(part) for part in error["loc"] if not str(part).startswith(("function-", "constrained-"))]
    key, value = ".".join(parts) or "config", error["input"]
    if error["type"] == "extra_forbidden":
        place = "this section" if len(parts) > 1 else "a configuration"
        return f"{key}: is not a key of {place}{_suggestion(parts)}"
    if error["type"] == "missing":
        return f"{key}: must be given"
    if error["type"] == "model_type":
        return f"{key}: must be a section of keys, such as {key}.{_first_key(key)}, got {value!r}"
    if error["type"] == "path_type":
        return f"{key}: must be a path, got {value!r}"
    rule = re.sub(r"^(Value error, |(Input|String|List|Tuple) should )", "", error["msg"])
    if error["type"] == "value_error":
        return f"{key}: {rule}" if parts else rule
    shown = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:77]}..."
    return f"{key}: must {rule}, got {shown}"


def _suggestion(parts: list[str]) -> str:
    """Return the key that was probably meant, of the same section or another one, as an end of a message."""
    fields: Any = Config.model_fields
    sections = {name: field.annotation.model_fields for name, field in fields.items() if _is_section(field.annotation)}
    here = fields if len(parts) == 1 else sections.get(parts[0], {})
    near = difflib.get_close_matches(parts[-1], here, 1, 0.75)
    if near:
        return f"; did you mean {'.'.join([*parts[:-1], near[0]])}?"
    elsewhere = [name for name, keys in sections.items() if parts[-1] in keys]
    return f"; did you mean {elsewhere[0]}.{parts[-1]}?" if len(parts) == 1 and len(elsewhere) == 1 else ""


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Settings)


def _first_key(section: str) -> str:
    annotation = Config.model_fields[section].annotation
    return next(iter(annotation.model_fields)) if isinstance(annotation, type) else "key"
