"""What serving asks of the CUDA kernels: pools, checkpoints, draft tokens, tails. Emulated, and on a GPU."""

import contextlib
from unittest import mock

import pytest
import torch
from recurrence_suite import Shape, bounds, make_inputs, raise_some_betas
from serving_suite import (
    CHUNK,
    NUM_SLOTS,
    RECURRENT,
    STEP,
    Pool,
    check_checkpoints,
    check_draft,
    check_draft_of_contiguous_states,
    check_pool,
    check_tail,
    on,
)

from hypenet_kernels import _recurrence_cuda as cuda
from hypenet_kernels import commit_states

BF16, FP16 = torch.bfloat16, torch.float16
LENGTHS = (70, 0, 5, 64, 130, 0)
SLOTS = [3, 0, -1, 5, 1, -1]
SHAPES = {
    "two tiles of V": (Shape(3, 70, 1, 2, 64, 128), BF16),
    "K of 128": (Shape(2, 135, 1, 1, 128, 64), FP16),
    "K of 256": (Shape(2, 70, 1, 1, 256, 64), BF16),
}

deltas = pytest.mark.parametrize("delta", [True, False], ids=["delta", "gla"])
shapes = pytest.mark.parametrize("name", SHAPES)


def split():
    """Lets `split_sequence` cut short sequences: into segments of one chunk."""
    return mock.patch.object(cuda, "MIN_SEGMENT", 1)


@deltas
@shapes
def test_pool(device, name, delta):
    shape, dtype = SHAPES[name]
    inputs = make_inputs(shape, delta, dtype)
    check_pool(CHUNK[delta], delta, inputs, [4, 1, 2][: shape.B], device)
    check_pool(CHUNK[delta], delta, inputs, [-1, 5, -3][: shape.B], device, gap=0)


@deltas
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_pool_of_packed_sequences(device, index_dtype, delta):
    inputs = make_inputs(Shape(1, sum(LENGTHS) + 9, 1, 2, 64, 64), delta, BF16, N=len(LENGTHS))
    options = {"cu_seqlens": bounds(*LENGTHS), "index_dtype": index_dtype, "gap": 1}
    check_pool(CHUNK[delta], delta, inputs, SLOTS, device, **options)


@deltas
def test_pool_of_the_recurrent_form(device, delta):
    check_pool(RECURRENT[delta], delta, make_inputs(Shape(2, 20, 1, 1, 64, 64), delta, BF16), [2, -1], device)


@deltas
@pytest.mark.parametrize("packed", [False, True])
def test_pool_of_split_sequences(device, packed, delta):
    """The last segment writes the slot that the first one reads: in another launch."""
    shape = Shape(1, sum(LENGTHS), 1, 1, 64, 64) if packed else Shape(3, 200, 1, 1, 64, 64)
    inputs = make_inputs(shape, delta, BF16, N=len(LENGTHS) if packed else None)
    options = {"cu_seqlens": bounds(*LENGTHS)} if packed else {}
    with split():
        for slots in ([3, 0, -1, 5, -1, 1], SLOTS) if packed else ([2, -1, 0],):
            check_pool(CHUNK[delta], delta, inputs, slots, device, split_sequence=True, **options)


def test_split_states_start_where_those_of_whole_sequences_do(device):
    inputs = on(device, make_inputs(Shape(1, 200, 1, 1, 64, 64), True, BF16, decay_kind="none"))
    whole = CHUNK[True](**inputs, output_final_state=True)
    with split():
        results = CHUNK[True](**inputs, output_final_state=True, split_sequence=True)
    assert results[0][:, :64].equal(whole[0][:, :64])


@deltas
@shapes
def test_checkpoints(device, name, delta):
    shape, dtype = SHAPES[name]
    inputs = make_inputs(shape, delta, dtype)
    if delta and shape.HV > 1:
        raise_some_betas(inputs["beta"])
    check_checkpoints(CHUNK[delta], delta, inputs, 64, device)


@deltas
def test_checkpoints_of_128_tokens(device, delta):
    check_checkpoints(CHUNK[delta], delta, make_inputs(Shape(2, 270, 1, 1, 64, 64), delta, BF16), 128, device)


