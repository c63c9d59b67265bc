"""What serving asks of the recurrences, on the CPU: pools, checkpoints, draft tokens, tails without a sequence."""

import pytest
import torch
from compare import assert_matches_reference
from recurrence_suite import Shape, bounds, make_inputs
from serving_suite import (
    CHUNK,
    RECURRENT,
    STEP,
    Pool,
    check_checkpoints,
    check_draft,
    check_draft_of_contiguous_states,
    check_pool,
    check_tail,
)

from hypenet_kernels import commit_states

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ORDINARY = Shape(4, 71, 2, 4, 24, 40)
LENGTHS = (70, 0, 5, 64, 130, 0)
PACKED = Shape(1, sum(LENGTHS), 1, 2, 40, 72)

deltas = pytest.mark.parametrize("delta", [True, False], ids=["delta", "gla"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
forms = pytest.mark.parametrize("ops", [CHUNK, RECURRENT], ids=["chunk", "recurrent"])


@deltas
@dtypes
@forms
@pytest.mark.parametrize("slots", [[0, 1, 2, 3], [5, 0, 3, 1], [4, -1, 2, -7], [-1, -1, -1, 0]], ids=str)
def test_pool(ops, slots, dtype, delta):
    check_pool(ops[delta], delta, make_inputs(ORDINARY, delta, dtype), slots)


@deltas
@forms
@pytest.mark.parametrize("gap", [0, 1])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_pool_of_packed_sequences(ops, index_dtype, gap, delta):
    inputs = make_inputs(PACKED, delta, N=6)
    options = {"cu_seqlens": bounds(*LENGTHS), "gap": gap, "index_dtype": index_dtype}
    check_pool(ops[delta], delta, inputs, [3, 0, -1, 5, 1, -1], **options)
    check_pool(ops[delta], delta, inputs, [3, -1, 2, 5, -1, 1], **options)


@deltas
@forms
def test_pool_of_packed_sequences_that_end_before_T(ops, delta):
    inputs = make_inputs(Shape(1, sum(LENGTHS) + 9, 1, 2, 40, 72), delta, N=6)
    check_pool(ops[delta], delta, inputs, [3, 0, -1, 5, 1, -1], cu_seqlens=bounds(*LENGTHS))


@deltas
def test_few_heads_on_many_threads_have_a_pool_too(delta):
    """The columns of one head are then several tasks."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(7)
        inputs = make_inputs(Shape(2, 300, 1, 1, 64, 200), delta)
        check_pool(CHUNK[delta], delta, inputs, [-1, 4])
        check_checkpoints(CHUNK[delta], delta, inputs, 64)
    finally:
        torch.set_num_threads(threads)


@deltas
@dtypes
@forms
@pytest.mark.parametrize("every", [64, 128])
@pytest.mark.parametrize("shape", [Shape(2, 300, 1, 2, 64, 96), Shape(1, 256, 2, 2, 16, 8)], ids=str)
def test_checkpoints(ops, shape, every, dtype, delta):
    check_checkpoints(ops[delta], delta, make_inputs(shape, delta, dtype), every)


@deltas
@forms
@pytest.mark.parametrize("every", [64, 128])
def test_checkpoints_of_packed_sequences(ops, every, delta):
    """Also of sequences that begin in the middle of an interval, and of a tail."""
    lengths = (70, 0, 5, 64, 259, 0, 128, 63)
    inputs = make_inputs(Shape(1, sum(lengths) + 200, 1, 2, 24, 40), delta, N=len(lengths))
    check_checkpoints(ops[delta], delta, inputs, every, cu_seqlens=bounds(*lengths))


@forms
def test_checkpoints_beyond_the_last_token(ops):
    inputs = make_inputs(ORDINARY, True)
    o, state, checkpoints = ops[True](**inputs, output_final_state=True, checkpoint_every=128)
    plain = ops[True](**inputs, output_final_state=True)
    assert checkpoints.shape == (4, 0, 4, 24, 40) and o.equal(plain[0]) and state.equal(plain[1])


@deltas
@forms
def test_checkpoints_in_a_pool(ops, delta):
    inputs = make_inputs(Shape(3, 200, 1, 2, 24, 40), delta)
    *_, expected = ops[delta](**inputs, checkpoint_every=64)
    pool = Pool(inputs["initial_state"], [2, -1, 4], 4)
    given = {**inputs, "initial_state": pool.states, "state_indices": torch.tensor([2, -1, 4])}
    *_, checkpoints = ops[delta](**given, checkpoint_every=64)
    assert checkpoints[[0, 2]].equal(expected[[0, 2]]) and (checkpoints[1] == 0).all()


@deltas
@dtypes
@forms
@pytest.mark.parametrize("lengths", [(33, 0, 40), (70,), (0, 0), ()], ids=str)
def test_sequences_that_end_before_T(ops, lengths, dtype, delta):
    inputs = make_inputs(Shape(1, sum(lengths) + 13, 2, 4, 24, 40), delta, dtype, N=len(lengths))
    check_tail(ops[delta], inputs, bounds(*lengths))


@deltas
@dtypes
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_draft_tokens(index_dtype, dtype, delta):
    inputs = make_inputs(Shape(4, 5, 2, 4, 24, 40), delta, dtype)
    check_draft(delta, inputs, [3, -1, 0, 5], [2, 3, 0, 5], index_dtype=index_dtype)


@deltas
@dtypes
def test_draft_tokens_of_contiguous_states(dtype, delta):
    inputs = make_inputs(Shape(3, 4, 1, 2, 33, 45), delta, dtype)
    check_draft_of_contiguous_states(delta, inputs, [4, 0, 1])


@deltas
def test_drafts_without_tokens(delta):
    inputs = make_inputs(Shape(2, 0, 1, 2, 8, 8), delta)
    state = inputs.pop("initial_state")
    before = state.clone()
    o, states = STEP[delta](**inputs, state=state, output_states=True)
    assert o.shape == (2, 0, 2, 8) and states.shape == (2, 0, 2, 8, 8) and state.equal(before)
    commit_states(state, states, torch.tensor([0, 0]))
    assert state.equal(before)


def test_wrong_commits():
    state, states, none = torch.zeros(2, 1, 4, 4), torch.zeros(2, 3, 1, 4, 4), torch.tensor([0, 0])
    for error, message, arguments in (
        (TypeError, "states must be float32 or float64", (state, states.bfloat16(), none)),
        (ValueError, r"num_accepted must be in \[0, T = 3\]", (state, states, torch.tensor([0, 4]))),
        (ValueError, r"num_accepted must be in \[0, T = 3\]", (state, states, torch.tensor([-1, 0]))),
        (ValueError, "state_indices must be below", (state, states, none, torch.tensor([0, 2]))),
        (ValueError, "state_indices must name no slot twice", (state, states, none, torch.tensor([1, 1]))),
    ):
        with pytest.raises(error, match=f"^commit_states: {message}"):
            commit_states(*arguments)


@deltas
def test_a_pool_carries_sequences_through_prefill_and_decode(delta):
    """Prefill in two calls, then steps, all in one pool: as one call over all tokens."""
    inputs = make_inputs(Shape(2, 90, 2, 4, 24, 40), delta, torch.float64)
    o, state = CHUNK[delta](**inputs, output_final_state=True)
    slots, pool = torch.tensor([4, 1]), Pool(inputs["initial_state"], [4, 1], 8)
    parts = []
    for span in (slice(0, 50), slice(50, 85)):
        part = {name: x[:, span] for name, x in inputs.items()} | {"initial_state": pool.states}
        parts.append(CHUNK[delta](**part, state_indices=slots)[0])
    for t in range(85, 90):
        one = {name: x[:, t : t + 1] for name, x in inputs.items() if name != "initial_state"}
        parts.append(STEP[delta](**one, state=pool.states, state_indices=slots))
    assert_matches_reference("o", torch.cat(parts, dim=1), o)
    assert_matches_reference("state", pool.states[[4, 1]], state)
