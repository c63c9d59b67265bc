"""Variants of the teacher that layers are chosen by: what each layer does in place of its attention.

No variant copies a weight or needs an export: modules are exchanged inside the teacher, and put back.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halo import models

# attention: the teacher's own; twin: its aligned recurrent mixer; kept: the teacher's attention as a kept layer of the
# student has it, which in HyPE is without rotary embedding; silent: an output of zeros.
Form = Literal["attention", "twin", "kept", "silent"]


@dataclass(frozen=True)
class Variant:
    """A model to measure.

    Attributes:
        name: Unique among the variants of a teacher.
        forms: What each layer is.
    """

    name: str
    forms: tuple[Form, ...]

    @property
    def is_student(self) -> bool:
        """Whether it has the student's form: no layer is the teacher's own."""
        return "attention" not in self.forms and "silent" not in self.forms


def unchanged(num_layers: int) -> Variant:
    """Return the teacher itself."""
    forms: list[Form] = ["attention"] * num_layers
    return Variant("teacher", tuple(forms))


def one_layer(form: Form, layer: int, num_layers: int) -> Variant:
    """Return the teacher with one layer changed."""
    forms: list[Form] = ["attention"] * num_layers
    forms[layer] = form
    return Variant(f"{form} {layer}", tuple(forms))


def student(kept: Iterable[int], num_layers: int) -> Variant:
    """Return the student before distillation: attention in the kept layers, twins in all others."""
    layers = sorted(kept)
    forms: list[Form] = ["kept" if i in layers else "twin" for i in range(num_layers)]
    return Variant(f"student {layers}", tuple(forms))


@contextmanager
def arranged(
    teacher: PreTrainedModel, twins: Sequence[nn.Module], variant: Variant, rotary: bool = False
) -> Iterator[None]:
    """Turn the teacher into a variant inside the context.

    Args:
        teacher: The teacher; its own layers are put back.
        twins: The recurrent mixers of all layers.
        variant: What to turn it into.
        rotary: Whether kept layers keep their rotary embedding.
    """
    layers = cast(Any, teacher).model.layers
    changed: dict[int, nn.Module] = {}
    for layer, form in enumerate(variant.forms):
        if form == "twin":
            changed[layer] = TwinAttention(twins[layer])
        elif form == "kept":
            changed[layer] = kept_attention(layers[layer].self_attn, rotary)
        elif form == "silent":
            changed[layer] = SilentAttention()
    with models.replaced(teacher, changed):
        yield


def kept_attention(attention: nn.Module, rotary: bool) -> nn.Module:
    """Return an attention layer of the teacher as a student keeps it."""
    return attention if rotary else PositionFreeAttention(attention)


class TwinAttention(nn.Module):
    """Gives a recurrent mixer the signature of an attention layer of transformers, without cache or padding.

    Args:
        mixer: The mixer.
        cu_seqlens: Boundaries of packed documents, int32 [N + 1]; None if the rows of the batch are not packed.
    """

    def __init__(self, mixer: nn.Module, cu_seqlens: Tensor | None = None) -> None:
        super().__init__()
        self.mixer, self.cu_seqlens = mixer, cu_seqlens

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Return the mixer's output [B, T, D], and None for attention weights."""
        if past_key_values is not None or kwargs.get("cache") is not None:  # its name from transformers 5.24 on
            raise NotImplementedError("TwinAttention: the cache must be off, got one")
        return models.run_mixer(self.mixer, hidden_states, position_embeddings, self.cu_seqlens), None


class PositionFreeAttention(nn.Module):
    """Runs an attention layer of transformers with a rotation by zero, as if it had no position encoding."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, *args: Any, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any) -> Any:
        """Return what the layer does."""
        cos, sin = position_embeddings
        unrotated = torch.ones_like(cos), torch.zeros_like(sin)
        return self.attention(*args, position_embeddings=unrotated, **kwargs)


class SilentAttention(nn.Module):
    """Stands in for an attention layer of transformers and adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """Return zeros [B, T, D], and None for attention weights."""
        return torch.zeros_like(hidden_states), None
