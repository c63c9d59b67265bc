"""Checks of what serving asks of the recurrences; the tests of the CPU and of CUDA choose shapes and dtypes.

Pools of states, states at checkpoints, states of draft tokens, and rows of a packed batch that belong to no sequence.
"""

from itertools import pairwise

import torch
from compare import assert_matches_reference
from recurrence_suite import cotangents, gradients, in_double

import hypenet_kernels as kernels
from hypenet_kernels import reference

CHUNK = {True: kernels.chunk_gated_delta_rule, False: kernels.chunk_simple_gla}
RECURRENT = {True: kernels.fused_recurrent_gated_delta_rule, False: kernels.fused_recurrent_simple_gla}
STEP = {True: kernels.gated_delta_step, False: kernels.simple_gla_step}
REFERENCE = {True: reference.chunk_gated_delta_rule, False: reference.chunk_simple_gla}
NUM_SLOTS = 6


class Pool:
    """`states`, NUM_SLOTS of them `gap` elements apart: those of sequences at their slots, all else is NaN."""

    def __init__(self, states, slots, gap):
        size = states.shape[1:].numel()
        strides = (size + gap, *states.contiguous()[0].stride())
        self.storage = states.new_full((NUM_SLOTS * (size + gap),), torch.nan)
        self.view = (NUM_SLOTS, *states.shape[1:]), strides
        self.states = self.storage.as_strided(*self.view)
        self.used = [slot for slot in slots if slot >= 0]
        for state, slot in zip(states, slots, strict=True):
            if slot >= 0:
                self.states[slot] = state

    def assert_rest_is_untouched(self):
        rest = self.storage.clone()
        rest.as_strided(*self.view)[self.used] = torch.nan
        assert rest.isnan().all()


def on(device, inputs):
    return {name: None if x is None else x.to(device) for name, x in inputs.items()}


def spans(inputs, cu_seqlens):
    """(row of the batch, first token, end) of every sequence."""
    if cu_seqlens is None:
        return [(b, 0, inputs["q"].shape[1]) for b in range(inputs["q"].shape[0])]
    return [(0, start, stop) for start, stop in pairwise(cu_seqlens.tolist())]


def cut(inputs, b, start, stop, initial_state):
    part = {name: x[b : b + 1, start:stop] for name, x in inputs.items() if name != "initial_state"}
    return {**part, "initial_state": initial_state}


def assert_close(name, result, expected, dtype):
    low = expected.to(dtype) if dtype in (torch.bfloat16, torch.float16) else None
    assert_matches_reference(name, result.cpu(), expected, eager=low, dtype=dtype)


def check_pool(op, delta, inputs, slots, device="cpu", cu_seqlens=None, gap=12, index_dtype=torch.int64, **options):
    """A pool gives the bits of states of one's own; skipped sequences have no output, and nothing else is touched."""
    states, packed = inputs["initial_state"], {"cu_seqlens": cu_seqlens}
    given, indices = on(device, inputs), torch.tensor(slots, dtype=index_dtype)
    plain_o, plain_state = op(**given, **on(device, packed), output_final_state=True, **options)
    pool = Pool(states.to(device), slots, gap)
    pooled = {**given, "initial_state": pool.states, "state_indices": indices.to(device), **on(device, packed)}
    o, final_state = op(**pooled, output_final_state=True, **options)
    assert final_state.data_ptr() == pool.states.data_ptr()
    for slot, (b, start, stop), state in zip(slots, spans(inputs, cu_seqlens), plain_state, strict=True):
        if slot < 0:
            assert (o[b, start:stop] == 0).all()
        else:
            assert o[b, start:stop].equal(plain_o[b, start:stop]) and pool.states[slot].equal(state)
    pool.assert_rest_is_untouched()
    exact = Pool(states.double(), slots, gap)
    meant = {**in_double(inputs), "initial_state": exact.states, "state_indices": indices, **packed}
    expected, _ = REFERENCE[delta](**meant, output_final_state=True)
    assert_close("o", o, expected, inputs["q"].dtype)
    assert_close("state", pool.states[pool.used], exact.states[exact.used], inputs["q"].dtype)