@deltas
@pytest.mark.parametrize("every", [64, 128])
def test_checkpoints_of_packed_sequences(device, every, delta):
    lengths = (70, 0, 64, 140, 63)
    inputs = make_inputs(Shape(1, sum(lengths) + 70, 1, 1, 64, 64), delta, BF16, N=len(lengths))
    check_checkpoints(CHUNK[delta], delta, inputs, every, device, cu_seqlens=bounds(*lengths))


@deltas
def test_checkpoints_of_padded_head_dimensions(device, delta):
    inputs = make_inputs(Shape(1, 210, 1, 1, 40, 33), delta, BF16, N=2)
    check_checkpoints(CHUNK[delta], delta, inputs, 64, device, cu_seqlens=bounds(70, 130))


@deltas
@pytest.mark.parametrize("packed", [False, True])
def test_checkpoints_of_split_sequences(device, packed, delta):
    shape = Shape(1, sum(LENGTHS), 1, 1, 64, 64) if packed else Shape(2, 200, 1, 1, 64, 64)
    inputs = make_inputs(shape, delta, BF16, N=len(LENGTHS) if packed else None)
    cu_seqlens = bounds(*LENGTHS) if packed else None
    with split():
        check_checkpoints(
            CHUNK[delta], delta, inputs, 64, device, cu_seqlens=cu_seqlens, same_bits=False, split_sequence=True
        )


def test_checkpoints_in_a_pool_of_split_sequences(device):
    inputs = make_inputs(Shape(3, 200, 1, 1, 64, 64), True, BF16)
    with split():
        *_, expected = CHUNK[True](**on(device, inputs), checkpoint_every=64, split_sequence=True)
        pool, slots = Pool(inputs["initial_state"].to(device), [2, -1, 4], 4), torch.tensor([2, -1, 4])
        given = on(device, {**inputs, "initial_state": pool.states, "state_indices": slots})
        *_, checkpoints = CHUNK[True](**given, checkpoint_every=64, split_sequence=True)
    assert checkpoints[[0, 2]].equal(expected[[0, 2]]) and (checkpoints[1] == 0).all()


@deltas
@pytest.mark.parametrize("packed", [False, True])
def test_slot_that_does_not_exist_gives_nan_and_touches_nothing(device, packed, delta):
    shape = Shape(1, 150, 1, 1, 64, 64) if packed else Shape(3, 70, 1, 1, 64, 64)
    inputs = make_inputs(shape, delta, BF16, N=3)
    slots, cu_seqlens = [NUM_SLOTS, 0, -1], bounds(70, 10, 60)
    options = {"cu_seqlens": cu_seqlens.to(device)} if packed else {}
    for patch, cut in ((contextlib.nullcontext(), False), (split(), True)):
        pool = Pool(inputs["initial_state"].to(device), [-1, 0, -1], 4)
        given = on(device, {**inputs, "initial_state": pool.states, "state_indices": torch.tensor(slots)})
        with patch:
            o, _ = CHUNK[delta](**given, **options, split_sequence=cut)
        missing, used, skipped = (
            (o[:, start:stop] for start, stop in ((0, 70), (70, 80), (80, 140))) if packed else o[:, None]
        )
        assert missing.isnan().all() and used.isfinite().all() and (skipped == 0).all()
        pool.assert_rest_is_untouched()


@deltas
@pytest.mark.parametrize("lengths", [(33, 0, 64), (0, 0), ()], ids=str)
def test_sequences_that_end_before_T(device, lengths, delta):
    inputs = make_inputs(Shape(1, sum(lengths) + 13, 1, 2, 64, 64), delta, BF16, N=len(lengths))
    check_tail(CHUNK[delta], inputs, bounds(*lengths), device)


@deltas
def test_sequences_that_end_before_T_in_padded_head_dimensions(device, delta):
    """One value head: rows of dg are 4 bytes, so that the tail begins anywhere in a 16-byte vector."""
    inputs = make_inputs(Shape(1, 150, 1, 1, 40, 33), delta, FP16, N=2)
    for lengths in ((70, 3), (60, 4), (1, 0)):
        check_tail(CHUNK[delta], inputs, bounds(*lengths), device)


