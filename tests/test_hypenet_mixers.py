"""Each mixer against its equations, evaluated token by token in float64."""

import math

import torch
from compare import assert_matches_reference
from hypenet_models import small_config

from hypenet import GatedDeltaNet, LightningAttention, MixerContext, SoftmaxAttention

LENGTH, HEADS, D = 19, 4, 16


def inputs(mixer):
    """Return one sequence, a context with standard rotary angles, and a mixer whose weights all matter."""
    for name, parameter in mixer.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
        elif parameter.dim() == 2:
            torch.nn.init.normal_(parameter, 0.0, parameter.shape[1] ** -0.5)
    angles = torch.outer(torch.arange(LENGTH).double(), 100.0 ** -(torch.arange(D // 2).double() / (D // 2)))
    angles = torch.cat((angles, angles), dim=-1)[None]
    x = torch.randn(1, LENGTH, mixer.config.hidden_size, dtype=torch.float64)
    return x, MixerContext((angles.cos(), angles.sin())), mixer.double().requires_grad_(False)


def heads(x, linear):
    """Return a projection of x [1, T, C] as [T, heads, D]."""
    return (x[0] @ linear.weight.T).unflatten(-1, (-1, D))


def normed(x, norm):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight


def rotated(x, context):
    """Rotate components i and i + D/2 of every head by the angle of position t."""
    cos, sin = (table[0, :, None, : D // 2] for table in context.position_embeddings)
    z = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * torch.complex(cos, sin)
    return torch.cat((z.real, z.imag), dim=-1)


def test_softmax_attention():
    mixer = SoftmaxAttention(small_config(attn_logits_scaling="hype 20"), 0)
    x, context, mixer = inputs(mixer)
    q, k = normed(heads(x, mixer.q_proj), mixer.q_norm), normed(heads(x, mixer.k_proj), mixer.k_norm)
    v = heads(x, mixer.v_proj)
    o = torch.empty(LENGTH, HEADS, D, dtype=torch.float64)
    for t in range(LENGTH):
        s_t = math.log(t + 20) / math.log(20)
        for h in range(HEADS):
            weights = (k[: t + 1, h // 2] @ (s_t * q[t, h]) / math.sqrt(D)).softmax(0)
            o[t, h] = weights @ v[: t + 1, h // 2]
    y = (o * heads(x, mixer.o_gate).sigmoid()).flatten(1) @ mixer.o_proj.weight.T
    assert_matches_reference("y", mixer(x, context)[0], y)


def test_lightning_attention():
    mixer = LightningAttention(small_config(), 0)
    x, context, mixer = inputs(mixer)
    q = rotated(normed(heads(x, mixer.q_proj), mixer.q_norm), context)
    k = rotated(normed(heads(x, mixer.k_proj), mixer.k_norm), context)
    v = heads(x, mixer.v_proj)
    o = torch.empty(LENGTH, HEADS, D, dtype=torch.float64)
    for h in range(HEADS):
        # The decay is a float32 constant of the model.
        gamma = torch.tensor(-(2.0 ** (-8 * (h + 1) / HEADS)), dtype=torch.float32).double().exp()
        S = torch.zeros(D, D, dtype=torch.float64)
        for t in range(LENGTH):
            S = gamma * S + torch.outer(k[t, h], v[t, h])
            o[t, h] = q[t, h] @ S / math.sqrt(D)
    gate = heads(x, mixer.z_proj).flatten(1).sigmoid()
    y = (normed(o.flatten(1), mixer.o_norm) * gate) @ mixer.o_proj.weight.T
    assert_matches_reference("y", mixer(x, context)[0], y)


def test_gated_delta_net():
    mixer = GatedDeltaNet(small_config(), 0)
    x, context, mixer = inputs(mixer)
    q = rotated(normed(heads(x, mixer.q_proj), mixer.q_norm), context)
    k = rotated(normed(heads(x, mixer.k_proj), mixer.k_norm), context)
    q, k = (z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt() for z in (q, k))
    v = heads(x, mixer.v_proj)
    beta = 2 * (x[0] @ mixer.b_proj.weight.T).sigmoid()
    alpha = (
        -mixer.decay_bias.A_log.exp() * (1 + (x[0] @ mixer.a_proj.weight.T + mixer.decay_bias.dt_bias).exp()).log()
    ).exp()
    o = torch.empty(LENGTH, HEADS, D, dtype=torch.float64)
    for h in range(HEADS):
        S = torch.zeros(D, D, dtype=torch.float64)
        for t in range(LENGTH):
            transition = torch.eye(D, dtype=torch.float64) - beta[t, h] * torch.outer(k[t, h], k[t, h])
            S = alpha[t, h] * transition @ S + beta[t, h] * torch.outer(k[t, h], v[t, h])
            o[t, h] = q[t, h] @ S / math.sqrt(D)
    g = heads(x, mixer.g_proj)
    y = (normed(o, mixer.o_norm) * g * g.sigmoid()).flatten(1) @ mixer.o_proj.weight.T
    assert_matches_reference("y", mixer(x, context)[0], y)