def check_checkpoints(op, delta, inputs, every, device="cpu", cu_seqlens=None, same_bits=True, **options):
    """A checkpoint is the final state of the tokens before it, and the tokens after it continue from there.

    same_bits: whether that holds bit for bit.
    """
    given, packed = on(device, inputs), {"cu_seqlens": cu_seqlens}
    results = op(**given, **on(device, packed), output_final_state=True, checkpoint_every=every, **options)
    o, final_state, checkpoints = results
    plain = op(**given, **on(device, packed), output_final_state=True, **options)
    assert o.equal(plain[0]) and final_state.equal(plain[1])
    *_, expected = REFERENCE[delta](**in_double(inputs), **packed, checkpoint_every=every)
    assert_close("checkpoints", checkpoints, expected, inputs["q"].dtype)
    unused = torch.ones(checkpoints.shape[:2], dtype=torch.bool)
    for n, (b, start, stop) in enumerate(spans(inputs, cu_seqlens)):
        for i, end in enumerate(range(start + every, stop + 1, every)):
            row = start // every + i
            unused[b, row] = False
            if same_bits:
                _, before = op(**cut(given, b, start, end, given["initial_state"][n, None]), output_final_state=True)
                rest = op(**cut(given, b, end, stop, checkpoints[b, row, None]), output_final_state=True)
                assert checkpoints[b, row].equal(before[0])
                assert rest[0].equal(o[b : b + 1, end:stop]) and rest[1][0].equal(final_state[n])
    assert (checkpoints[unused.to(device)] == 0).all()
    assert not unused.all()


def check_tail(op, inputs, cu_seqlens, device="cpu", **options):
    """Rows after the last sequence are zero, whatever they hold, and change nothing before them."""
    end = int(cu_seqlens[-1])
    do, dfinal_state = cotangents(inputs)
    alone = {name: x if name == "initial_state" else x[:, :end].contiguous() for name, x in inputs.items()}
    poisoned = {name: x.clone() for name, x in inputs.items()}
    for name in poisoned.keys() - {"initial_state"}:
        poisoned[name][:, end:] = torch.nan
    do[:, end:] = torch.nan
    options["cu_seqlens"] = cu_seqlens.to(device)
    results, expected = (op(**on(device, x), output_final_state=True, **options) for x in (poisoned, alone))
    assert results[0][:, :end].equal(expected[0]) and results[1].equal(expected[1])
    assert (results[0][:, end:] == 0).all()
    found = gradients(op, on(device, poisoned), do.to(device), dfinal_state.to(device), **options)
    expected = gradients(op, on(device, alone), do[:, :end].to(device), dfinal_state.to(device), **options)
    for name, x in found.items():
        if name == "initial_state":
            assert x.equal(expected[name])
        else:
            assert x[:, :end].equal(expected[name]) and (x[:, end:] == 0).all(), name


def check_draft(delta, inputs, slots, accepted, device="cpu", gap=12, index_dtype=torch.int64):
    """A draft leaves the pool as it is; committing its first n tokens gives the bits of n steps."""
    step, states = STEP[delta], inputs.pop("initial_state").to(device)
    inputs, indices = on(device, inputs), torch.tensor(slots, dtype=index_dtype, device=device)
    pool, other = (Pool(states, slots, gap) for _ in range(2))
    before = pool.storage.clone()
    o, drafts = step(**inputs, state=pool.states, state_indices=indices, output_states=True)
    assert pool.storage.nan_to_num(7.0).equal(before.nan_to_num(7.0))
    history = [other.states.clone()]
    for t in range(o.shape[1]):
        one = {name: x[:, t : t + 1] for name, x in inputs.items()}
        assert step(**one, state=other.states, state_indices=indices).equal(o[:, t : t + 1])
        history.append(other.states.clone())
        for b, slot in enumerate(slots):
            assert drafts[b, t].equal(other.states[slot]) if slot >= 0 else (drafts[b, t] == 0).all()
    kernels.commit_states(pool.states, drafts, torch.tensor(accepted, dtype=index_dtype, device=device), indices)
    for slot, n in zip(slots, accepted, strict=True):
        assert slot < 0 or pool.states[slot].equal(history[n][slot])
    pool.assert_rest_is_untouched()


def check_draft_of_contiguous_states(delta, inputs, accepted, device="cpu"):
    """The same without state_indices, and against the reference."""
    state = inputs["initial_state"].to(device, copy=True)
    given = {name: x for name, x in on(device, inputs).items() if name != "initial_state"}
    o, drafts = STEP[delta](**given, state=state, output_states=True)
    expected = REFERENCE[delta](**in_double(inputs), checkpoint_every=1)
    assert_close("o", o, expected[0], inputs["q"].dtype)
    assert_close("states", drafts, expected[2], inputs["q"].dtype)
    committed, counts = inputs["initial_state"].to(device, copy=True), torch.tensor(accepted)
    kernels.commit_states(committed, drafts, counts.to(device))
    meant = inputs["initial_state"].clone()
    reference.commit_states(meant, drafts.cpu(), counts)
    assert committed.cpu().equal(meant)
