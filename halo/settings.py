"""What every section of a configuration is made of: checked models, mistakes, and a training stage's numbers."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from halo.errors import HaloError as HaloError

# Marks a key that says how a result is computed (memory, logging, checkpoints) and not what it is: it may change when a
# run is continued. As in `micro_batch: PositiveInt | None = Field(None, json_schema_extra=HOW)`.
HOW: dict[str, Any] = {"how": True}


class Settings(BaseModel):
    """Base of every section: unknown keys are errors, values are immutable, and numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    def identity(self) -> dict[str, Any]:
        """Return the values that decide what the result is, as plain JSON: all but those marked HOW."""
        plain = self.model_dump(mode="json")
        fields = type(self).model_fields
        return {name: value for name, value in plain.items() if fields[name].json_schema_extra != HOW}


class TrainingSettings(Settings):
    """Hyperparameters of one training stage: AdamW, linear warm-up from 0, cosine decay to `final_learning_rate`."""

    steps: NonNegativeInt = Field(le=10**9, description="optimizer steps")
    batch: PositiveInt = Field(description="sequences per optimizer step, over all processes")
    micro_batch: PositiveInt | None = Field(
        None, json_schema_extra=HOW, description="sequences per forward pass of a process; default: its whole share"
    )
    sync_every_micro_batch: bool | Literal["auto"] = Field(
        "auto",
        json_schema_extra=HOW,
        description="several processes: reduce gradients after every micro-batch, so that none keeps all of them; "
        "auto: where whole gradients do not fit",
    )
    length: PositiveInt = Field(512, ge=2, description="tokens per sequence")
    learning_rate: float = Field(gt=0, description="peak learning rate")
    final_learning_rate: float = Field(1e-5, ge=0, description="learning rate of the last step")
    warmup: NonNegativeInt = Field(50, description="steps of linear warm-up")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's decay rates")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay, of matrices alone")
    clip: float = Field(1.0, gt=0, description="gradient clipping norm")
    needle_ratio: float | None = Field(
        None, ge=0, le=1, description="share of recall episodes in this stage; default: data.needle_ratio"
    )
    log_every: PositiveInt = Field(10, json_schema_extra=HOW, description="steps between lines of metrics.jsonl")
    held_out_every: PositiveInt | None = Field(
        None, json_schema_extra=HOW, description="steps between measurements of the loss on held-out text; null: none"
    )
    held_out_samples: PositiveInt = Field(
        32, json_schema_extra=HOW, description="sequences of held-out text for them, of the stage's length"
    )
    checkpoint_minutes: float = Field(15.0, gt=0, json_schema_extra=HOW, description="minutes between checkpoints")
    checkpoint_every: PositiveInt | None = Field(
        None, json_schema_extra=HOW, description="steps between checkpoints, in addition to checkpoint_minutes"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.micro_batch and self.batch % self.micro_batch:
            raise ValueError(f"micro_batch must divide batch ({self.batch}), got {self.micro_batch}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {list(self.betas)}")
        return self


class LossSettings(TrainingSettings):
    """A stage whose loss runs over the vocabulary; it is computed in pieces to bound memory."""

    token_chunk: PositiveInt = Field(
        512, json_schema_extra=HOW, description="tokens whose logits are in memory at a time"
    )
    vocab_chunk: PositiveInt | None = Field(
        None, ge=256, json_schema_extra=HOW, description="vocabulary entries whose logits are in memory at a time"
    )
    checkpoint_activations: bool = Field(
        False, json_schema_extra=HOW, description="recompute each layer in the backward pass to save memory"
    )
    compile_layers: bool = Field(
        False, json_schema_extra=HOW, description="compile each layer of the student with torch.compile"
    )
