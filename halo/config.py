"""The configuration of a conversion: the YAML file as checked models, and the error for a user's mistakes.

Every number of the paper's recipe (HALO, arXiv 2601.22156, section 4 and appendix) is a key here, with the paper's
value as its default; the files in halo/configs/ name their differences.
"""

import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from halo.data.settings import DataSettings
from halo.settings import HaloError, Settings

STAGE_HELP = {
    "transfer": "Build a recurrent twin of every attention layer from its weights.",
    "align": "Stage 1: train each twin to reproduce the output of its attention layer.",
    "select": "Choose the layers that stay attention, by replacing one layer at a time with its twin.",
    "distill": "Stage 2: train the hybrid to match the teacher's next-token distribution.",
    "finetune": "Stage 3: train on next-token loss with longer context.",
    "scale": "Choose the base of the attention scale on long documents, and write the final model.",
    "eval": "Measure recall and bits per byte at multiples of the training length.",
}


class TrainingSettings(Settings):
    """Hyperparameters of one training stage: AdamW, linear warm-up from 0, cosine decay to `final_learning_rate`."""

    steps: NonNegativeInt
    batch: PositiveInt = Field(description="sequences per optimizer step")
    micro_batch: PositiveInt | None = Field(None, description="sequences per forward pass; default: the whole batch")
    length: PositiveInt = Field(512, ge=2, description="tokens per sequence")
    learning_rate: float = Field(gt=0)
    final_learning_rate: float = Field(1e-5, ge=0)
    warmup: NonNegativeInt = 50
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, gt=0, description="gradient clipping norm")
    checkpoint_every: PositiveInt = 500
    log_every: PositiveInt = 10
    needle_ratio: float | None = Field(None, ge=0, le=1, description="overrides data.needle_ratio for this stage")

    @model_validator(mode="after")
    def _micro_batch_divides(self) -> Self:
        if self.micro_batch and self.batch % self.micro_batch:
            raise ValueError(f"micro_batch must divide batch ({self.batch})")
        return self


class AlignSettings(TrainingSettings):
    """Stage 1: each recurrent layer learns to map its attention layer's input to that layer's output."""

    steps: NonNegativeInt = 20_000
    batch: PositiveInt = 32
    learning_rate: float = Field(1e-3, gt=0)
    clip_scope: Literal["layer", "all"] = Field("layer", description="layers are independent, so clip each on its own")


class SelectSettings(Settings):
    """How to choose the layers that stay softmax attention."""

    keep: PositiveInt | None = Field(None, description="number of attention layers; default: a quarter")
    layers: list[NonNegativeInt] | None = Field(None, description="keep these and measure nothing")
    score: Literal["difference", "ratio", "paper", "even"] = "difference"
    language_weight: float = Field(1.0, ge=0, description="weight of the language drop in the difference score")
    eps: float = Field(1e-6, gt=0, description="added to the denominator of the paper's score")
    recall_samples: PositiveInt = Field(200, ge=2)
    recall_length: PositiveInt = 512
    language_samples: PositiveInt = Field(128, ge=2, description="held-out chunks")
    language_length: PositiveInt = Field(512, ge=2)
    batch: PositiveInt = 16
    bootstrap: PositiveInt = 1000
    stable_share: float = Field(0.8, gt=0, le=1, description="warn when a kept layer is kept in fewer resamples")


class LossSettings(TrainingSettings):
    """A stage whose loss runs over the vocabulary; it is computed in pieces to bound memory."""

    token_chunk: PositiveInt = Field(1024, description="tokens whose logits are in memory at a time")
    vocab_chunk: PositiveInt | None = Field(None, description="vocabulary entries whose logits are in memory at a time")
    checkpoint_activations: bool = Field(False, description="recompute each layer in backward to save memory")


class DistillSettings(LossSettings):
    """Stage 2: KL divergence from the teacher's next-token distribution; all weights are trained."""

    steps: NonNegativeInt = 20_000
    batch: PositiveInt = 96
    learning_rate: float = Field(1e-4, gt=0)
    gate_init: Literal["open", "random"] = Field(
        "open",
        description="open: new attention gates start without effect; random (the paper) halves the output at first",
    )


class FinetuneSettings(LossSettings):
    """Stage 3: next-token loss on longer context, without a teacher."""

    steps: NonNegativeInt = 500
    batch: PositiveInt = 128
    micro_batch: PositiveInt | None = 1
    length: PositiveInt = 16_384
    learning_rate: float = Field(1e-5, gt=0)


