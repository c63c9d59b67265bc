"""What the heads of an attention layer do: how far they look back, and how widely.

Attention probabilities are computed for a block of queries at a time, so nothing grows with T^2.
H heads, T queries of which t are in a block, S keys, D head dimension, C hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halo.calibration.layer import LayerData
from hypenet.mixers import rotate

WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Statistics:
    """Means over the tokens of a batch.

    Attributes:
        look_back_H: Distance in tokens to what a query attends to, float64 [H].
        entropy_H: Entropy of its attention probabilities, nats, float64 [H].
        mean_C: The layer's input, float64 [C].
    """

    look_back_H: Tensor
    entropy_H: Tensor
    mean_C: Tensor


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
    device = data.x_NTC.device
    heads = 0
    look_back_H = entropy_H = torch.zeros(())
    queries = 0
    offsets_NT = data.offsets()
    with torch.autocast(device.type, enabled=False):
        for row, one in enumerate(data.sequences()):
            q_HTD, k_HSD = _queries_and_keys(attention, one)
            if not heads:
                heads = q_HTD.shape[0]
                look_back_H = torch.zeros(heads, dtype=torch.float64, device=device)
                entropy_H = torch.zeros_like(look_back_H)
            group = heads // k_HSD.shape[0]
            places, documents, offsets = (
                torch.arange(one.x_NTC.shape[1], device=device),
                one.documents_NT[0],
                offsets_NT[row],
            )
            for start in range(0, len(places), block):
                stop = min(start + block, len(places))
                distance_tS = places[start:stop, None] - places[:stop]
                seen_tS = (
                    (distance_tS >= 0) & (documents[start:stop, None] == documents[:stop]) & (offsets[:stop] >= sinks)
                )
                counted = seen_tS.any(1)
                distance_tS, seen_tS = distance_tS[counted], seen_tS[counted]
                q_GHtD = q_HTD[:, start:stop][:, counted].unflatten(0, (-1, group)).transpose(0, 1)
                scores_HtS = (q_GHtD @ k_HSD[:, :stop].mT).transpose(0, 1).flatten(0, 1)
                p_HtS = scores_HtS.masked_fill_(~seen_tS, -torch.inf).softmax(-1)
                distance_tS = distance_tS.clamp(min=least_distance).to(p_HtS.dtype)
                entropy_H += torch.special.entr(p_HtS).sum(-1).double().sum(-1)
                look_back_H += p_HtS.mul_(distance_tS).sum(-1).double().sum(-1)
                queries += len(distance_tS)
    count = max(queries, 1)
    return Statistics(look_back_H / count, entropy_H / count, data.x_NTC.double().mean((0, 1)))


def _queries_and_keys(attention: nn.Module, one: LayerData) -> tuple[Tensor, Tensor]:
    """Return the scaled queries [H, T, D] and the keys [HK, T, D] of one sequence, after norm and rotation."""
    head_dim: int = attention.head_dim  # type: ignore[assignment]
    q, k = (attention.get_submodule(name)(one.x_NTC.to(_dtype(attention))) for name in ("q_proj", "k_proj"))
    q, k = (x.unflatten(-1, (-1, head_dim)) for x in (q, k))
    if hasattr(attention, "q_norm"):
        q, k = attention.get_submodule("q_norm")(q), attention.get_submodule("k_norm")(k)
    wide = q.dtype if q.dtype in WIDE else torch.float32
    q, k = (rotate(x.to(wide), one.cos_NTD.to(wide), one.sin_NTD.to(wide))[0].transpose(0, 1) for x in (q, k))
    return q * head_dim**-0.5, k


def _dtype(attention: nn.Module) -> torch.dtype:
    return attention.get_parameter("q_proj.weight").dtype
