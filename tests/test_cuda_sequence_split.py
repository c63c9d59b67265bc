"""Sequences split into segments on CUDA, forward and backward, against the reference, on the emulator or a GPU."""

from itertools import pairwise

import emulation
import pytest
import torch
from compare import assert_accurate_as_hi_lo, assert_matches_reference
from recurrence_suite import Shape, arguments, bounds, cotangents, gradients, in_double, make_inputs, raise_some_betas

import hypenet_kernels
from hypenet_kernels import _recurrence_cuda, reference
from hypenet_kernels._recurrence import Inputs

BF16, FP16 = torch.bfloat16, torch.float16
OPS = {
    True: (torch.ops.hypenet.chunk_gated_delta_rule, reference.chunk_gated_delta_rule),
    False: (torch.ops.hypenet.chunk_simple_gla, reference.chunk_simple_gla),
}
SHAPES = {  # in segments of two chunks
    "one segment": (Shape(1, 128, 1, 1, 64, 64), BF16),
    "one token more": (Shape(1, 129, 1, 1, 64, 64), FP16),
    "three segments, the last whole": (Shape(2, 384, 1, 1, 64, 64), BF16),
    "four, value heads in groups, V in two tiles": (Shape(1, 400, 1, 2, 64, 128), BF16),
    "K of 128, padded V": (Shape(1, 390, 1, 1, 128, 40), FP16),
    "K padded to 256": (Shape(1, 390, 1, 1, 192, 64), BF16),
}
both = pytest.mark.parametrize("delta", [True, False], ids=["delta", "gla"])


def forward(device, delta, inputs, segment_chunks, cu_seqlens=None):
    """Return (o, final_state) of the internal op, which takes any number of chunks per segment."""
    tensors = [x if x is None else x.to(device) for x in arguments(inputs)]
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(device)
    return OPS[delta][0].default(*tensors, cu_seqlens, inputs["q"].shape[-1] ** -0.5, segment_chunks)[:2]


def backward(device, delta, inputs, segment_chunks, do, dfinal_state, cu_seqlens=None):
    leaves = {name: x.detach().to(device).requires_grad_() for name, x in inputs.items()}
    results = forward(device, delta, leaves, segment_chunks, cu_seqlens)
    given = do.to(device, inputs["q"].dtype), dfinal_state.to(device)
    values = torch.autograd.grad(results, list(leaves.values()), given)
    return {name: x.cpu() for name, x in zip(inputs, values, strict=True)}


def check(device, delta, inputs, dtype):
    do, dfinal_state = cotangents(inputs)
    exact = in_double(inputs)
    results = forward(device, delta, inputs, 2)
    expected = OPS[delta][1](**exact, output_final_state=True)
    for what, result, x in zip(("o", "final_state"), results, expected, strict=True):
        assert_matches_reference(what, result.cpu(), x, eager=x.to(dtype), dtype=dtype)
    found = backward(device, delta, inputs, 2, do, dfinal_state)
    for what, x in gradients(OPS[delta][1], exact, do.double(), dfinal_state.double()).items():
        assert_matches_reference(f"d{what}", found[what], x, eager=x.to(dtype), dtype=dtype)


@both
@pytest.mark.parametrize("name", SHAPES)
def test_forward_and_every_gradient(device, name, delta):
    shape, dtype = SHAPES[name]
    check(device, delta, make_inputs(shape, delta, dtype), dtype)


@pytest.mark.parametrize("K, V", [(64, 128), (256, 64)])
def test_segments_with_and_without_beta_above_one(device, K, V):
    """One chunk of every segment has beta > 1, in both passes and both directions."""
    inputs = make_inputs(Shape(1, 400, 1, 2, K, V), True, BF16)
    raise_some_betas(inputs["beta"])
    check(device, True, inputs, BF16)


def test_states_of_segments_with_beta_above_one(device):
    """Every factor between two states, forward and backward, is a hi/lo split, in the first pass too."""
    inputs = make_inputs(Shape(1, 330, 1, 1, 64, 64), True, BF16, decay_kind="none")
    inputs["beta"] *= 2
    exact, (do, dfinal_state) = in_double(inputs), cotangents(inputs)
    do.zero_()
    _, state = OPS[True][1](**exact, output_final_state=True)
    assert_accurate_as_hi_lo("final_state", forward(device, True, inputs, 1)[1].cpu(), state, BF16)
    dstate = gradients(OPS[True][1], exact, do.double(), dfinal_state.double())["initial_state"]
    found = backward(device, True, inputs, 1, do, dfinal_state)["initial_state"]
    assert_accurate_as_hi_lo("dinitial_state", found, dstate, BF16)


