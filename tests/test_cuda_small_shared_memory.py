"""GPUs of which a block has 99 KB of shared memory (8.6, 8.9, 12.0), emulated: what runs at head dimension 128."""

import emulation
import pytest
import test_cuda_sequence_split
import torch
from compare import assert_matches_reference, assert_within_guarantee
from recurrence_suite import Shape, bounds, cotangents, make_inputs, raise_some_betas
from test_cuda_gated_delta_bwd import both, check, results

from hypenet_kernels import (
    chunk_gated_delta_rule,
    chunk_simple_gla,
    hype_attention,
    hype_attention_decode,
    reference,
)

D, T = 128, 150
BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def small():
    machine = emulation.module()
    machine.set_max_shared_bytes(99 * 1024)
    machine.forget_launches()
    with emulation.emulated():
        yield machine
    machine.set_max_shared_bytes(227 * 1024)


def recurrent_inputs(K=D):
    q, k = (torch.nn.functional.normalize(torch.randn(1, T, 1, K), dim=-1).to(BF16) for _ in range(2))
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


def kernels_of(machine):
    return {record["name"]: record["shared_bytes"] for record in machine.launches()}


@both
@pytest.mark.parametrize(("K", "V", "dtype"), [(128, 128, BF16), (128, 64, FP16), (64, 192, FP16), (64, 64, BF16)])
def test_chunk_backward(small, K, V, dtype, delta):
    """Grouped value heads, some chunks with beta > 1 and some without."""
    inputs = make_inputs(Shape(1, 200, 1, 2, K, V), delta, dtype)
    if delta:
        raise_some_betas(inputs["beta"])
    check("cpu", inputs)
    assert {"gated_delta_bwd_scan_kernel", "gated_delta_bwd_chunk_small_kernel"} < kernels_of(small).keys()


@both
def test_chunk_backward_of_packed_sequences(delta):
    lengths = (5, 0, 64, 1, 65, 0)
    inputs = make_inputs(Shape(1, sum(lengths), 2, 4, D, 64), delta, BF16, N=len(lengths))
    if delta:
        inputs["beta"][:, 5:69] *= 2  # above 1 in the third sequence only
    check("cpu", inputs, cu_seqlens=bounds(*lengths))


@both
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_chunk_backward_of_split_sequences(delta, dtype):
    inputs = make_inputs(Shape(1, 390, 1, 1, D, 64), delta, dtype)
    if delta:
        inputs["beta"][:, 70:300:5] += 1
    test_cuda_sequence_split.check("cpu", delta, inputs, dtype)


@both
def test_chunk_backward_has_the_bits_of_larger_gpus_in_any_order_of_threads(small, delta):
    """All but dk, of which the sum has another order."""
    inputs = make_inputs(Shape(1, 135, 1, 2, D, 128), delta, BF16)
    if delta:
        raise_some_betas(inputs["beta"])
    given, runs = cotangents(inputs), []
    for kilobytes, seed in ((227, 0), *((99, seed) for seed in emulation.SEEDS)):
        small.set_max_shared_bytes(kilobytes * 1024)
        small.set_seed(seed)
        runs.append(results("cpu", inputs, *given))
    large, *all_small = runs
    for name, x in large.items():
        assert all(run[name].equal(all_small[0][name]) for run in all_small), name
        assert name == "k" or all_small[0][name].equal(x), name


def test_chunk_backward_says_what_is_missing_for_wide_keys(small):
    inputs = [x.requires_grad_() for x in recurrent_inputs(K=256)]
    small.set_max_shared_bytes(227 * 1024)  # for the forward
    o, _ = chunk_gated_delta_rule(*inputs)
    small.set_max_shared_bytes(99 * 1024)
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
