"""GPUs of which a block has 99 KB of shared memory (8.6, 8.9, 12.0), emulated: what runs at head dimension 128."""

import emulation
import pytest
import torch
from compare import assert_matches_reference, assert_within_guarantee

from hypenet_kernels import (
    chunk_gated_delta_rule,
    chunk_simple_gla,
    hype_attention,
    hype_attention_decode,
    reference,
)

D, T = 128, 150
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def small():
    machine = emulation.module()
    machine.set_max_shared_bytes(99 * 1024)
    machine.forget_launches()
    with emulation.emulated():
        yield machine
    machine.set_max_shared_bytes(227 * 1024)


def recurrent_inputs():
    q, k = (torch.nn.functional.normalize(torch.randn(1, T, 1, D), dim=-1).to(BF16) for _ in range(2))
    return q, k, torch.randn(1, T, 2, D).to(BF16), -torch.rand(1, T, 2), torch.rand(1, T, 2)


@pytest.mark.parametrize("processors", [1, 132], ids="{} SMs".format)
@pytest.mark.parametrize("delta", [True, False])
def test_chunk_forward(small, delta, processors):
    """One SM is full of wide blocks, which may not fit."""
    inputs, op = recurrent_inputs()[: 4 + delta], chunk_gated_delta_rule if delta else chunk_simple_gla
    small.set_num_processors(processors)
    try:
        o, state = op(*inputs, output_final_state=True)
    finally:
        small.set_num_processors(4)
    expected = getattr(reference, op.__name__)(*(x.double() for x in inputs), output_final_state=True)
    assert_within_guarantee("o", o, expected[0])
    assert_within_guarantee("final_state", state, expected[1])


def test_chunk_backward_says_what_is_missing():
    inputs = [x.requires_grad_() for x in recurrent_inputs()]
    o, _ = chunk_gated_delta_rule(*inputs)
    with pytest.raises(RuntimeError, match=r"101376 bytes of shared memory, got \d+: less shared memory than"):
        o.float().sum().backward()


@pytest.mark.parametrize("packed", [False, True])
def test_attention(packed):
    leaves = [torch.randn(1, T, heads, D).to(BF16).requires_grad_() for heads in (2, 1, 1)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    options = {"logit_scale_base": 100.0, "cu_seqlens": torch.tensor([0, 67, T]) if packed else None}
    o, expected = hype_attention(*leaves, **options), reference.hype_attention(*exact, **options)
    assert_matches_reference("hype_attention: o", o, expected)
    do = torch.randn(o.shape).to(BF16)
    gradients, wanted = torch.autograd.grad(o, leaves, do), torch.autograd.grad(expected, exact, do.double())
    for name, x, y in zip("qkv", gradients, wanted, strict=True):
        assert_matches_reference(f"hype_attention: d{name}", x, y)


@pytest.mark.parametrize("tokens", [1, 3])
def test_attention_decode(tokens):
    q, k_cache, v_cache = (torch.randn(1, n, heads, D).to(BF16) for n, heads in ((tokens, 4), (700, 1), (700, 1)))
    lengths = torch.tensor([600])
    o = hype_attention_decode(q, k_cache, v_cache, lengths)
    expected = reference.hype_attention_decode(q.double(), k_cache.double(), v_cache.double(), lengths)
    assert_matches_reference("hype_attention_decode: o", o, expected)
