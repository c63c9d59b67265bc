"""The command `halo config`: every key with its meaning, value, default and source."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo

from halo.columns import columns
from halo.config import Config, apply_override, make_config, read_tree
from halo.settings import HOW, Settings

REQUIRED = "required"


@dataclass(frozen=True)
class Key:
    """One key of a configuration.

    Attributes:
        section: Its section, or "" for a key outside of all.
        name: Its name in the section.
        value, default: As they would be written in YAML; `default` is "required" if there is none.
        source: "default", "file" or "--set".
        may_change: Whether a run can be continued with another value.
        meaning: One line.
    """

    section: str
    name: str
    value: str
    default: str
    source: str
    may_change: bool
    meaning: str


def explain(path: str | None = None, overrides: tuple[str, ...] = ()) -> list[Key]:
    """Return every key of a configuration.

    Args:
        path: As for `halo.config.load_config`; None for the defaults alone, without checks.
        overrides: Changes such as "distill.steps=10".

    Raises:
        HaloError: As `load_config`.
    """
    tree: dict[str, Any] = {}
    name = "config"
    if path is not None:
        tree, name = read_tree(path)
    given = {key: "file" for key in _paths(tree)}
    for override in overrides:
        apply_override(tree, override)
        key = override.partition("=")[0]
        given = {other: source for other, source in given.items() if not other.startswith(f"{key}.")}
        changed: dict[str, Any] = {}
        apply_override(changed, override)
        given |= dict.fromkeys(_paths(changed), "--set")
    values = make_config(tree, name).model_dump(mode="json") if path is not None else tree
    return list(_keys(Config, values, given, ""))


def lines(keys: list[Key]) -> list[str]:
    """Format keys as text: a table for each section, in which * marks what may change when a run is continued."""
    printed = []
    for section in dict.fromkeys(key.section for key in keys):
        own = [key for key in keys if key.section == section]
        if section:
            printed += ["", f"{section}: {_meaning(Config.model_fields[section])}"]
        rows = [
            ["*" if key.may_change else " ", key.name, key.value, f"[{key.default}]", key.source, key.meaning]
            for key in own
        ]
        printed += columns(rows, left=6)
    return [*printed, "", "value, [default], source. * may change when a run is continued"]


def sections(model: type[Settings] = Config) -> Iterator[tuple[str, type[Settings]]]:
    """Yield the sections of a configuration, by name."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            yield name, field.annotation


def _keys(model: type[Settings], values: dict[str, Any], given: dict[str, str], section: str) -> Iterator[Key]:
    nested = dict(sections(model))
    for name, field in model.model_fields.items():
        if name in nested:
            continue
        default = REQUIRED if field.is_required() else _written(_plain(model, name, field))
        value = _written(values[name]) if name in values else default
        path = f"{section}.{name}" if section else name
        source = given.get(path) or next((given[p] for p in given if p.startswith(f"{path}.")), "default")
        yield Key(section, name, value, default, source, field.json_schema_extra == HOW, _meaning(field))
    for name, inner in nested.items():
        yield from _keys(inner, values.get(name) or {}, given, name)


def _plain(model: type[Settings], name: str, field: FieldInfo) -> Any:
    """Return a default as plain JSON."""
    built = model.model_construct(**{name: field.get_default(call_default_factory=True)})
    return built.model_dump(mode="json", include={name})[name]


def _meaning(field: FieldInfo) -> str:
    """Return the description of a key, or the first line of the section's docstring."""
    if field.description:
        return field.description
    document = getattr(field.annotation, "__doc__", None) or ""
    return document.strip().splitlines()[0] if document.strip() else ""


def _written(value: Any) -> str:
    """Format a plain value as YAML would have it on one line; whole numbers without a fraction."""
    return value if isinstance(value, str) else re.sub(r"(\d)\.0(?=[,\]}]|$)", r"\1", json.dumps(value))


def _paths(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict) and not prefix:
            yield from _paths(value, f"{key}.")
        else:
            yield f"{prefix}{key}"
