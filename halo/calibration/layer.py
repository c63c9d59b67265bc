"""One attention layer of the teacher on a batch of text, and its twin on the same input.

N sequences, T tokens, C hidden size, H heads, D head dimension, W = H * D.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halo import models
from halo.data import Batch


@dataclass(frozen=True)
class LayerData:
    """Input and output of an attention layer of the teacher.

    Attributes:
        x_NTC: Its input.
        y_NTC: Its output.
        context_NTW: The input of its output projection: the heads' weighted sums of values.
        cos_NTD, sin_NTD: The rotary embedding.
        documents_NT: For each token the number of its document in the sequence, which it does not look beyond.
    """

    x_NTC: Tensor
    y_NTC: Tensor
    context_NTW: Tensor
    cos_NTD: Tensor
    sin_NTD: Tensor
    documents_NT: Tensor

    def __len__(self) -> int:
        return self.x_NTC.shape[0]

    def __getitem__(self, rows: slice) -> "LayerData":
        return LayerData(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def sequences(self) -> Iterator["LayerData"]:
        """Yield each sequence as data of its own, N = 1."""
        for row in range(len(self)):
            yield self[row : row + 1]

    def offsets(self) -> Tensor:
        """Return the position of each token in its document, int64 [N, T]."""
        places = torch.arange(self.documents_NT.shape[1], device=self.documents_NT.device).expand_as(self.documents_NT)
        starts = torch.ones_like(self.documents_NT, dtype=torch.bool)
        starts[:, 1:] = self.documents_NT[:, 1:] != self.documents_NT[:, :-1]
        return places - torch.where(starts, places, 0).cummax(1).values


@contextmanager
def observed_layers(
    teacher: PreTrainedModel, batch: Batch, isolate_documents: bool, observe: Callable[[int, LayerData], None]
) -> Iterator[None]:
    """Inside the context, call `observe(layer, data)` after each attention layer has run on the batch.

    The data of one layer are in memory at a time.

    Args:
        teacher: The teacher.
        batch: What it runs on.
        isolate_documents: Whether its attention stays inside documents; otherwise each sequence counts as one.
        observe: The function.
    """
    shape = batch.input_ids.shape
    documents_NT = batch.document_ids if isolate_documents else torch.zeros_like(batch.document_ids)
    contexts: list[Tensor] = []

    def finish(layer: int, call: models.AttentionCall) -> None:
        tensors = (call.x_BTD, call.y_BTD, contexts.pop())
        x_NTC, y_NTC, context_NTW = (tensor.reshape(*shape, -1) for tensor in tensors)
        # One row for all sequences, one for each, or all in one if they are packed.
        cos_NTD, sin_NTD = (
            table.reshape(-1, shape[1], table.shape[-1]).expand(shape[0], -1, -1) for table in call.position_embeddings
        )
        observe(layer, LayerData(x_NTC, y_NTC, context_NTW, cos_NTD, sin_NTD, documents_NT))

    handles = [
        block.self_attn.o_proj.register_forward_pre_hook(lambda module, inputs: contexts.append(inputs[0]))
        for block in cast(Any, teacher).model.layers
    ]
    try:
        with models.observed_attention(teacher, finish):
            yield
    finally:
        for handle in handles:
            handle.remove()


def run_twin(mixer: nn.Module, data: LayerData) -> Tensor:
    """Run a twin on the input of its attention layer, without gradients, and return its output [N, T, C]."""
    # Sequences are packed only if they have documents to keep apart; all have the same number of tokens.
    packed = bool((data.documents_NT != data.documents_NT[:, :1]).any())
    x, tables, cu_seqlens = data.x_NTC, (data.cos_NTD, data.sin_NTD), None
    if packed:
        cu_seqlens = Batch(data.documents_NT, data.documents_NT).cu_seqlens()
        x, *rest = (tensor.flatten(0, 1)[None] for tensor in (x, *tables))
        tables = (rest[0], rest[1])
    with torch.no_grad():
        return models.run_mixer(mixer, x, tables, cu_seqlens).view(data.y_NTC.shape)


def input_of(module: nn.Module, mixer: nn.Module, data: LayerData) -> tuple[Tensor, Tensor]:
    """Run a twin and return what one of its modules is given, flattened to [N, T, W], and the twin's output."""
    found: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    try:
        y_NTC = run_twin(mixer, data)
    finally:
        handle.remove()
    return found[0].reshape(*data.x_NTC.shape[:2], -1), y_NTC


def relative_error(mixer: nn.Module, data: LayerData) -> float:
    """Return the squared error of a twin's output over the power of its attention layer's output."""
    error = power = 0.0
    for one in data.sequences():
        y_NTC = one.y_NTC.double()
        error += (run_twin(mixer, one).double() - y_NTC).square().sum().item()
        power += y_NTC.square().sum().item()
    return error / max(power, torch.finfo(torch.float64).tiny)
