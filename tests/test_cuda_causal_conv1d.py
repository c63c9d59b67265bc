"""The CUDA kernels of the short causal convolution: emulated, and on a GPU."""

from itertools import pairwise

import pytest
import torch
from compare import assert_matches_reference
from recurrence_suite import bounds
from test_causal_conv1d import (
    check_padding,
    forward,
    gradients,
    in_double,
    make_inputs,
    rounded,
    run_reference,
)

from hypenet_kernels import causal_conv1d_fn, causal_conv1d_update

SHAPES = [  # B, C, T, W
    (2, 5, 1, 4),  # one token, single elements
    (1, 64, 64, 4),  # a block of tokens, 16-byte vectors
    (2, 72, 65, 4),  # one token more
    (1, 1032, 5, 3),  # more channels than a block has
    (3, 16, 2, 4),  # fewer tokens than taps
    (1, 9, 70, 2),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def to(device, inputs):
    return {name: x.to(device) for name, x in inputs.items()}


def check(device, inputs, dtype, **options):
    on_device = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    results, expected = forward(to(device, inputs), **on_device), run_reference(in_double(inputs), **options)
    for name, result, exact in zip(("y", "final_states"), results, expected, strict=True):
        assert_matches_reference(name, result.cpu(), exact, eager=rounded(exact, dtype))
    given = [torch.randn_like(x) for x in expected]
    exact = gradients(run_reference, in_double(inputs), given, **options)
    found = gradients(forward, to(device, inputs), [x.to(device) for x in given], **on_device)
    for name, x in found.items():
        assert_matches_reference(f"d{name}", x.cpu(), exact[name], eager=rounded(exact[name], dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_every_gradient(device, shape, dtype):
    check(device, make_inputs(*shape, dtype), dtype, activation="silu")


def test_without_activation(device):
    check(device, make_inputs(1, 16, 70, 4), torch.float32)


@pytest.mark.parametrize("C", [16, 9])
def test_packed_sequences(device, C):
    lengths = (5, 0, 1, 58, 2, 64)  # a sequence begins at the block's last tokens
    inputs = make_inputs(1, C, sum(lengths) + 7, 4, N=len(lengths))
    check(device, inputs, torch.float32, cu_seqlens=bounds(*lengths), activation="silu")


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_runs_of_seq_idx(device, index_dtype):
    """Sequences that begin 1, 2 and 3 tokens before a block of 64, at its first token, and in the middle."""
    x, weight = torch.randn(2, 200, 16).transpose(1, 2).to(device), torch.randn(16, 4).to(device)
    starts = ((0, 61, 126, 191), (0, 63, 64, 100))
    seq_idx = torch.zeros(2, 200, dtype=index_dtype)
    for b, row in enumerate(starts):
        for n, start in enumerate(row):
            seq_idx[b, start:] = n % 2
    seq_idx, dy = seq_idx.to(device), torch.randn(2, 16, 200, device=device)
    run = lambda x, **options: (causal_conv1d_fn(**x, **options),)  # noqa: E731
    y = causal_conv1d_fn(x, weight, seq_idx=seq_idx)
    dx = gradients(run, {"x": x, "weight": weight}, [dy], seq_idx=seq_idx)["x"]
    for b, row in enumerate(starts):
        for start, stop in pairwise((*row, 200)):
            alone, given = {"x": x[b, None, :, start:stop], "weight": weight}, [dy[b, None, :, start:stop]]
            assert y[b, None, :, start:stop].equal(causal_conv1d_fn(**alone))
            assert dx[b, None, :, start:stop].equal(gradients(run, alone, given)["x"])


def test_negative_seq_idx_is_padding(device):
    check_padding(device)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_bounds_of_no_sequence(device, index_dtype):
    """Without values of cu_seqlens on the host, a GPU must take any; here none but 0, and a first one after 0."""
    x, weight = torch.randn(1, 70, 16).transpose(1, 2).to(device), torch.randn(16, 4).to(device)
    y = causal_conv1d_fn(x, weight, cu_seqlens=torch.tensor([0], dtype=index_dtype, device=device))
    assert (y == 0).all()
    bounds_of_nothing = torch.tensor([0, 0, 0], dtype=index_dtype, device=device)
    assert (causal_conv1d_fn(x, weight, cu_seqlens=bounds_of_nothing) == 0).all()


@pytest.mark.parametrize("weight_dtype", [torch.float64, *DTYPES], ids=str)
def test_weights_of_any_dtype_and_strides(device, weight_dtype):
    inputs = to(device, make_inputs(1, 16, 9, 4, torch.bfloat16))
    weight, bias = inputs["weight"].to(weight_dtype), inputs["bias"].to(weight_dtype)
    strided = inputs | {"weight": weight.mT.contiguous().mT, "bias": torch.stack([bias, bias], dim=1)[:, 0]}
    widened = inputs | {"weight": weight.float(), "bias": bias.float()}
    given = [torch.randn(1, 16, 9, device=device), torch.randn(1, 16, 3, device=device)]
    assert forward(strided, activation="silu")[0].equal(forward(widened, activation="silu")[0])
    found, expected = (gradients(forward, x, given, activation="silu") for x in (strided, widened))
    assert all(x.equal(expected[name].to(x.dtype)) for name, x in found.items())
    results = [
        causal_conv1d_update(x["x"], x["initial_states"].clone(), x["weight"], x["bias"]) for x in (strided, widened)
    ]
    assert results[0].equal(results[1])


@pytest.mark.parametrize("C", [12, 20])
def test_rows_of_8_but_not_16_bytes(device, C):
    """The backward reads 4 elements of 16-bit rows at a time, the forward 8."""
    check(device, make_inputs(1, C, 70, 4, torch.bfloat16), torch.bfloat16, activation="silu")


def test_twice_the_same_bits_and_alone_as_in_a_batch(device):
    inputs = to(device, make_inputs(3, 16, 130, 4))
    given = [torch.randn(3, 16, 130, device=device), torch.randn(3, 16, 3, device=device)]
    first, second = (gradients(forward, inputs, given) for _ in range(2))
    assert all(x.equal(second[name]) for name, x in first.items())
    alone = {name: x[1:2] if name in ("x", "initial_states") else x for name, x in inputs.items()}
    assert forward(alone)[0].equal(forward(inputs)[0][1:2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ring", [False, True])
def test_updates_are_the_convolution_token_by_token(device, dtype, ring):
    inputs = to(device, make_inputs(2, 70, 7, 4, dtype))
    state = torch.zeros(2, 70, 5, dtype=dtype, device=device)
    state[:, :, 2:] = inputs["initial_states"]
    lengths = torch.tensor([5, 5], device=device) if ring else None
    expected = causal_conv1d_fn(**inputs, activation="silu")
    for start, stop in ((0, 1), (1, 2), (2, 7)):
        x = inputs["x"][:, :, start:stop]
        y = causal_conv1d_update(x, state, inputs["weight"], inputs["bias"], "silu", lengths)
        exact = expected[:, :, start:stop].double()
        assert_matches_reference("y", y.cpu(), exact.cpu(), eager=rounded(exact.cpu(), dtype))
        lengths = lengths + stop - start if ring else None


def test_update_of_time_last_tokens_in_a_ring_of_negative_length(device):
    x, weight = torch.randn(2, 16, 3, device=device), torch.randn(16, 4, device=device)
    state = torch.randn(2, 16, 5, device=device)
    states = [state.clone() for _ in range(2)]
    results = [
        causal_conv1d_update(x, own, weight, cache_seqlens=torch.tensor(lengths, device=device))
        for own, lengths in zip(states, ([-3, -11], [2, 4]), strict=True)
    ]
    assert results[0].equal(results[1]) and states[0].equal(states[1]) and not states[0].equal(state)


def test_update_in_a_pool(device):
    inputs = to(device, make_inputs(4, 9, 1, 4))
    pool = torch.zeros(5, 9, 4, device=device)
    slots = torch.tensor([4, -1, 1, 5], dtype=torch.int32, device=device)
    y = causal_conv1d_update(inputs["x"], pool, inputs["weight"], None, None, None, slots)
    own = torch.zeros(4, 9, 4, device=device)
    expected = causal_conv1d_update(inputs["x"], own, inputs["weight"])
    assert y[[0, 2]].equal(expected[[0, 2]]) and (y[1] == 0).all() and y[3].isnan().all()
    assert pool[4].equal(own[0]) and pool[1].equal(own[2]) and (pool[[0, 2, 3]] == 0).all()