@deltas
def test_split_sequences_that_end_before_T(device, delta):
    inputs = make_inputs(Shape(1, 300, 1, 1, 64, 64), delta, BF16, N=2)
    with split():
        check_tail(CHUNK[delta], inputs, bounds(130, 20), device, split_sequence=True)


def test_a_long_tail(device):
    """More rows than the threads that fill them store at once."""
    inputs = make_inputs(Shape(1, 1500, 1, 1, 64, 64), True, BF16, N=1)
    check_tail(CHUNK[True], inputs, bounds(3), device)


@deltas
def test_many_sequences_to_skip(device, delta):
    """More than the lanes of a warp, which look at one each."""
    lengths = [3] * 70
    slots = [-1] * 70
    slots[2], slots[40], slots[69] = 1, 5, 0
    inputs = make_inputs(Shape(1, 210, 1, 1, 64, 64), delta, BF16, N=70)
    check_pool(CHUNK[delta], delta, inputs, slots, device, cu_seqlens=bounds(*lengths))


@deltas
@pytest.mark.parametrize("gap", [0, 1, 4])
@pytest.mark.parametrize(
    "K, V, dtype", [(64, 64, torch.float32), (128, 128, BF16), (256, 40, FP16), (33, 45, BF16)], ids=str
)
def test_draft_tokens(device, K, V, dtype, gap, delta):
    inputs = make_inputs(Shape(4, 3, 1, 2, K, V), delta, dtype)
    check_draft(delta, inputs, [3, -1, 0, 5], [2, 3, 0, 3], device, gap)


@deltas
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_draft_tokens_of_contiguous_states(device, dtype, delta):
    inputs = make_inputs(Shape(3, 4, 1, 2, 64, 64), delta, dtype)
    check_draft_of_contiguous_states(delta, inputs, [4, 0, 1], device)


def test_draft_in_a_slot_that_does_not_exist(device):
    inputs = on(device, make_inputs(Shape(1, 2, 1, 1, 64, 64), True, BF16))
    pool = Pool(inputs.pop("initial_state"), [-1], 4)
    slots = torch.tensor([NUM_SLOTS], device=device)
    o, states = STEP[True](**inputs, state=pool.states, state_indices=slots, output_states=True)
    assert o.isnan().all() and states.isnan().all()
    commit_states(pool.states, torch.zeros_like(states), torch.tensor([1], device=device), slots)
    pool.assert_rest_is_untouched()


def test_commit_leaves_slots_alone_where_the_count_is_out_of_range(device):
    state, states = torch.ones(3, 1, 4, 4, device=device), torch.zeros(3, 2, 1, 4, 4, device=device)
    commit_states(state, states, torch.tensor([3, -1, 1], device=device))
    assert (state[:2] == 1).all() and (state[2] == 0).all()


@pytest.mark.cuda
def test_graph_replay():
    """With other slots and another end of the sequences at each replay: nothing waits for the host."""
    inputs = on("cuda", make_inputs(Shape(1, 300, 1, 2, 64, 64), True, BF16, N=2))
    first, second = (([4, 1], [0, 100, 250]), ([2, -1], [0, 30, 31]))
    slots, cu_seqlens = torch.tensor(first[0], device="cuda"), torch.tensor(first[1], device="cuda")
    pool = Pool(inputs["initial_state"], [4, 1], 8).states.nan_to_num(0.5)
    given = {**inputs, "initial_state": pool, "state_indices": slots, "cu_seqlens": cu_seqlens}
    CHUNK[True](**given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = CHUNK[True](**given)
    for other_slots, other_bounds in (first, second):
        slots.copy_(torch.tensor(other_slots))
        cu_seqlens.copy_(torch.tensor(other_bounds))
        before = pool.clone()
        graph.replay()
        after = pool.clone()
        expected, _ = CHUNK[True](**{**given, "initial_state": before})
        assert o.equal(expected) and after.equal(before)
