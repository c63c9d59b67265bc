"""The layers of a cache: keys and values of softmax attention; the state of a recurrence, and its past.

B batch, T tokens, HK key-value heads, D head dimension, H heads, K and V state rows and columns.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

# Buffers of keys and values grow by this many tokens, so that little of them is unused. Copying them costs 2 / 256 of
# what attention reads meanwhile.
GROWTH = 256
# Tokens that a recurrent layer can go back by default if its past is recorded. Their inputs take about half a state.
RECORDED_TOKENS = 64
LONG_CALL = 8  # a call of up to so many times the recorded tokens is recorded whole: it may be a long draft
CHECKPOINT_UNIT = 64  # the chunk ops return states after multiples of so many tokens


class SoftmaxCacheLayer(CacheLayerMixin):
    """Keys and values [B, capacity, HK, D] of one layer."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    keys: torch.Tensor | None
    values: torch.Tensor | None

    def reserve(self, k: torch.Tensor, batch: int, capacity: int, used: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the buffers, grown to at least `capacity` tokens per sequence.

        Args:
            k: [..., HK, D], of whose heads and dtype new buffers are.
            batch: Sequences.
            capacity: Tokens per sequence.
            used: How many of the present tokens have to be kept.
        """
        if self.keys is not None and self.values is not None and self.keys.shape[1] >= capacity:
            return self.keys, self.values
        self.keys, self.values = (self._grown(x, k, batch, capacity, used) for x in (self.keys, self.values))
        self.is_initialized = True
        return self.keys, self.values

    @staticmethod
    def _grown(present: torch.Tensor | None, k: torch.Tensor, batch: int, capacity: int, used: int) -> torch.Tensor:
        if present is None:
            return k.new_empty(batch, capacity, *k.shape[-2:])
        grown = present.new_empty(batch, -(-capacity // GROWTH) * GROWTH, *present.shape[2:])
        grown[:, :used] = present[:, :used]
        return grown

    def resize_batch(self, index: torch.Tensor, length: int) -> None:
        """Replace row b by the former row index[b]; only the first `length` tokens are in use."""
        if self.keys is None or self.values is None:
            return
        if index.shape[0] == self.keys.shape[0]:
            self.keys[:, :length] = self.keys[:, :length].index_select(0, index)
            self.values[:, :length] = self.values[:, :length].index_select(0, index)
        else:
            self.keys, self.values = self.keys.index_select(0, index), self.values.index_select(0, index)

    def tensors(self) -> list[torch.Tensor | None]:
        """Return all that is allocated."""
        return [self.keys, self.values]

    def state_dict(self, length: int) -> dict[str, torch.Tensor]:
        """Return the first `length` keys and values."""
        assert self.keys is not None and self.values is not None
        return {"keys": self.keys[:, :length], "values": self.values[:, :length]}

    def load_state_dict(self, tensors: dict[str, torch.Tensor], shape: tuple[int, ...]) -> None:
        """Take over what `state_dict` returned, of shape [B, length, HK, D]."""
        self.keys, self.values = (_of_shape(tensors[name], name, shape) for name in ("keys", "values"))
        self.is_initialized = True

    def copy_of(self, length: int) -> "SoftmaxCacheLayer":
        """Return a copy of the first `length` tokens."""
        copy = SoftmaxCacheLayer()
        if self.keys is not None and self.values is not None and length > 0:
            copy.keys, copy.values = self.keys[:, :length].clone(), self.values[:, :length].clone()
            copy.is_initialized = True
        return copy

    def reset(self) -> None:
        """Do nothing: once the cache's lengths are zero, the old content cannot be reached."""

    # The methods below serve caches whose layers are updated one by one; here the HypeNetCache updates them.

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._reject("lazy_initialization")

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        self._reject("update")

    def get_mask_sizes(self, query_length: int) -> NoReturn:
        self._reject("get_mask_sizes")

    def get_seq_length(self) -> NoReturn:
        self._reject("get_seq_length")

    def get_max_length(self) -> int:
        return -1

    def _reject(self, method: str) -> NoReturn:
        raise NotImplementedError(f"{type(self).__name__}: {method} is not available for one layer, use HypeNetCache")


class Recurrence(NamedTuple):
    """A recurrence over T tokens, as a mixer calls it.

    Attributes:
        inputs: The tensors that both forms take first, each with an entry per token: q [B, T, H, K], k, and others.
        chunk: The form for many tokens, with the arguments initial_state, output_final_state, cu_seqlens and
            checkpoint_every of the ops in `hypenet_kernels`.
        step: The form for a few tokens, which updates `state` in place, with the argument state_indices.
    """

    inputs: tuple[torch.Tensor, ...]
    chunk: Callable[..., Any]
    step: Callable[..., torch.Tensor]

    @property
    def tokens(self) -> int:
        """T."""
        return self.inputs[0].shape[1]


class RecurrentCacheLayer(LinearAttentionLayer):
    """One state [B, H, K, V] in the accumulation type, and what it takes to go back to earlier ones.

    The state's address stays the same while decoding. Earlier states have two sources: `snapshots`, and, if the past is
    recorded, the inputs of at least the last `window` tokens, which are run again from the state before them.

    transformers considers a linear layer filled once its convolution state is written. These layers have no
    convolution, so writing the recurrent state marks them as filled.

    Attributes:
        snapshots: States by the number of tokens before them.
        record_past: Whether inputs are recorded; `activate_past_recording` sets it.
        window: How many of the last tokens are recorded at least.
        recorded: How many of them are at present.
    """

    device: torch.device | None  # type: ignore[assignment]  # the base class sets None

    def __init__(self) -> None:
        super().__init__()
        self.snapshots: dict[int, torch.Tensor] = {}
        self.window, self.recorded = RECORDED_TOKENS, 0
        self._base: torch.Tensor | None = None  # the state before the first recorded token
        self._inputs: tuple[torch.Tensor, ...] = ()  # all but q, each [B, at least `recorded`, ...]
        self._chunk: Callable[..., Any] | None = None

    @property
    def state(self) -> torch.Tensor | None:
        """Return the state, or None before the first token."""
        return self.recurrent_states[0] if self.has_previous_state[0] else None

    @property
    def is_croppable(self) -> bool:
        return bool(self.record_past)

    def activate_past_recording(self, tokens: int = RECORDED_TOKENS) -> None:
        """Record the inputs from now on, so that the layer can go back at least `tokens` tokens."""
        super().activate_past_recording()
        self.window = max(self.window, tokens)

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs: Any) -> torch.Tensor:
        """Copy `recurrent_states` [B, H, K, V] into the state and return it, without autograd history."""
        self.device = recurrent_states.device
        self.has_previous_state[state_idx] = True
        return super().update_recurrent_state(recurrent_states.detach(), state_idx, **kwargs)

    def run_chunk(self, run: Recurrence, cu_seqlens: torch.Tensor | None, past: int, every: int) -> torch.Tensor:
        """Run the chunk form from the state and into it; return the output [B, T, H, V].

        Args:
            run: The recurrence over the new tokens.
            cu_seqlens: Bounds of the sequences if they are packed. Their lengths may differ, so that the earlier states
                are forgotten.
            past: Tokens before this call.
            every: Tokens from one snapshot to the next, a multiple of 64; 0: none.
        """
        before, alike = self.state, cu_seqlens is None
        are_snapshots = every > 0
        if alike and every == 0 and self.record_past:  # one state on the way, shortly before what will be recorded
            every = max(run.tokens - self.window, 0) // CHECKPOINT_UNIT * CHECKPOINT_UNIT
        asked = {"checkpoint_every": every} if alike and 0 < every <= run.tokens else {}
        with_gradient = torch.is_grad_enabled()
        options = {"initial_state": before, "output_final_state": True, "cu_seqlens": cu_seqlens}
        o, state, *found = run.chunk(*run.inputs, **options, **({} if with_gradient else asked))
        if asked and with_gradient:  # the ops return states on the way only where no gradient is wanted
            with torch.no_grad():
                found = run.chunk(*(x.detach() for x in run.inputs), **options, **asked)[2:]
        checkpoints = {(i + 1) * every: x for i, x in enumerate(found[0].unbind(1))} if found else {}
        if not alike:
            self.forget()
        elif self.record_past:
            start = torch.zeros_like(state) if before is None else before
            self.record(run, {0: start} | checkpoints)
        if are_snapshots:
            self.snapshots |= {past + position: x for position, x in checkpoints.items()}
        self.update_recurrent_state(state)
        output: torch.Tensor = o
        return output

    @torch.no_grad()
    def record(self, run: Recurrence, states: dict[int, torch.Tensor]) -> None:
        """Record the inputs of a call, before the state is overwritten with what follows from them.

        Args:
            run: The recurrence over the new tokens.
            states: The state before the call and others on the way, by the number of the call's tokens before them.
        """
        self._chunk, T = run.chunk, run.tokens
        inputs = tuple(x.detach() for x in run.inputs[1:])
        if self.window <= T or self._base is None:
            skipped = T - self.window if LONG_CALL * self.window < T else 0
            nearest = max(position for position in states if position <= skipped)
            self._base = self._replay(states[nearest], tuple(x[:, nearest:skipped] for x in inputs))
            inputs = tuple(x[:, skipped:] for x in inputs)
            size = max(inputs[0].shape[1], 2 * self.window)
            self._inputs = tuple(x.new_empty(x.shape[0], size, *x.shape[2:]) for x in inputs)
            self.recorded = 0
        elif self.recorded + T > self._inputs[0].shape[1]:
            dropped = self.recorded + T - self.window
            self._base = self._replay(self._base, tuple(x[:, :dropped] for x in self._inputs))
            for x in self._inputs:
                x[:, : self.recorded - dropped] = x[:, dropped : self.recorded].clone()
            self.recorded -= dropped
        start, self.recorded = self.recorded, self.recorded + inputs[0].shape[1]
        for buffer, x in zip(self._inputs, inputs, strict=True):
            buffer[:, start : self.recorded] = x

    @torch.no_grad()
    def _replay(self, state: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Return the state after `inputs` (all but q), as new memory; `state` is left as it is."""
        if inputs[0].shape[1] == 0:
            return state.clone()
        assert self._chunk is not None
        # The state does not depend on q: any tensor of its shape will do.
        final: torch.Tensor = self._chunk(inputs[0], *inputs, initial_state=state, output_final_state=True)[1]
        return final

    def state_at(self, tokens: int, seen: int) -> torch.Tensor:
        """Return the state after the first `tokens` of the `seen` tokens, as new memory.

        Raises:
            KeyError: If it is neither a snapshot nor recorded.
        """
        if tokens in self.snapshots:
            return self.snapshots[tokens].clone()
        kept = self.recorded - (seen - tokens)
        if self._base is None or kept < 0:
            raise KeyError(tokens)
        return self._replay(self._base, tuple(x[:, :kept] for x in self._inputs))

    def go_back(self, tokens: int, seen: int) -> None:
        """Go back to the state after the first `tokens` of the `seen` tokens; raises as `state_at`."""
        if self.state is None:
            return
        self.state.copy_(self.state_at(tokens, seen))
        self.snapshots = {position: x for position, x in self.snapshots.items() if position <= tokens}
        self.recorded -= seen - tokens
        if self.recorded < 0:
            self._base, self.recorded = None, 0

    def take_snapshot(self, tokens: int) -> None:
        """Keep the state, which is the one after `tokens` tokens."""
        if self.state is not None and tokens not in self.snapshots:
            self.snapshots[tokens] = self.state.clone()

    def forget(self) -> None:
        """Forget the earlier states."""
        self._base, self._inputs, self.recorded, self.snapshots = None, (), 0, {}

    def tensors(self) -> list[torch.Tensor | None]:
        """Return all that is allocated."""
        return [self.state, self._base, *self._inputs, *self.snapshots.values()]

    def state_dict(self, length: int) -> dict[str, torch.Tensor]:
        """Return the state and the snapshots."""
        assert self.state is not None
        return {"state": self.state} | {f"snapshots.{tokens}": x for tokens, x in self.snapshots.items()}

    def load_state_dict(self, tensors: dict[str, torch.Tensor], shape: tuple[int, ...]) -> None:
        """Take over what `state_dict` returned, each of shape [B, H, K, V]."""
        self.update_recurrent_state(_of_shape(tensors["state"], "state", shape))
        for name, x in tensors.items():
            kind, _, tokens = name.partition(".")
            if kind == "snapshots" and tokens.isdecimal():
                self.snapshots[int(tokens)] = _of_shape(x, name, shape)

    def copy_of(self, tokens: int, seen: int) -> "RecurrentCacheLayer":
        """Return a layer that has seen the first `tokens` of the `seen` tokens, with the snapshots up to there."""
        copy = RecurrentCacheLayer()
        copy.record_past, copy.window = self.record_past, self.window
        if self.state is not None and tokens > 0:
            copy.update_recurrent_state(self.state if tokens == seen else self.state_at(tokens, seen))
        copy.snapshots = {position: x.clone() for position, x in self.snapshots.items() if position <= tokens}
        return copy

    def resize_batch(self, index: torch.Tensor, length: int) -> None:
        """Replace row b by the former row index[b], in place if the batch size stays the same."""
        if self.state is None:
            return
        rows = self.state.index_select(0, index)
        if rows.shape == self.state.shape:
            self.state.copy_(rows)
        else:
            self.recurrent_states[0] = rows
        self.snapshots = {position: x.index_select(0, index) for position, x in self.snapshots.items()}
        if self._base is not None:
            self._base = self._base.index_select(0, index)
            self._inputs = tuple(x.index_select(0, index) for x in self._inputs)

    def reset(self) -> None:
        super().reset()
        self.forget()


def _of_shape(x: torch.Tensor, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(x.shape)}")
    return x