class ScaleSettings(Settings):
    """How to choose `a` in s_t = ln(t + a) / ln(a): by the loss on long held-out documents; null means no scale."""

    grid: list[float | None] = Field([None, 30, 100, 300, 500, 600, 900, 2000], min_length=1)
    length: PositiveInt = Field(32_768, ge=2)
    documents: PositiveInt = 16
    needle_ratio: float = Field(0.0, ge=0, le=1, description="share of the documents that are recall episodes")

    @model_validator(mode="after")
    def _bases_above_one(self) -> Self:
        for base in self.grid:
            if base is not None and base <= 1:
                raise ValueError(f"grid must hold numbers above 1 or null, got {base}")
        return self


class EvalSettings(Settings):
    """How to measure recall and bits per byte at multiples of the training length."""

    length: PositiveInt = Field(512, description="the training length, multiple 1")
    multiples: list[PositiveInt] = Field([1, 2, 4, 8, 16], min_length=1)
    recall_samples: PositiveInt = Field(100, description="episodes per length")
    recall_tokens: PositiveInt | None = Field(None, description="cap on the tokens of all episodes at one length")
    text_tokens: PositiveInt = Field(65_536, description="held-out tokens per length")


class Config(Settings):
    """The configuration of one conversion."""

    teacher: str = Field(description='directory or Hugging Face name of a Qwen3 with its tokenizer, or "demo"')
    mixer: Literal["lightning", "gdn"] = "lightning"
    out: Path = Field(description="directory of all results")
    aligned: Path | None = Field(
        None, description="output of another conversion (or its align directory), used instead of training align"
    )
    seed: int = Field(0, ge=0)
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="precision of the forward pass; weights are always fp32"
    )
    threads: PositiveInt | None = Field(None, description="CPU threads; default: torch's choice")
    data: DataSettings
    align: AlignSettings = AlignSettings()
    select: SelectSettings = SelectSettings()
    distill: DistillSettings = DistillSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    scale: ScaleSettings = ScaleSettings()
    eval: EvalSettings = EvalSettings()


def load_config(path: str | Path, overrides: tuple[str, ...] = ()) -> Config:
    """Read and check a configuration.

    Args:
        path: A YAML file, or the name of a shipped configuration such as "demo" or "hypenet-2b".
        overrides: Changes such as "distill.steps=10"; the value is read as YAML.

    Raises:
        HaloError: At the first mistake.
    """
    path = find_config(path)
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark else ""
        raise HaloError(f"{path}: must be YAML: {getattr(error, 'problem', 'not readable')}{place}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise HaloError(f"{path}: must be a readable text file: {error}") from None
    if not isinstance(tree, dict):
        raise HaloError(f"{path}: must be a mapping of keys, got {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    return make_config(tree, str(path))


def make_config(tree: dict[str, Any], name: str = "config") -> Config:
    """Check a configuration given as plain data; `name` begins the message of a HaloError."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise HaloError(f"{name}: {_explain(error.errors()[0])}") from None


def find_config(path: str | Path) -> Path:
    """Return the path itself if it is a file, else the shipped configuration of that name."""
    if Path(path).is_file():
        return Path(path)
    shipped = resources.files("halo") / "configs"
    names = sorted(entry.name.removesuffix(".yaml") for entry in shipped.iterdir() if entry.name.endswith(".yaml"))
    if str(path) in names:
        return Path(str(shipped / f"{path}.yaml"))
    raise HaloError(f"{path}: must be an existing file or one of {', '.join(names)}")


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise HaloError(f"--set: must look like key=value, got {override}")
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise HaloError(f"--set: {key}: {section} is not a section")
    tree[name] = yaml.safe_load(value)


def _explain(error: Mapping[str, Any]) -> str:
    """Format one of pydantic's errors as `key: rule, got value`."""
    parts = [str(part) for part in error["loc"] if not str(part).startswith(("function-", "constrained-"))]
    key, value = ".".join(parts) or "config", error["input"]
    if error["type"] == "extra_forbidden":
        return f"{key}: is not a key of this section"
    if error["type"] == "missing":
        return f"{key}: must be given"
    rule = re.sub(r"^(Value error, |(Input|String|List|Tuple) should )", "", error["msg"])
    if error["type"] == "value_error":
        return f"{key}: {rule}"
    shown = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:77]}..."
    return f"{key}: must {rule}, got {shown}"
