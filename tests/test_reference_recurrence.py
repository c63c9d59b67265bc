"""The references of the gated delta rule and simple GLA against closed forms."""

import torch
from compare import assert_matches_reference

from hypenet_kernels import reference

T, K, V = 6, 8, 5


def orthonormal_keys():
    return torch.linalg.qr(torch.randn(K, K, dtype=torch.float64))[0][:T].view(1, T, 1, K)


def values(*heads):
    return torch.randn(1, T, *(heads or (1,)), V, dtype=torch.float64)


def constant(value):
    return torch.full((1, T, 1), value, dtype=torch.float64)


def test_orthonormal_keys_return_exactly_what_was_stored():
    k, v = orthonormal_keys(), values()
    _, state = reference.chunk_gated_delta_rule(k, k, v, constant(0), constant(1), output_final_state=True)
    o, _ = reference.chunk_gated_delta_rule(k, k, 0 * v, constant(0), constant(0), scale=1, initial_state=state)
    assert_matches_reference("o", o, v)


def test_writing_a_key_again_replaces_its_value_in_the_delta_rule_and_adds_to_it_without():
    k, v = orthonormal_keys()[:, :1].expand(1, T, 1, K), values()
    delta, _ = reference.chunk_gated_delta_rule(k, k, v, constant(0), constant(1), scale=1)
    plain, _ = reference.chunk_simple_gla(k, k, v, constant(0), scale=1)
    assert_matches_reference("delta", delta, v)
    assert_matches_reference("plain", plain, v.cumsum(1))


def test_beta_of_two_reflects():
    k, v = orthonormal_keys()[:, :1], values()[:, :1] * 0
    S = torch.randn(1, 1, K, V, dtype=torch.float64)
    _, state = reference.chunk_gated_delta_rule(
        k, k, v, constant(0)[:, :1], constant(2)[:, :1], initial_state=S, output_final_state=True
    )
    reflection = torch.eye(K, dtype=torch.float64) - 2 * k.view(K, 1) @ k.view(1, K)
    assert_matches_reference("state", state, reflection @ S)


def test_a_reset_forgets():
    k, v, g = orthonormal_keys(), values(), constant(0)
    g[:, 3] = -torch.inf
    inputs = {"initial_state": torch.randn(1, 1, K, V, dtype=torch.float64)}
    o, _ = reference.chunk_simple_gla(k, k, v, g, **inputs)
    alone, _ = reference.chunk_simple_gla(k[:, 3:], k[:, 3:], v[:, 3:], g[:, 3:])
    assert o[:, 3:].equal(alone)
    o, _ = reference.chunk_gated_delta_rule(k, k, v, g, constant(0.5), **inputs)
    alone, _ = reference.chunk_gated_delta_rule(k[:, 3:], k[:, 3:], v[:, 3:], g[:, 3:], constant(0.5)[:, 3:])
    assert o[:, 3:].equal(alone)


def test_simple_gla_is_attention_with_decay():
    q, k, v = torch.randn(1, T, 1, K, dtype=torch.float64), orthonormal_keys(), values()
    g = -torch.rand(1, T, 1, dtype=torch.float64)
    G = g.view(T).cumsum(0)
    weights = (q.view(T, K) @ k.view(T, K).mT * (G[:, None] - G[None, :]).exp()).tril()
    o, _ = reference.chunk_simple_gla(q, k, v, g, scale=0.5)
    assert_matches_reference("o", o.view(T, V), 0.5 * weights @ v.view(T, V))


def test_constant_decay_is_a_geometric_series():
    k, v = orthonormal_keys()[:, :1].expand(1, T, 1, K), torch.ones(1, T, 1, V, dtype=torch.float64)
    g_gamma = torch.tensor([-0.5], dtype=torch.float64)
    o, _ = reference.chunk_simple_gla(k, k, v, g_gamma=g_gamma, scale=1)
    series = torch.exp(-0.5 * torch.arange(T, dtype=torch.float64)).cumsum(0)
    assert_matches_reference("o", o, series.view(1, T, 1, 1).expand(1, T, 1, V))


def test_value_heads_read_the_key_head_of_their_group():
    q, k = (torch.randn(1, T, 2, K, dtype=torch.float64) for _ in range(2))
    v, g = values(4), -torch.rand(1, T, 4, dtype=torch.float64)
    o, _ = reference.chunk_simple_gla(q, k, v, g)
    for j in range(4):
        h = slice(j // 2, j // 2 + 1)
        alone, _ = reference.chunk_simple_gla(q[:, :, h], k[:, :, h], v[:, :, j : j + 1], g[:, :, j : j + 1])
        assert o[:, :, j : j + 1].equal(alone)


def test_l2norm():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[0.6, 0.8], [0.0, 0.0]], dtype=torch.float64)
    assert (reference.l2norm(x) - expected).abs().max() < 1e-7
