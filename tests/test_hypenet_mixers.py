"""Each mixer against its equations, evaluated token by token in float64."""

import math

import pytest
import torch
from compare import assert_matches_reference
from hypenet_models import small_config
from transformers.models.mamba2 import modeling_mamba2

from hypenet import GatedDeltaNet, LightningAttention, Mamba2, MixerContext, SoftmaxAttention

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


def mamba2_terms(mixer, x, context):
    """Return q, k, v [T, heads, D], the step sizes dt [T, heads], and -exp(A_log)."""
    q, k = heads(x, mixer.q_proj), heads(x, mixer.k_proj)
    if mixer.config.mamba2_use_qk_norm:
        q, k = normed(q, mixer.q_norm), normed(k, mixer.k_norm)
    if mixer.config.mamba2_use_rope:
        q, k = rotated(q, context), rotated(k, context)
    dt = (1 + (x[0] @ mixer.dt_proj.weight.T + mixer.decay_bias.dt_bias).exp()).log()
    return q, k, heads(x, mixer.v_proj), dt, -mixer.decay_bias.A_log.exp()


MAMBA2 = {
    "default": {},
    "shared heads": {"mamba2_nkv": 2},
    "plain": {"mamba2_use_qk_norm": False, "mamba2_use_rope": False, "mamba2_use_gate": False},
}


@pytest.mark.parametrize("fields", MAMBA2.values(), ids=MAMBA2)
def test_mamba2(fields):
    """The output, and the gradients in x and every parameter, the decay's among them."""
    x, context, mixer = inputs(Mamba2(small_config(**fields), 0))
    x.requires_grad_()
    mixer.requires_grad_(True)
    q, k, v, dt, A = mamba2_terms(mixer, x, context)
    outputs = []
    for h in range(HEADS):
        S, shared = torch.zeros(D, D, dtype=torch.float64), h * k.shape[1] // HEADS
        for t in range(LENGTH):
            S = (A[h] * dt[t, h]).exp() * S + dt[t, h] * torch.outer(k[t, shared], v[t, shared])
            outputs.append(q[t, h] @ S / math.sqrt(D))
    o = normed(torch.stack(outputs).view(HEADS, LENGTH, D).transpose(0, 1), mixer.o_norm)
    if mixer.config.mamba2_use_gate:
        g = heads(x, mixer.g_proj)
        o = o * g * g.sigmoid()
    y = o.flatten(1) @ mixer.o_proj.weight.T
    result = mixer(x, context)[0]
    assert_matches_reference("y", result, y)

    names, parameters = zip(*mixer.named_parameters(), strict=True)
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, (x, *parameters), dy)
    for name, own, other in zip(
        ("x", *names), torch.autograd.grad(result, (x, *parameters), dy), expected, strict=True
    ):
        assert_matches_reference(f"gradient of {name}", own, other)


def test_mamba2_computes_the_scan_of_mamba2():
    """That of transformers, in float32, with q as C, k as B and v as x; it has no factor 1 / sqrt(D)."""
    x, context, mixer = inputs(Mamba2(small_config(), 0))
    q, k, v, dt, A = mamba2_terms(mixer, x, context)
    scan = modeling_mamba2.mamba2_chunk_scan
    o = scan(*(z[None].float() if z.dim() > 1 else z.float() for z in (v, dt, A, k, q)), chunk_size=8)[0]
    g = heads(x, mixer.g_proj)
    y = (normed(o.double() / math.sqrt(D), mixer.o_norm) * g * g.sigmoid()).flatten(1) @ mixer.o_proj.weight.T
    assert_matches_reference("y", mixer(x, context)[0], y, dtype=torch.float32)
