"""The section `select` of a configuration: by which policy, and on which samples, layers are chosen."""

from typing import Any, Literal, Self, get_args

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from halo.settings import HOW, HaloError, Settings, TrainingSettings

PolicyName = Literal[
    "position",
    "halo",
    "recall-drop",
    "difference",
    "ratio",
    "kl",
    "lm-ppl",
    "single-layer",
    "greedy",
    "joint",
    "uniform",
    "uniform-late",
    "given",
]
UNMEASURED = ("uniform", "uniform-late", "given")
CANDIDATES = 3  # of the exchange step of `position`
# Warm-up as a share of the steps, and the last learning rate as a share of the peak, when gates are trained.
WARMUP_SHARE = 0.05
FINAL_RATE_SHARE = 0.1
OLD_SCORES = {"paper": "halo", "even": "uniform"}


class SelectSettings(Settings):
    """How to choose the layers that stay softmax attention."""

    keep: PositiveInt | None = Field(None, description="number of attention layers; default: a quarter")
    policy: PolicyName = Field(
        "position",
        description="how layers are chosen; uniform, uniform-late and given measure nothing; default with `layers`: "
        "given",
    )
    layers: list[NonNegativeInt] | None = Field(None, description="the layers to keep, of policy given")
    exchange: NonNegativeInt | None = Field(
        None,
        description="candidates that each kept layer is tried against in the student's form; default: "
        f"{CANDIDATES} for policy position, 0 for others",
    )
    exchange_rounds: PositiveInt = Field(3, description="most rounds of exchanges; each changes one layer at most")
    measure_positions: bool = Field(
        True, description="measure what positions are worth in each layer, though the policy may not need it"
    )
    language_weight: float = Field(1.0, ge=0, description="difference: weight of the language drop")
    eps: float = Field(1e-6, gt=0, description="halo: added to the denominator of the published score")
    clip: float | None = Field(
        None, gt=0, description="halo: largest value of the score; the published code has 50, with eps 1e-10"
    )
    joint_steps: PositiveInt = Field(300, le=10**6, description="joint: optimizer steps")
    joint_batch: PositiveInt = Field(32, description="joint: sequences per step, over all processes")
    joint_micro_batch: PositiveInt = Field(
        1, json_schema_extra=HOW, description="joint: sequences per forward pass of a process"
    )
    joint_length: PositiveInt = Field(2048, ge=2, description="joint: tokens per sequence")
    joint_learning_rate: float = Field(0.05, gt=0, description="joint: peak learning rate of the gates' logits")
    joint_price: float = Field(
        1.0, ge=0, description="joint: price in nats of attention in all layers, reached linearly over the steps"
    )
    joint_needle_ratio: float = Field(0.5, ge=0, le=1, description="joint: share of generated recall episodes")
    joint_seeds: PositiveInt = Field(1, le=100, description="joint: trainings, whose spread is the gates' error")
    recall_samples: PositiveInt = Field(200, ge=2, description="recall episodes")
    recall_length: PositiveInt = Field(512, description="tokens per episode")
    language_samples: PositiveInt = Field(128, ge=2, description="chunks of held-out text")
    language_length: PositiveInt = Field(512, ge=2, description="tokens per chunk")
    batch: PositiveInt = Field(16, json_schema_extra=HOW, description="samples per forward pass")
    cache_gib: float = Field(
        8.0,
        ge=0,
        json_schema_extra=HOW,
        description="main memory of a process for the teacher's hidden states, which are recomputed if they do not fit",
    )
    bootstrap: PositiveInt = Field(1000, ge=2, description="resamples for errors and the stability of the choice")

    @model_validator(mode="before")
    @classmethod
    def _policy_of(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if "score" in given:
            old = given["score"]
            new = OLD_SCORES.get(old, old) if isinstance(old, str) else old
            known = f"policy: {new}" if new in get_args(PolicyName) else f"one of {', '.join(get_args(PolicyName))}"
            raise ValueError(f"score is now select.policy; must be {known}, got score: {old}")
        if given.get("layers") is not None and "policy" not in given:
            return given | {"policy": "given"}
        return given

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.layers is not None) != (self.policy == "given"):
            wanted = "be given with" if self.layers is None else "come with"
            raise ValueError(f"layers must {wanted} policy given, got policy {self.policy} and layers {self.layers}")
        if self.exchange and self.policy in UNMEASURED:
            raise ValueError(f"exchange must be 0 or null for policy {self.policy}, got {self.exchange}")
        if self.joint_batch % self.joint_micro_batch:
            raise ValueError(
                f"joint_micro_batch must divide joint_batch ({self.joint_batch}), got {self.joint_micro_batch}"
            )
        return self

    @property
    def measures(self) -> bool:
        """Whether the policy runs any model."""
        return self.policy not in UNMEASURED

    @property
    def candidates(self) -> int:
        """Candidates of the exchange step for each kept layer."""
        if self.exchange is not None:
            return self.exchange
        return CANDIDATES if self.policy == "position" else 0


def check_layers(settings: SelectSettings, num_layers: int) -> int:
    """Return the number of layers to keep.

    Raises:
        HaloError: If the teacher has fewer layers than the settings ask for.
    """
    if settings.layers is not None:
        if not settings.layers or max(settings.layers) >= num_layers:
            raise HaloError(f"select.layers: must be layers below {num_layers}, got {settings.layers}")
        return len(set(settings.layers))
    keep = settings.keep or max(1, num_layers // 4)
    if keep > num_layers:
        raise HaloError(f"select.keep: must be at most the teacher's {num_layers} layers, got {keep}")
    return keep


def gate_settings(settings: SelectSettings) -> TrainingSettings:
    """Return the hyperparameters of the gates' training."""
    rate = settings.joint_learning_rate
    return TrainingSettings(
        steps=settings.joint_steps,
        batch=settings.joint_batch,
        micro_batch=settings.joint_micro_batch,
        length=settings.joint_length,
        learning_rate=rate,
        final_learning_rate=FINAL_RATE_SHARE * rate,
        warmup=round(WARMUP_SHARE * settings.joint_steps),
        needle_ratio=settings.joint_needle_ratio,
    )
