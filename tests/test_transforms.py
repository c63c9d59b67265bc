"""torch.func's transforms of every op, eager and compiled: the right gradient or a refusal, never zeros."""

import pytest
import torch

import hypenet_kernels as kernels

B, T, H, K = 1, 9, 2, 16


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


Q, G, BETA = normal(B, T, H, K), -normal(B, T, H).abs(), normal(B, T, H).sigmoid()
WEIGHT, ANGLES = normal(K), normal(B, T, K)
# Functions of one tensor like Q.
DIFFERENTIABLE = {
    "chunk_gated_delta_rule": lambda x: kernels.chunk_gated_delta_rule(x, Q, Q, G, BETA)[0],
    "chunk_simple_gla": lambda x: kernels.chunk_simple_gla(Q, x, Q, G)[0],
    "hype_attention": lambda x: kernels.hype_attention(Q, Q, x),
    "causal_conv1d_fn": lambda x: kernels.causal_conv1d_fn(x.flatten(2).mT, normal(H * K, 4)),
    "rms_norm_rope": lambda x: kernels.rms_norm_rope(x, WEIGHT, ANGLES.cos(), ANGLES.sin()),
    "rms_norm_gated": lambda x: kernels.rms_norm_gated(Q, x, WEIGHT),
    "add_rms_norm": lambda x: kernels.add_rms_norm(x, Q, WEIGHT)[0],
    "swiglu": lambda x: kernels.swiglu(x, Q),
}
STEPS = {
    "gated_delta_step": lambda x: kernels.gated_delta_step(x, Q, Q, G, BETA, torch.zeros(B, H, K, K)),
    "simple_gla_step": lambda x: kernels.simple_gla_step(x, Q, Q, G, torch.zeros(B, H, K, K)),
    "hype_attention_decode": lambda x: kernels.hype_attention_decode(x, Q, Q, torch.tensor([T])),
    "causal_conv1d_update": lambda x: kernels.causal_conv1d_update(
        x.flatten(2).mT.contiguous(), torch.zeros(B, H * K, 3), normal(H * K, 4)
    ),
}


def as_is(function):
    return function


def compiled(function):
    return torch.compile(function, backend="aot_eager")


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_compiled_gradient_of_torch_func(name):
    """torch.compile once took the op without a gradient: the result was 0."""
    gradient = torch.func.grad(lambda x: DIFFERENTIABLE[name](x).square().sum())
    assert gradient(Q).abs().max() > 0
    torch.testing.assert_close(compiled(gradient)(Q), gradient(Q))


@pytest.mark.parametrize("mode", [as_is, compiled])
@pytest.mark.parametrize("name", DIFFERENTIABLE | STEPS)
def test_forward_mode_is_refused(name, mode):
    function = (DIFFERENTIABLE | STEPS)[name]
    with pytest.raises(NotImplementedError, match=f"{name}: forward-mode derivatives .*not built"):
        mode(lambda x: torch.func.jvp(function, (x,), (torch.ones_like(x),)))(Q)
