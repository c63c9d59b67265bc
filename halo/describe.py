"""What `hypenet info` says of a model: its layers and sizes, and how long memory traffic lets a decode step take."""

import copy
import math
import time
from dataclasses import dataclass

import torch

from hypenet import HypeNetConfig, HypeNetForCausalLM
from hypenet.configuration_hypenet import SOFTMAX

CONTEXTS = tuple(2**n for n in (10, 12, 14, 16, 18, 20))
COPY_BYTES = 2**28  # larger than the caches of any CPU or GPU
COPY_SECONDS = 0.5


def describe(config: HypeNetConfig) -> dict[str, str]:
    """Return the rows that `hypenet info` prints, by name."""
    network = _network(config)
    kinds = {kind: [i for i, mixer in enumerate(config.mixers) if mixer == kind] for kind in config.mixers}
    softmax = [
        "rotary positions" if config.attn_use_rope else "no positions",
        "output gate" if config.attn_use_output_gate else "no gate",
        "no logit scale" if config.attn_logits_scaling is None else f"logit scale {config.attn_logits_scaling}",
    ]
    rows = {"parameters": f"{network.num_parameters():,}" + (" (tied head)" if config.tie_word_embeddings else "")}
    rows["size"] = (
        f"{config.num_hidden_layers} layers, width {config.hidden_size}, MLP {config.intermediate_size}, "
        f"{config.num_attention_heads} query and {config.num_key_value_heads} key-value heads of {config.head_dim}"
    )
    for kind, layers in kinds.items():
        rows[f"{kind} layers"] = f"{len(layers)}: {' '.join(map(str, layers))}"
        if kind == SOFTMAX:
            rows["softmax attention"] = ", ".join(softmax)
    per_token = {dtype: config.cache_bytes_per_token(dtype) for dtype in (torch.bfloat16, torch.float32)}
    rows["cache per token"] = f"{per_token[torch.bfloat16]:,} B in bfloat16, {per_token[torch.float32]:,} B in float32"
    rows["state per sequence"] = f"{config.state_bytes():,} B at any length"
    return rows


@dataclass(frozen=True)
class DecodeTraffic:
    """Bytes that one decode step of one sequence moves: weights, and keys and values per token, are read, states too.

    Attributes:
        weights: Bytes of all weights that a step reads; of an embedding that is not the head too, that is one row.
        states: Bytes of the recurrent states, read and written.
        per_token: Bytes of keys and values of one token of the context.
    """

    weights: int
    states: int
    per_token: int

    @classmethod
    def of(cls, config: HypeNetConfig, dtype: torch.dtype) -> "DecodeTraffic":
        """Return the traffic of a model with weights, keys and values of a data type, and states of float32."""
        network = _network(config)
        weights = sum(parameter.numel() for parameter in network.parameters())
        if not config.tie_word_embeddings:
            weights -= network.model.embed_tokens.weight.numel()
        return cls(weights * dtype.itemsize, 2 * config.state_bytes(), config.cache_bytes_per_token(dtype))

    def step(self, context: int) -> int:
        """Return the bytes of a step after `context` tokens."""
        return self.weights + self.states + context * self.per_token

    def crossover(self, teacher: "DecodeTraffic") -> int | None:
        """Return the least context at which this model moves fewer bytes than a teacher; None if there is none."""
        ahead = teacher.step(0) - self.step(0)
        if ahead > 0:
            return 0
        saved = teacher.per_token - self.per_token
        return None if saved <= 0 else math.floor(-ahead / saved) + 1


def softmax_teacher(config: HypeNetConfig) -> HypeNetConfig:
    """Return the configuration of the model of the same sizes whose layers are all softmax attention, as Qwen3's."""
    teacher = copy.deepcopy(config)
    teacher.set_mixer_types([SOFTMAX] * config.num_hidden_layers)
    teacher.attn_use_output_gate, teacher.attn_use_rope = False, True
    return teacher


def decode_estimates(config: HypeNetConfig, dtype: torch.dtype, bandwidth: float) -> tuple[list[list[str]], str]:
    """Estimate the time of a decode step of one sequence from its memory traffic alone.

    Args:
        config: The model's configuration.
        dtype: Data type of weights, keys and values.
        bandwidth: Bytes per second.

    Returns:
        Rows of context length, time, and the time of the all-softmax teacher; and one line about where the model
        becomes faster than the teacher.
    """
    own, teacher = DecodeTraffic.of(config, dtype), DecodeTraffic.of(softmax_teacher(config), dtype)
    rows = [
        [f"{context:,}", *(f"{1e3 * traffic.step(context) / bandwidth:,.3g} ms" for traffic in (own, teacher))]
        for context in CONTEXTS
    ]
    least = own.crossover(teacher)
    if least is None:
        line = "never faster than the teacher: every layer is softmax attention"
    elif least == 0:
        line = "faster than the teacher at every length"
    else:
        line = f"faster than the teacher from {least:,} tokens of context on"
    return rows, line


def measured_bandwidth(device: torch.device) -> float:
    """Measure the bytes per second, read and written, of the fastest of several copies on a device."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    target.copy_(source)
    best, began = math.inf, time.perf_counter()
    while time.perf_counter() - began < COPY_SECONDS:
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * COPY_BYTES / best


def _network(config: HypeNetConfig) -> HypeNetForCausalLM:
    """Return the model without memory for its weights."""
    with torch.device("meta"):
        return HypeNetForCausalLM(config)
