"""Statistics of the heads of an attention layer: how far they look back, and how widely.

Attention probabilities are computed for a block of queries at a time, so nothing grows with T^2.
H heads of queries, K of keys, T queries of which t are in a block, S keys, D head dimension, C hidden size.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from halo.calibration.layer import LayerData

WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Statistics:
    """Means over the tokens of a batch.

    Attributes:
        look_back_H: Distance in tokens to what a query attends to, float64 [H].
        entropy_H: Entropy of its attention probabilities, nats, float64 [H].
    """

    look_back_H: Tensor
    entropy_H: Tensor


@torch.no_grad()
def measure(
    attention: nn.Module, data: LayerData, sinks: int = 0, block: int = 256, least_distance: float = 0.0
) -> Statistics:
    """Measure an attention layer of the teacher.

    Heads that have nothing to look for attend to the first tokens, whatever their distance. These are left out, and
    the probabilities of the others renormalised; queries that see nothing else do not count.

    Args:
        attention: The layer, of a module with the projections of Llama and, where it has them, Qwen3's norms.
        data: What it runs on.
        sinks: How many tokens at the start of a document are left out.
        block: Queries whose probabilities are in memory at a time.
        least_distance: What a shorter distance counts as, that of a token to itself above all.

    Returns:
        The statistics, on the device of the data.
    """
    heads = attention.get_parameter("q_proj.weight").shape[0] // _head_dim(attention)
    look_back_H = torch.zeros(heads, dtype=torch.float64, device=data.x_NTC.device)
    entropy_H, queries = torch.zeros_like(look_back_H), 0
    with torch.autocast(data.x_NTC.device.type, enabled=False):
        for one in data.sequences():
            q_HTD, k_KSD = _queries_and_keys(attention, one)
            for start in range(0, q_HTD.shape[1], block):
                distance_tS, seen_tS = _visible(one, start, block, sinks)
                counted = seen_tS.any(1)
                p_HtS = _probabilities(q_HTD[:, start : start + block][:, counted], k_KSD, seen_tS[counted])
                entropy_H += torch.special.entr(p_HtS).sum(-1).double().sum(-1)
                p_HtS.mul_(distance_tS[counted].clamp(min=least_distance))
                look_back_H += p_HtS.sum(-1).double().sum(-1)
                queries += int(counted.sum())
    count = max(queries, 1)
    return Statistics(look_back_H / count, entropy_H / count)


@torch.no_grad()
def constant_direction(data: LayerData, eps: float = 1e-2) -> Tensor:
    """Return the row w of the product w x that is nearest to 1 for all inputs x, and 1 in the mean, float64 [C].

    Of the directions in which the input has a mean, it is the one in which it varies least: a gate from this row is
    nearly constant, which one along the mean itself is not.

    Args:
        data: The layer's input x.
        eps: Penalty of large rows, relative to the mean power of the inputs.
    """
    size, device = data.x_NTC.shape[-1], data.x_NTC.device
    moment = torch.zeros(size, size, dtype=torch.float64, device=device)
    total = torch.zeros(size, dtype=torch.float64, device=device)
    with torch.autocast(device.type, enabled=False):
        for one in data.sequences():
            x = one.x_NTC.flatten(0, 1)
            x = x.to(x.dtype if x.dtype in WIDE else torch.float32)
            moment += x.T @ x
            total += x.double().sum(0)
    moment.diagonal().add_(eps * moment.diagonal().mean())
    row = torch.linalg.solve_ex(moment, total).result
    mean = row @ total / math.prod(data.x_NTC.shape[:2])
    return row / mean


def _visible(one: LayerData, start: int, block: int, sinks: int) -> tuple[Tensor, Tensor]:
    """Return the distances from a block of queries to the keys up to its end, int64 [t, S], and which keys count."""
    places = torch.arange(one.x_NTC.shape[1], device=one.x_NTC.device)
    queries, keys = places[start : start + block, None], places[: start + block]
    documents, offsets = one.documents_NT[0], one.offsets()[0]
    seen_tS = (keys <= queries) & (documents[queries] == documents[keys]) & (offsets[keys] >= sinks)
    return queries - keys, seen_tS


def _probabilities(q_HtD: Tensor, k_KSD: Tensor, seen_tS: Tensor) -> Tensor:
    """Return the attention of a block of queries to the first keys, [H, t, S]; each head of keys serves H / K."""
    k_KSD = k_KSD[:, : seen_tS.shape[1]]
    q_KGtD = q_HtD.unflatten(0, (k_KSD.shape[0], -1))
    scores_HtS = (q_KGtD @ k_KSD[:, None].mT).flatten(0, 1)
    return scores_HtS.masked_fill_(~seen_tS, -torch.inf).softmax(-1)


def _queries_and_keys(attention: nn.Module, one: LayerData) -> tuple[Tensor, Tensor]:
    """Return the scaled queries [H, T, D] and the keys [K, T, D] of one sequence, after norm and rotation."""
    dtype = attention.get_parameter("q_proj.weight").dtype
    q, k = (attention.get_submodule(name)(one.x_NTC.to(dtype)) for name in ("q_proj", "k_proj"))
    q, k = (x.unflatten(-1, (-1, _head_dim(attention))) for x in (q, k))
    if hasattr(attention, "q_norm"):
        q, k = attention.get_submodule("q_norm")(q), attention.get_submodule("k_norm")(k)
    wide = q.dtype if q.dtype in WIDE else torch.float32
    q, k, cos, sin = (x.to(wide) for x in (q, k, one.cos_NTD, one.sin_NTD))
    q, k = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)  # the same function in all families of teachers
    return q[0].transpose(0, 1) * _head_dim(attention) ** -0.5, k[0].transpose(0, 1)


def _head_dim(attention: nn.Module) -> int:
    return attention.head_dim  # type: ignore[return-value]
