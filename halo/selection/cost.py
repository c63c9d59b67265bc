"""The cost of a choice of layers, known before anything runs: passes over the samples, tokens and operations."""

from dataclasses import asdict, dataclass
from typing import Any

from halo.flops import BACKWARD, LayerSize, ModelSize
from halo.selection.settings import SelectSettings


@dataclass(frozen=True)
class Runs:
    """How many variants are measured.

    Attributes:
        teachers: The teacher, and the teacher with one layer changed.
        students: Models in the student's form.
        further: At most so many more of them, if exchanges succeed.
        training_tokens: Of the gates of policy joint, all seeds together.
    """

    teachers: int = 0
    students: int = 0
    further: int = 0
    training_tokens: int = 0

    def __add__(self, other: "Runs") -> "Runs":
        return Runs(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class Cost:
    """Tokens that models process, and floating-point operations, at most.

    Attributes:
        runs: What is measured and trained.
        run_tokens: Of one pass over the samples.
        tokens: Of all passes and of training.
        flops: Of the same.
    """

    runs: Runs
    run_tokens: int
    tokens: int
    flops: float

    @property
    def passes(self) -> int:
        """Passes over the samples, at most."""
        return self.runs.teachers + self.runs.students + self.runs.further

    def plain(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        return asdict(self) | {"passes": self.passes}

    def line(self) -> str:
        """Say it in one line."""
        runs = self.runs
        least = self.passes - runs.further
        passes = f"{least:,} to {self.passes:,}" if runs.further else f"{least:,}"
        training = f" and {runs.training_tokens:,} tokens of training" if runs.training_tokens else ""
        most = "at most " if runs.further else ""
        return (
            f"{passes} passes over {self.run_tokens:,} tokens{training}: {most}{self.tokens:,} tokens, "
            f"{self.flops:.1e} FLOPs"
        )


def cost_of(
    runs: Runs, settings: SelectSettings, teacher: ModelSize, twins: ModelSize, student: ModelSize, width: int
) -> Cost:
    """Compute the cost of a choice.

    Args:
        runs: What is measured and trained.
        settings: The samples.
        teacher: The teacher.
        twins: The student without attention.
        student: The student with as many attention layers as are kept.
        width: Bytes of a hidden state's element, by which the teacher's hidden states fit into the cache or do not.
    """
    text = settings.language_samples * settings.language_length
    episodes = settings.recall_samples * settings.recall_length
    parts = ((text, settings.language_length), (episodes, settings.recall_length))

    def forward(model: ModelSize) -> float:
        return sum(tokens * model.forward(length) for tokens, length in parts)

    passes = runs.teachers + runs.students + runs.further
    cached = (text + episodes) * teacher.hidden * width <= settings.cache_gib * 2**30
    flops = runs.teachers * forward(teacher) + (runs.students + runs.further) * forward(student)
    flops += (min(passes, 1) if cached else passes) * forward(teacher)
    flops += passes * 2 * (text + episodes) * teacher.head()  # logits of the variant and of the teacher
    if runs.training_tokens:
        flops += runs.training_tokens * gate_flops(teacher, twins, settings.joint_length)
    return Cost(runs, text + episodes, passes * (text + episodes) + runs.training_tokens, flops)


def gate_flops(teacher: ModelSize, twins: ModelSize, length: int) -> float:
    """Return the operations per token of a training step of the gates.

    Every layer runs attention and twin, forward and backward; no weight has a gradient.
    """

    def mixer(layer: LayerSize) -> float:
        return 4.0 * layer.mixer_weights + (1 + BACKWARD) * layer.mixing(length)

    layers = sum(
        mixer(attention) + mixer(twin) + 4.0 * attention.mlp_weights
        for attention, twin in zip(teacher.layers, twins.layers, strict=True)
    )
    return teacher.forward(length) + layers + 3 * teacher.head()
