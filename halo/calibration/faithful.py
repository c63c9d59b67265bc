"""The first phase of Taylor-Calibrate as its authors' code does it, for gated DeltaNet (arXiv 2606.16429, section 3).

It is here to be compared with. What it does otherwise than `parts`, in the order of the code:

1. Keys and values are repeated row by row and not head by head: a query head finds few channels of its own key head,
   each several times. The weights of the norms of q and k are dropped.
2. The distance that a head looks back includes the first tokens, which heads attend to that look for nothing, so it
   mostly measures the length of the text. A token is half a token away from itself.
3. The decay's projection of the input stays random, N(0, 0.02^2).
4. The projection of beta has random rows, scaled by the aim: it sets how much beta varies, and not its mean.
5. Values are scaled by least squares before the norm, which undoes that, and by at least 0.1 and at most 10.
6. The output gate is a copy of the value projection, so small that the layer's output is about a hundredth of the
   teacher's.

Two things are the library's and not theirs: beta is 2 sigmoid and not sigmoid, and q and k have rotary embedding.
The number and length of the sequences are those of the configuration; theirs are 4 of 256 tokens.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from halo.calibration.layer import LayerData, input_of
from halo.calibration.parts import SHORTEST, STRONGEST, WEAKEST, concentration, set_rate
from halo.calibration.statistics import measure
from hypenet.mixers import GatedDeltaNet

SLOWEST, FASTEST = 1e-3, 5.0  # rates of decay per token
SMALLEST, LARGEST = 0.1, 10.0  # factors of values
LAMBDA = 0.01  # of the gate
RANDOM_STD = 0.02


@torch.no_grad()
def calibrate(mixer: GatedDeltaNet, attention: nn.Module, data: LayerData, seed: int, block: int = 256) -> None:
    """Calibrate a twin as the published code does.

    Args:
        mixer: The twin, fresh from transfer.
        attention: Its attention layer.
        data: The layer on the sequences to fit on.
        seed: Of the random rows.
        block: Queries whose attention is in memory at a time.
    """
    statistics = measure(attention, data, sinks=0, block=block, least_distance=0.5)
    generator = torch.Generator().manual_seed(seed)
    repeat_rows(mixer, attention)
    rate = (math.log(2) / statistics.look_back_H.clamp(min=SHORTEST)).clamp(SLOWEST, FASTEST)
    set_rate(mixer, rate)
    mixer.a_proj.weight.copy_(torch.randn(mixer.a_proj.weight.shape, generator=generator) * RANDOM_STD)
    rows = torch.randn(mixer.b_proj.weight.shape, generator=generator).to(rate) * RANDOM_STD
    aim = (WEAKEST + (STRONGEST - WEAKEST) * concentration(statistics.entropy_H)).logit()
    mixer.b_proj.weight.copy_(rows * (aim / (math.sqrt(rows.shape[1]) * rows.abs().mean(1)))[:, None])
    factors = value_factors(mixer, data)
    mixer.v_proj.weight.mul_(factors.repeat_interleave(mixer.head_dim)[:, None])
    scale_gate(mixer, data)


def repeat_rows(mixer: GatedDeltaNet, attention: nn.Module) -> None:
    """Copy key and value projections with each row repeated, and drop the norms' weights."""
    for name in ("k_proj", "v_proj"):
        weight = attention.get_parameter(f"{name}.weight")
        own = mixer.get_parameter(f"{name}.weight")
        own.copy_(weight.repeat_interleave(own.shape[0] // weight.shape[0], dim=0))
    for norm in (mixer.q_norm, mixer.k_norm):
        if norm is not None:
            nn.init.ones_(norm.weight)


def value_factors(mixer: GatedDeltaNet, data: LayerData) -> torch.Tensor:
    """Return the factor of each head's values: least squares before the norm, for queries that are not scaled."""
    products = powers = torch.zeros((), dtype=torch.float64, device=data.x_NTC.device)
    for one in data.sequences():
        o_NTW, _ = input_of(mixer.o_norm, mixer, one)
        o, c = (x.double().unflatten(-1, (-1, mixer.head_dim)) for x in (o_NTW, one.context_NTW))
        o = o * math.sqrt(mixer.head_dim)
        products, powers = products + (o * c).sum((0, 1, 3)), powers + o.square().sum((0, 1, 3))
    return (products / powers.clamp(min=1e-8)).clamp(SMALLEST, LARGEST)


def scale_gate(mixer: GatedDeltaNet, data: LayerData) -> None:
    """Make the gate's projection a multiple of the values'."""
    if mixer.g_proj is None:
        return
    context_rms = data.context_NTW.float().unflatten(-1, (-1, mixer.head_dim)).square().mean(-1).sqrt().mean()
    squares = torch.zeros((), dtype=torch.float64, device=data.x_NTC.device)
    for one in data.sequences():
        squares += F.silu(F.linear(one.x_NTC.float(), mixer.v_proj.weight)).double().square().mean() / len(data)
    mixer.g_proj.weight.copy_(mixer.v_proj.weight * (LAMBDA * context_rms / squares.sqrt()))
