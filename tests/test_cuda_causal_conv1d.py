"""The CUDA kernels of the short causal convolution: emulated, and on a GPU."""

import pytest
import torch
from compare import assert_matches_reference
from recurrence_suite import bounds
from test_causal_conv1d import forward, gradients, in_double, make_inputs, rounded, run_reference

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


def test_runs_of_seq_idx(device):
    x, weight = torch.randn(2, 70, 16).transpose(1, 2).to(device), torch.randn(16, 4).to(device)
    seq_idx = torch.tensor([0] * 63 + [1] * 3 + [0] * 4, dtype=torch.int32, device=device).expand(2, 70)
    y = causal_conv1d_fn(x, weight, seq_idx=seq_idx)
    for start, stop in ((0, 63), (63, 66), (66, 70)):
        assert y[:, :, start:stop].equal(causal_conv1d_fn(x[:, :, start:stop], weight))


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


def test_update_in_a_pool(device):
    inputs = to(device, make_inputs(4, 9, 1, 4))
    pool = torch.zeros(5, 9, 4, device=device)
    slots = torch.tensor([4, -1, 1, 5], dtype=torch.int32, device=device)
    y = causal_conv1d_update(inputs["x"], pool, inputs["weight"], None, None, None, slots)
    own = torch.zeros(4, 9, 4, device=device)
    expected = causal_conv1d_update(inputs["x"], own, inputs["weight"])
    assert y[[0, 2]].equal(expected[[0, 2]]) and (y[1] == 0).all() and y[3].isnan().all()
    assert pool[4].equal(own[0]) and pool[1].equal(own[2]) and (pool[[0, 2, 3]] == 0).all()
