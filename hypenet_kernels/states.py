"""Which of the states after draft tokens becomes the state of a recurrence."""

from typing import Any

import torch
from torch import Tensor

from hypenet_kernels import _checks, _native, _ops

OP = "commit_states"


def commit_states(state: Tensor, states: Tensor, num_accepted: Tensor, state_indices: Tensor | None = None) -> None:
    """Keep the first num_accepted[b] draft tokens of every sequence b: state_b := states[b, num_accepted[b] - 1].

    For speculative decoding, after a step with output_states=True. Nothing is read on the host; no gradient.

    Args:
        state: [B, HV, K, V] float32 or float64, updated in place; unchanged where num_accepted is 0. With
            state_indices a pool of any number of slots, any stride apart.
        states: [B, T, HV, K, V] in state's dtype, as gated_delta_step and simple_gla_step return them.
        num_accepted: [B] int32 or int64, from 0 to T.
        state_indices: [B] int32 or int64, the slot of each sequence; negative: none.

    Raises:
        TypeError: dtype. ValueError: shape, device, layout or, on the CPU, range. On CUDA a sequence whose numbers are
            out of range keeps its state.

    Example:
        >>> import torch
        >>> state, states = torch.zeros(2, 1, 4, 4), torch.ones(2, 3, 1, 4, 4)
        >>> commit_states(state, states, torch.tensor([0, 2]))
        >>> state.amax(dim=(1, 2, 3))
        tensor([0., 1.])
    """
    required = {"state": state, "states": states, "num_accepted": num_accepted}
    optional = {"state_indices": state_indices}
    _checks.tensors(OP, required, optional)
    _checks.no_grad(OP, required, optional)
    _commit(state, states, num_accepted, state_indices)


def _fake(state: Tensor, states: Tensor, num_accepted: Tensor, state_indices: Tensor | None) -> None:
    _checks.rank(OP, "states", states, "B T HV K V")
    _checks.dtype(OP, "states", states, (torch.float32, torch.float64))
    B = states.shape[0]
    _checks.indices(OP, "num_accepted", num_accepted, B)
    _checks.rank(OP, "state", state, "slots HV K V")
    _checks.shape(OP, "state", state, (B if state_indices is None else state.shape[0], *states.shape[2:]))
    if state.dtype != states.dtype:
        _checks.fail(TypeError, OP, "state", f"have states' dtype {states.dtype}", state.dtype)
    _checks.pool(OP, "state", state)
    if state_indices is not None:
        _checks.indices(OP, "state_indices", state_indices, B)


def _run(state: Tensor, states: Tensor, num_accepted: Tensor, state_indices: Tensor | None) -> None:
    _fake(state, states, num_accepted, state_indices)
    B, T, HV, K, V = states.shape
    if not _native.on_cuda(state):
        accepted = num_accepted.tolist()
        if accepted and not 0 <= min(accepted) <= max(accepted) <= T:
            _checks.fail(ValueError, OP, "num_accepted", f"be in [0, T = {T}]", accepted)
        if state_indices is not None:
            _checks.slots(OP, state_indices, state.shape[0])
    states, num_accepted, slots = states.contiguous(), num_accepted.contiguous(), _native.contiguous(state_indices)
    fields: dict[str, Any] = {
        "dtype": _native.DTYPES[states.dtype],
        "num_threads": _native.threads(),
        "B": B,
        "T": T,
        "HV": HV,
        "K": K,
        "V": V,
        "num_slots": state.shape[0],
        "slot_stride": state.stride(0) if state.shape[0] > 1 else HV * K * V,
        "state_indices": _native.indices(slots),
        "num_accepted": _native.indices(num_accepted),
        "states": _native.pointer(states),
        "state": _native.pointer(state),
    }
    _native.kernel(OP, "commit_states", state.device)(fields)


_commit = _ops.define(
    f"{OP}(Tensor(a!) state, Tensor states, Tensor num_accepted, Tensor? state_indices) -> ()", _fake, _run
)
