"""Operations on models: build twins and hybrids, record and replace layers, set the attention scale.

B sequences, T tokens, D hidden size. The teacher is a causal language model of transformers; the twins are a HypeNet
that is recurrent in every layer; the student is a HypeNet with some softmax layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halo.data import Batch
from hypenet import HypeNetForCausalLM, MixerContext, from_teacher
from hypenet.configuration_hypenet import hype_logits_scaling
from hypenet.mixers import Mixer


@dataclass
class AttentionCall:
    """Input and output [B, T, D] of one attention layer in a forward pass, and its rotary cos and sin."""

    x_BTD: Tensor
    y_BTD: Tensor
    position_embeddings: tuple[Tensor, Tensor]


def load_hypenet(directory: Path, device: torch.device) -> HypeNetForCausalLM:
    """Load a HypeNet that an earlier stage saved, in fp32."""
    model = HypeNetForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.to(device)  # type: ignore[arg-type]
    return model


def make_twins(teacher: PreTrainedModel, mixer: str) -> HypeNetForCausalLM:
    """Build a HypeNet in which each layer is the recurrent twin of the teacher's (weight transfer, HALO 4.1)."""
    return from_teacher(teacher, keep_layers=[], mixer=mixer)


def make_student(
    teacher: PreTrainedModel, twins: HypeNetForCausalLM, layers: list[int], mixer: str, gate_init: str
) -> HypeNetForCausalLM:
    """Build the hybrid of stage 2, with softmax attention in `layers` and the twins' mixers in all others.

    Args:
        teacher: Provides all other weights.
        twins: Provides the recurrent mixers; the modules themselves are used.
        layers: Indices of the softmax attention layers, which have an output gate and no position encoding.
        mixer: Kind of the recurrent layers, "lightning" or "gdn".
        gate_init: Initialisation of the new output gates, "open" or "random".
    """
    aligned = {layer: twin for layer, twin in enumerate(mixers(twins)) if layer not in layers}
    return from_teacher(teacher, keep_layers=layers, mixer=mixer, mixers=aligned, gate_init=gate_init)


def mixers(model: HypeNetForCausalLM) -> list[Mixer]:
    """Return the token mixer of every layer."""
    return [cast(Mixer, layer.self_attn) for layer in model.model.layers]


def run_mixer(
    mixer: nn.Module,
    x_BTD: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Run one mixer of a HypeNet on hidden states [B, T, D]."""
    return mixer(x_BTD, MixerContext(position_embeddings=position_embeddings, cu_seqlens=cu_seqlens))


def hidden_states(model: PreTrainedModel, batch: Batch, isolate_documents: bool = False) -> Tensor:
    """Compute the hidden states after the final norm, [B, T, D].

    Isolated documents run as one packed sequence whose positions restart at each document; both model classes
    separate documents by that.
    """
    ids = batch.input_ids
    options: dict[str, Tensor] = {}
    if isolate_documents:
        ids = ids.view(1, -1)
        options["position_ids"] = document_positions(batch)
    hidden = model.base_model(input_ids=ids, use_cache=False, **options).last_hidden_state
    return hidden.view(*batch.input_ids.shape, -1)


def document_positions(batch: Batch) -> Tensor:
    """Return the position of each token in its document, for the flattened batch, int64 [1, B * T]."""
    cu_seqlens = batch.cu_seqlens().long()
    total = batch.input_ids.numel()
    starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=total)
    return (torch.arange(total, device=starts.device) - starts)[None]


@contextmanager
def recorded_attention(teacher: PreTrainedModel) -> Iterator[list[AttentionCall]]:
    """Record the attention layers: inside the context, a forward pass adds one AttentionCall per layer to the list."""
    calls: list[AttentionCall] = []

    def record(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        calls.append(AttentionCall(x, output[0], kwargs["position_embeddings"]))

    handles = [layer.self_attn.register_forward_hook(record, with_kwargs=True) for layer in teacher.model.layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def swapped(teacher: PreTrainedModel, twins: HypeNetForCausalLM, layer: int) -> Iterator[None]:
    """Replace the mixer of one layer of the teacher by its recurrent twin inside the context, without copying."""
    block = teacher.model.layers[layer]
    original = block.self_attn
    block.self_attn = _TwinAttention(mixers(twins)[layer])
    try:
        yield
    finally:
        block.self_attn = original


def set_logit_scale_base(model: PreTrainedModel, base: float | None) -> None:
    """Set the base `a` of the HyPE scale of a HypeNet's softmax layers; None for no scale."""
    model.config.attn_logits_scaling = hype_logits_scaling(base)


class _TwinAttention(nn.Module):
    """Gives a recurrent mixer the signature of a teacher's attention, for a forward pass without cache or padding."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if past_key_values is not None:
            raise NotImplementedError("swapped: the cache must be off, got past_key_values")
        return run_mixer(self.mixer, hidden_states, position_embeddings), None
