"""Parameters and floating-point operations of teacher and student, from the teacher's configuration alone.

The models are built on the meta device, where they have shapes and no memory, so the counts are those of the code that
runs. Operations are those that are executed: a matrix product of [m, k] and [k, n] is 2 m k n; a linear layer costs
that in the forward pass and twice as much in the backward pass, half of which is its input's gradient. What is not a
matrix product (norms, activations, rotary embedding, softmax, the optimizer) is not counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from halo.errors import HaloError
from hypenet import HypeNetConfig, HypeNetForCausalLM, config_from_teacher
from hypenet.configuration_hypenet import LIGHTNING, MAMBA2, SOFTMAX

CHUNK = 64  # tokens that the recurrent kernels process as one matrix
# Of the products inside softmax attention and the recurrences, which recompute what they do not save.
BACKWARD = 2.5


@dataclass(frozen=True)
class LayerSize:
    """One decoder layer. Weights are the elements of its linear layers' matrices, parameters all that it has.

    Attributes:
        kind: "attn", "lightning-attn", "gdn" or "mamba2".
        heads, kv_heads, head_dim: Of its mixer.
        parameters: Of the layer.
        mixer_parameters: Of its mixer.
        mixer_weights: Of its mixer's linear layers.
        output_weights: Of its output projection, which is one of them.
        mlp_weights: Of its MLP's linear layers.
        last_weights: Of the last of them, whose result the backward pass does not need.
    """

    kind: str
    heads: int
    kv_heads: int
    head_dim: int
    parameters: int
    mixer_parameters: int
    mixer_weights: int
    output_weights: int
    mlp_weights: int
    last_weights: int

    @property
    def width(self) -> int:
        """The width of queries, all heads together."""
        return self.heads * self.head_dim

    def linear(self) -> float:
        """Return the operations per token of the linear layers, forward."""
        return 2.0 * (self.mixer_weights + self.mlp_weights)

    def mixing(self, length: int) -> float:
        """Return the operations per token of attention or of the recurrence, forward, in sequences of this length."""
        if self.kind == SOFTMAX:
            return 4.0 * self.width * (length + 1) / 2  # q k^T and p v, for the half of the pairs that is causal
        chunk = min(CHUNK, length)
        if self.kind in (LIGHTNING, MAMBA2):  # q k^T and its product with v; read and update the state
            return 4.0 * self.width * (chunk + self.head_dim)
        # The same, k k^T, and the products of the inverse with k and v; the state's share of the new values.
        return self.width * (10.0 * chunk + 6.0 * self.head_dim)


@dataclass(frozen=True)
class ModelSize:
    """A causal language model.

    Attributes:
        parameters: All, a tied head counted once.
        outside: Those of embedding, head and final norm.
        vocab, hidden: Sizes of the head.
        intermediate: Width of the MLPs.
        layers: The decoder layers.
    """

    parameters: int
    outside: int
    vocab: int
    hidden: int
    intermediate: int
    layers: tuple[LayerSize, ...]

    def head(self) -> float:
        """Return the operations per token of the head, forward."""
        return 2.0 * self.vocab * self.hidden

    def forward(self, length: int) -> float:
        """Return the operations per token of the decoder without the head."""
        return sum(layer.linear() + layer.mixing(length) for layer in self.layers)

    def training(self, length: int, recompute: bool) -> float:
        """Return the operations per token of forward and backward pass of the decoder without the head."""
        total = sum(3 * layer.linear() + (1 + BACKWARD) * layer.mixing(length) for layer in self.layers)
        if recompute:
            total += sum(layer.linear() - 2.0 * layer.last_weights + layer.mixing(length) for layer in self.layers)
        return total


def model_size(config: PreTrainedConfig) -> ModelSize:
    """Measure the model of a configuration, a teacher's or a HypeNet's."""
    with torch.device("meta"):
        if isinstance(config, HypeNetConfig):
            model: Any = HypeNetForCausalLM(config)
        else:
            model = AutoModelForCausalLM.from_config(config)
    layers = tuple(_layer_size(config, layer, i) for i, layer in enumerate(model.model.layers))
    total = sum(parameter.numel() for parameter in model.parameters())
    return ModelSize(
        parameters=total,
        outside=total - sum(layer.parameters for layer in layers),
        vocab=config.vocab_size,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=layers,
    )


def student_size(
    teacher: PreTrainedConfig, mixer: str, softmax_layers: Sequence[int], **architecture: Any
) -> ModelSize:
    """Measure the student of a teacher, with softmax attention in these layers and `mixer` in all others.

    Raises:
        HaloError: If the other fields of its configuration, `architecture`, do not fit the teacher.
    """
    try:
        config = config_from_teacher(teacher, softmax_layers, mixer, **architecture)
    except ValueError as error:
        raise HaloError(f"architecture: {error}") from None
    return model_size(config)


def stage_flops_per_token(
    stage: str,
    teacher: PreTrainedConfig,
    mixer: str,
    length: int,
    *,
    softmax_layers: int | None = None,
    recompute: bool = False,
    two_passes: bool = False,
    architecture: Mapping[str, Any] | None = None,
) -> float:
    """Return the floating-point operations that a training stage executes for each token of a batch.

    Divided by the peak of the device and multiplied by the tokens per second of a process, it is the utilisation: with
    `recompute=False` that of the model (MFU), with the stage's `checkpoint_activations` that of the hardware (HFU).

    Args:
        stage: "align", "distill" or "finetune".
        teacher: The teacher's configuration, from which the student's follows.
        mixer: Kind of the recurrent layers, "lightning", "gdn" or "mamba2".
        length: Tokens per sequence.
        softmax_layers: How many layers of the student stay attention; by default a quarter.
        architecture: Other fields of the student's configuration.
        recompute: Whether the student's layers run a second time in the backward pass.
        two_passes: Whether logits are computed twice, which is so with `vocab_chunk`.

    Raises:
        ValueError: If `stage` is not a training stage.
    """
    keep = max(1, teacher.num_hidden_layers // 4) if softmax_layers is None else softmax_layers
    student = student_size(teacher, mixer, () if stage == "align" else range(keep), **architecture or {})
    return training_flops(stage, model_size(teacher), student, length, recompute, two_passes)


def training_flops(
    stage: str, teacher: ModelSize, student: ModelSize, length: int, recompute: bool = False, two_passes: bool = False
) -> float:
    """As `stage_flops_per_token`, for measured models; the student of "align" has no softmax layers."""
    if stage == "align":
        # The input has no gradient, so of the linear layers only the output projection computes one for its input.
        return teacher.forward(length) + sum(
            4.0 * layer.mixer_weights + 2.0 * layer.output_weights + (1 + BACKWARD) * layer.mixing(length)
            for layer in student.layers
        )
    # Logits, and the gradients of hidden states and head.
    heads = (4 if two_passes else 3) * student.head()
    if stage == "distill":
        return (
            teacher.forward(length)
            + (2 if two_passes else 1) * teacher.head()
            + (student.training(length, recompute) + heads)
        )
    if stage == "finetune":
        return student.training(length, recompute) + heads
    raise ValueError(f"stage_flops_per_token: stage must be align, distill or finetune, got {stage!r}")


def calibration_flops(
    teacher: ModelSize, twins: ModelSize, length: int, fitted: int, held: int, parts: Sequence[str]
) -> float:
    """Return the operations of a calibration beside the pass of the teacher.

    Args:
        teacher, twins: The teacher, and its size with a twin in every layer.
        length: Tokens per sequence.
        fitted, held: Tokens of all sequences to fit on and to measure on.
        parts: What is calibrated.
    """
    # Queries, keys and their products; then each twin's passes: to measure at first and after each part, and to fit.
    measured = sum(
        2.0 * teacher.hidden * (x.heads + x.kv_heads) * x.head_dim + x.mixing(length) / 2 for x in teacher.layers
    )
    passes = held * (len(parts) + 1) + fitted * sum(
        {"gain": 1, "ridge": 1, "faithful": 2}.get(part, 0) for part in parts
    )
    total = fitted * measured + passes * sum(2.0 * x.mixer_weights + x.mixing(length) for x in twins.layers)
    for layer in twins.layers:
        if {"beta", "gate"} & set(parts):
            total += 2.0 * fitted * teacher.hidden**2
        if "ridge" in parts:
            total += 2.0 * fitted * layer.width * (layer.width + teacher.hidden)
    return total


def _layer_size(config: PreTrainedConfig, layer: nn.Module, index: int) -> LayerSize:
    mixer, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
    kind = config.mixers[index] if isinstance(config, HypeNetConfig) else SOFTMAX
    if isinstance(config, HypeNetConfig):
        heads, kv_heads, head_dim = config.head_sizes(kind)
    else:
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, cast(Any, mixer).head_dim
    return LayerSize(
        kind=kind,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        parameters=sum(parameter.numel() for parameter in layer.parameters()),
        mixer_parameters=sum(parameter.numel() for parameter in mixer.parameters()),
        mixer_weights=_weights(mixer),
        output_weights=_weights(mixer.get_submodule("o_proj")),
        mlp_weights=_weights(mlp),
        last_weights=_weights(mlp.get_submodule("down_proj")),
    )


def _weights(module: nn.Module) -> int:
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))