@both
@pytest.mark.parametrize("K, lengths", [(64, (130, 0, 5, 64, 300, 0)), (256, (65, 0, 129))])
def test_packed_sequences_are_each_alone(device, K, lengths, delta):
    """Sequences that are empty, of one segment, and of several."""
    inputs = make_inputs(Shape(1, sum(lengths), 1, 2, K, 64), delta, BF16, N=len(lengths))
    if delta:
        raise_some_betas(inputs["beta"])
    do, dfinal_state = cotangents(inputs)
    cu_seqlens = bounds(*lengths)
    o, final_state = forward(device, delta, inputs, 1, cu_seqlens)
    found = backward(device, delta, inputs, 1, do, dfinal_state, cu_seqlens)
    for n, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        alone = {name: x[:, start:stop] for name, x in inputs.items()}
        alone["initial_state"] = inputs["initial_state"][n : n + 1]
        o_alone, state_alone = forward(device, delta, alone, 1)
        assert o[:, start:stop].equal(o_alone) and final_state[n].equal(state_alone[0])
        found_alone = backward(device, delta, alone, 1, do[:, start:stop], dfinal_state[n : n + 1])
        for name, x in found_alone.items():
            part = found[name][n : n + 1] if name == "initial_state" else found[name][:, start:stop]
            assert part.equal(x), name


@both
@pytest.mark.parametrize("keys", ["random", "identical"])
def test_without_decay_a_state_is_carried_through_every_segment(device, keys, delta):
    """Without decay, an error in any segment's transition shows in the last token."""
    inputs = make_inputs(Shape(1, 330, 1, 1, 64, 64), delta, BF16, decay_kind="none")
    if keys == "identical":
        inputs["k"] = inputs["k"][:, :1].expand(inputs["k"].shape).contiguous()
    whole, split = (forward(device, delta, inputs, chunks) for chunks in (0, 1))
    expected = OPS[delta][1](**in_double(inputs), output_final_state=True)
    for name, x, unsplit, exact in zip(("o", "final_state"), split, whole, expected, strict=True):
        assert_matches_reference(name, x.cpu(), exact, eager=unsplit.cpu(), dtype=BF16)


def test_without_initial_state_it_starts_from_zero(device):
    inputs = make_inputs(Shape(1, 200, 1, 1, 64, 64), True, BF16)
    zero = forward(device, True, inputs | {"initial_state": torch.zeros_like(inputs["initial_state"])}, 1)
    none = forward(device, True, inputs | {"initial_state": None}, 1)
    assert all(a.equal(b) for a, b in zip(none, zero, strict=True))


@both
def test_one_segment_has_the_bits_of_no_split(device, delta):
    inputs = make_inputs(Shape(1, 128, 1, 2, 64, 64), delta, BF16)
    whole, split = (forward(device, delta, inputs, chunks) for chunks in (0, 2))
    assert all(a.equal(b) for a, b in zip(whole, split, strict=True))


def test_bits_do_not_depend_on_number_of_sms_or_schedule():
    inputs = make_inputs(Shape(1, 200, 1, 1, 64, 128), True, BF16)
    results = []
    for processors, seed in zip((1, 132, 4), emulation.SEEDS, strict=True):
        with emulation.emulated(seed):
            emulation.module().set_num_processors(processors)
            results.append(forward("cpu", True, inputs, 1))
    emulation.module().set_num_processors(4)
    assert all(a.equal(b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("B, T", [(0, 5), (2, 0)])
def test_empty_problems(device, B, T):
    inputs = make_inputs(Shape(B, T, 1, 2, 64, 64), True, BF16)
    o, final_state = forward(device, True, inputs, 1)
    assert o.shape == (B, T, 2, 64) and final_state.cpu().equal(inputs["initial_state"])


@pytest.mark.parametrize(
    ("B", "T", "HV", "V", "chunks"),
    [
        (1, 32768, 8, 128, 32),  # 8 heads of 512 chunks are 128 segments of 32
        (1, 32768, 32, 128, 128),
        (1, 32768, 8, 256, 64),  # twice the columns, half the segments
        (1, 32768, 1, 64, 16),  # the shortest segment
        (1, 32768, 41, 128, 0),  # enough heads
        (64, 8192, 1, 128, 0),  # enough sequences
        (1, 2047, 1, 128, 0),  # less than two segments
        (1, 2048, 1, 128, 16),
        (0, 2048, 1, 128, 16),
    ],
)
def test_number_of_segments_follows_from_shapes(B, T, HV, V, chunks):
    q, v = torch.empty(B, T, 1, 64, device="meta"), torch.empty(B, T, HV, V, device="meta")
    x = Inputs(q, q, v, v[..., 0], None, None, None, 1.0, 0)
    assert _recurrence_cuda.chunks_of_segment(x) == chunks


@both
def test_the_option_splits_where_it_pays_and_agrees_with_whole_sequences(device, delta):
    inputs = make_inputs(Shape(1, 2100, 1, 1, 64, 64), delta, BF16, decay_kind="none")
    inputs = {name: x.to(device) for name, x in inputs.items()}
    op = hypenet_kernels.chunk_gated_delta_rule if delta else hypenet_kernels.chunk_simple_gla
    whole, split = (op(**inputs, output_final_state=True, split_sequence=split) for split in (False, True))
    assert not split[1].equal(whole[1])
    for name, a, b in zip(("o", "final_state"), split, whole, strict=True):
        assert_matches_reference(name, a.cpu(), b.cpu(), eager=b.cpu().to(BF16), dtype=BF16)


@both
def test_on_the_cpu_the_option_changes_nothing(delta):
    inputs = make_inputs(Shape(1, 2100, 1, 1, 16, 16), delta, torch.float32)
    op = hypenet_kernels.chunk_gated_delta_rule if delta else hypenet_kernels.chunk_simple_gla
    assert op(**inputs, split_sequence=True)[0].equal(op(**inputs)[0])
