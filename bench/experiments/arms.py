"""Experiments: arms, which are conversions that differ in a few settings, over several seeds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from halo.pipeline import Pipeline

Row = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One conversion.

    Attributes:
        name: Its name, which is that of its directory too.
        settings: Keys of the configuration such as "align.steps", and their values.
        base: Another arm of the same seed whose recurrent layers are used, instead of transfer to align.
        last: The last stage to run.
        alter: Changes the results of transfer before the other stages run; must be repeatable.
        measure: Returns what is recorded, as plain JSON.
        only_seed: The one seed to run with, for long trainings; None for all.
    """

    name: str
    measure: Callable[[Pipeline], Row]
    settings: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = None
    last: str = "scale"
    alter: Callable[[Pipeline], None] | None = None
    only_seed: int | None = None


@dataclass(frozen=True)
class Experiment:
    """A question and the conversions that answer it.

    Attributes:
        name: Its name on the command line.
        question: One line.
        arms: In the order in which they run; an arm comes after its base.
        tables: Returns Markdown tables made of the rows.
        config: A shipped configuration or a YAML file.
        settings: Keys of the configuration that all arms share.
        seeds: How many seeds are run by default.
    """

    name: str
    question: str
    arms: Sequence[Arm]
    tables: Callable[[list[Row]], str]
    config: str = "demo"
    settings: Mapping[str, Any] = field(default_factory=dict)
    seeds: int = 3

    def runs(self, seeds: Sequence[int]) -> list[tuple[int, Arm]]:
        """Return the seed and the arm of every run, in the order of the seeds."""
        return [(seed, arm) for seed in seeds for arm in self.arms if arm.only_seed in (None, seed)]

    def arm(self, name: str) -> Arm:
        """Return an arm by its name."""
        return next(arm for arm in self.arms if arm.name == name)


# A conversion of the demo's teacher (8 layers) in a minute, on sequences of 256 tokens. Whatever the demo is tuned in
# is stated here, so that a change of the demo changes no experiment.
SHORT: dict[str, Any] = {
    "threads": 1,
    "mixer": "lightning",
    "align.steps": 60,
    "align.batch": 16,
    "align.learning_rate": 3e-3,
    "select.policy": "given",
    "select.layers": [1, 7],
    "select.recall_samples": 48,
    "select.language_samples": 32,
    "distill.steps": 100,
    "distill.batch": 16,
    "distill.learning_rate": 2e-3,
    "finetune.steps": 20,
    "scale.grid": [None, 100, 300, 1000],
    "scale.documents": 4,
    "eval.multiples": [1, 4, 16],
    "eval.recall_samples": 32,
    "eval.recall_tokens": 65_536,
    "eval.text_tokens": 16_384,
}
