"""The parts of a calibration: each sets some weights of a twin by a closed form.

    rank   the twin's decays, given to its heads in the order in which they look back
    decay  half-lives equal to the distances that the heads look back
    beta   write strengths of the delta rule, stronger for heads whose attention is concentrated
    gate   output gates that are nearly constant and open
    gain   a factor for each channel or head after the norm, by least squares to the heads' outputs
    ridge  the output projection, by ridge regression of the layer's output that starts from the copied one

A part works on any mixer that has what it sets. H heads, C hidden size, W = H * D channels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from halo.calibration.layer import LayerData, input_of
from halo.calibration.statistics import Statistics, constant_direction
from hypenet.mixers import Mixer, alibi_log_decay

SHORTEST = 0.5  # tokens; the half-life of a head that looks at its own token only
WEAKEST, STRONGEST = 0.3, 0.7  # beta of the head of the layer whose attention is the widest and the narrowest
OPEN = 1.2784645427610738  # silu(OPEN) = 1


@dataclass(frozen=True)
class Fit:
    """The inputs of a part: a layer, and the statistics of its attention.

    Attributes:
        data: The layer on the sequences to fit on.
        statistics: Of its attention on them.
        per_head: Whether a gain is for a head; otherwise for a channel.
        ridge_eps: Strength of the ridge, relative to the mean power of the features.
    """

    data: LayerData
    statistics: Statistics
    per_head: bool = False
    ridge_eps: float = 0.1

    @cached_property
    def constant_C(self) -> Tensor:
        """The row whose product with the layer's input is nearest to 1, float64 [C]."""
        return constant_direction(self.data)


@torch.no_grad()
def rank(mixer: Mixer, fit: Fit) -> None:
    """Give the slowest decay to the head that looks back farthest, and so on."""
    decays = mixer.get_buffer("log_decay")
    nearest_first = fit.statistics.look_back_H.argsort(stable=True)
    decays[nearest_first] = decays.sort().values


@torch.no_grad()
def decay(mixer: Mixer, fit: Fit) -> None:
    """Give each head a half-life of the distance that it looks back, the same for every token."""
    rate = math.log(2) / fit.statistics.look_back_H.clamp(min=SHORTEST)
    if hasattr(mixer, "log_decay"):
        mixer.get_buffer("log_decay").copy_(-rate)
        return
    set_rate(mixer, rate)
    for name in ("a_proj", "dt_proj"):
        if hasattr(mixer, name):
            nn.init.zeros_(mixer.get_parameter(f"{name}.weight"))


@torch.no_grad()
def beta(mixer: Mixer, fit: Fit) -> None:
    """Give each head a nearly constant write strength 2 sigmoid(x Wb) between WEAKEST and STRONGEST."""
    strength = WEAKEST + (STRONGEST - WEAKEST) * concentration(fit.statistics.entropy_H)
    mixer.get_parameter("b_proj.weight").copy_((strength / 2).logit()[:, None] * fit.constant_C)


@torch.no_grad()
def gate(mixer: Mixer, fit: Fit) -> None:
    """Give every channel of the output gate silu(x Wg) a nearly constant value of 1."""
    weight = mixer.get_parameter("g_proj.weight")
    weight.copy_((OPEN * fit.constant_C).expand_as(weight))


@torch.no_grad()
def gain(mixer: Mixer, fit: Fit) -> None:
    """Scale what the output projection reads so that it is nearest to what the teacher's reads.

    The factor of a channel is <c, f> / <f, f>, with f the twin's feature and c the teacher's. It becomes part of the
    norm's weight if that has one for every channel, and otherwise of the projection's columns.
    """
    weight = mixer.o_proj.weight
    products, powers = torch.zeros(2, weight.shape[1], dtype=torch.float64, device=weight.device)
    for one in fit.data.sequences():
        f_NTW, _ = input_of(mixer.o_proj, mixer, one)
        f, c = f_NTW.double(), one.context_NTW.double()
        products += (f * c).sum((0, 1))
        powers += f.square().sum((0, 1))
    if fit.per_head:
        products, powers = (
            x.unflatten(0, (-1, mixer.head_dim)).sum(1).repeat_interleave(mixer.head_dim) for x in (products, powers)
        )
    factor_W = torch.where(powers > 0, products / powers, 1.0)
    norm = getattr(mixer, "o_norm", None)
    if norm is not None and norm.weight.shape == factor_W.shape:
        norm.weight.mul_(factor_W)
    else:
        weight.mul_(factor_W)


@torch.no_grad()
def ridge(mixer: Mixer, fit: Fit) -> None:
    """Change the output projection by the least squares of the error that is left, with a penalty on the change."""
    weight = mixer.o_proj.weight
    normal = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
    cross = torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
    for one in fit.data.sequences():
        f_NTW, y_NTC = input_of(mixer.o_proj, mixer, one)
        f = f_NTW.flatten(0, 1).float()
        error = (one.y_NTC.float() - y_NTC.float()).flatten(0, 1)
        with torch.autocast(weight.device.type, enabled=False):
            normal += f.T @ f
            cross += error.T @ f
    normal.diagonal().add_(fit.ridge_eps * normal.diagonal().mean())
    change, singular = torch.linalg.solve_ex(normal, cross.T)
    if not singular:
        weight.add_(change.T)


PARTS: dict[str, Callable[[Mixer, Fit], None]] = {
    "rank": rank,
    "decay": decay,
    "beta": beta,
    "gate": gate,
    "gain": gain,
    "ridge": ridge,
}


def concentration(entropy_H: Tensor) -> Tensor:
    """Return how narrow each head's attention is among those of its layer, from 0 to 1."""
    width = (entropy_H.max() - entropy_H.min()).clamp(min=1e-3)
    return 1 - (entropy_H - entropy_H.min()) / width


def set_rate(mixer: Mixer, rate_H: Tensor) -> None:
    """Let exp(A_log) softplus(dt_bias) be a rate per token for each head, with A_log = 0."""
    parameters = mixer.get_submodule("decay_bias")
    nn.init.zeros_(parameters.get_parameter("A_log"))
    parameters.get_parameter("dt_bias").data.copy_(rate_H + torch.log(-torch.expm1(-rate_H)))


@torch.no_grad()
def restore_slopes(mixer: Mixer) -> None:
    """Permute the heads of a twin so that its decays are the ALiBi slopes in their order again, as published.

    What the twin computes stays the same. A twin whose heads share keys and values is left as it is.
    """
    if mixer.num_kv_heads != mixer.num_heads:
        return
    decays = mixer.get_buffer("log_decay")
    slopes = alibi_log_decay(mixer.num_heads).to(decays.device)
    order = torch.empty(mixer.num_heads, dtype=torch.long, device=decays.device)
    order[slopes.argsort()] = decays.argsort()  # head h becomes what head order[h] is
    channels = (order[:, None] * mixer.head_dim + torch.arange(mixer.head_dim, device=order.device)).flatten()
    for name, parameter in mixer.named_parameters():
        module, kind = name.split(".")
        if (module, kind) == ("o_proj", "weight"):
            parameter.copy_(parameter[:, channels])
        elif module in ("q_proj", "k_proj", "v_proj", "z_proj", "o_norm"):
            parameter.copy_(parameter[channels])
    decays.copy_(decays[order])
