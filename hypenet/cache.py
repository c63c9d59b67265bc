"""The generation cache of a HypeNet: preallocated keys and values for softmax layers, one state for recurrent layers.

Padding is never stored. Sequence b owns the first `lengths[b]` rows of every key and value buffer, so its results do
not depend on the other sequences in the batch. B batch, HK key-value heads, D head dimension, K and V state rows and
columns.
"""

from collections.abc import Iterator

import torch
from transformers.cache_utils import Cache

from hypenet.cache_layers import CHECKPOINT_UNIT, RECORDED_TOKENS, RecurrentCacheLayer, SoftmaxCacheLayer
from hypenet.configuration_hypenet import SOFTMAX, HypeNetConfig


class HypeNetCache(Cache):
    """The keys, values and states that a HypeNet keeps between calls.

    `generate` creates one; to continue a sequence yourself, create one and pass it as `past_key_values`.

    Keys and values can be cut off anywhere. A recurrence has one state, so that going back (`crop`, `fork`) needs
    earlier ones: those at `snapshot_every` tokens and at calls of `snapshot`, and, after `activate_past_recording`, all
    of the last tokens, which is what assisted generation uses.

    Args:
        config: The model's configuration, which names the kind of every layer.
        capacity: Tokens per sequence to allocate at the first call. Beyond it the buffers grow by 256 tokens at a time.
        fixed: Whether `capacity` must not be exceeded, so that no buffer ever moves.
        snapshot_every: Keep the states of recurrent layers after about every so many tokens, a multiple of 64; within
            one call exactly, from its start. 0: keep none.

    Attributes:
        lengths (int32 [B] on the model's device): Real tokens stored for each sequence; None before the first call.
        max_length (int): An upper bound of `lengths` that needs no device synchronisation.
        ragged (bool): Whether the lengths may differ between sequences.

    Raises:
        ValueError: If `snapshot_every` is not a multiple of 64, or `fixed` comes without a capacity.

    Example:
        >>> import torch
        >>> from hypenet import HypeNetCache, HypeNetConfig, HypeNetForCausalLM
        >>> config = HypeNetConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, head_dim=8,
        ...                        num_attention_heads=2, num_key_value_heads=1)
        >>> model, cache = HypeNetForCausalLM(config).eval(), HypeNetCache(config, capacity=128)
        >>> for tokens in ([3, 1, 4], [1], [5]):  # a prompt, then one token at a time
        ...     logits = model(input_ids=torch.tensor([tokens]), past_key_values=cache).logits
        >>> cache.lengths.tolist(), cache.get_seq_length()
        ([5], 5)
        >>> cache.snapshot()
        >>> logits = model(input_ids=torch.tensor([[9, 2]]), past_key_values=cache).logits
        >>> cache.crop(5)  # as if the last call had not been
        >>> cache.get_seq_length()
        5
    """

    layers: list[SoftmaxCacheLayer | RecurrentCacheLayer]  # type: ignore[assignment]  # narrower than in Cache

    def __init__(
        self, config: HypeNetConfig, capacity: int = 0, *, fixed: bool = False, snapshot_every: int = 0
    ) -> None:
        if snapshot_every < 0 or snapshot_every % CHECKPOINT_UNIT:
            raise ValueError(
                f"HypeNetCache: snapshot_every must be a multiple of {CHECKPOINT_UNIT}, or 0, got {snapshot_every}"
            )
        if fixed and capacity <= 0:
            raise ValueError(f"HypeNetCache: capacity must be positive with fixed=True, got {capacity}")
        super().__init__(layers=[SoftmaxCacheLayer() if x == SOFTMAX else RecurrentCacheLayer() for x in config.mixers])
        self._config = config
        self.capacity, self.fixed, self.snapshot_every = capacity, fixed, snapshot_every
        self.lengths: torch.Tensor | None = None
        self.max_length = 0
        self.ragged = False
        self._columns = 0
        self._padded_columns = 0  # up to which some sequence has padding

    def prepare(self, batch: int, device: torch.device) -> None:
        """Check, before the layers run, that the batch has as many sequences as the cache.

        Raises:
            ValueError: If it does not.
        """
        if self.lengths is None:
            self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        elif self.lengths.shape[0] != batch:
            raise ValueError(
                f"HypeNetCache: input_ids must have the {self.lengths.shape[0]} sequences that the cache holds, "
                f"got {batch}"
            )

    def check_space(self, new_tokens: int) -> None:
        """Check, before the layers run, that a fixed capacity holds `new_tokens` more tokens per sequence.

        Raises:
            ValueError: If it does not.
        """
        if self.fixed and self.max_length + new_tokens > self.capacity:
            raise ValueError(
                f"HypeNetCache: capacity must hold {self.max_length} + {new_tokens} tokens (fixed=True), got "
                f"{self.capacity}"
            )

    def advance(self, columns: int, tokens: torch.Tensor | int, longest: int, padded: bool) -> None:
        """Count new tokens, after the layers have run.

        Args:
            columns: Input positions per sequence, padding included.
            tokens: Real tokens per sequence: an int, or int32 [B].
            longest: The largest of `tokens`.
            padded: Whether there may be padding among the new positions.
        """
        assert self.lengths is not None, "prepare() comes first"
        self.lengths += tokens
        self.max_length += longest
        self._columns += columns
        if padded:
            self.ragged, self._padded_columns = True, self._columns
        if self.snapshot_every and self._columns - self._last_snapshot() >= self.snapshot_every:
            self.snapshot()

    def count(self, tokens: int) -> None:
        """Count unpadded tokens on the host alone; `lengths` on the device is not changed."""
        self.max_length += tokens
        self._columns += tokens

    def step_state(self) -> dict[str, torch.Tensor]:
        """Return what an unpadded step changes besides the keys and values that it appends, by name."""
        states = {f"{i}": x.state for i, x in enumerate(self.layers) if isinstance(x, RecurrentCacheLayer)}
        return {name: x for name, x in ({"lengths": self.lengths} | states).items() if x is not None}

    def reserve(self, layer_idx: int, k: torch.Tensor, new_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the buffers of a softmax layer, with space for `new_tokens` more per sequence.

        Args:
            layer_idx: Index of the layer.
            k: The new keys [..., HK, D], which set heads and dtype of buffers that are allocated here.
            new_tokens: The largest number of new tokens of a sequence.

        Returns:
            Keys and values, each [B, capacity, HK, D].
        """
        layer = self.layers[layer_idx]
        assert isinstance(layer, SoftmaxCacheLayer)
        capacity = max(self.max_length + new_tokens, self.capacity if layer.keys is None else 0)
        return layer.reserve(k, self.batch_size, capacity, self.max_length)

    def recurrent(self, layer_idx: int) -> RecurrentCacheLayer:
        """Return what recurrent layer `layer_idx` keeps."""
        layer = self.layers[layer_idx]
        assert isinstance(layer, RecurrentCacheLayer)
        return layer

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of input positions seen, padding included, which transformers calls the cache's length."""
        return self._columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return (length, offset) of the mask that transformers would build."""
        return self._columns + query_length, 0

    def nbytes(self) -> int:
        """Return the bytes of all buffers, unused capacity and earlier states included."""
        tensors: list[torch.Tensor | None] = [self.lengths]
        for layer in self.layers:
            tensors += layer.tensors()
        return sum(x.nbytes for x in tensors if x is not None)

    @property
    def batch_size(self) -> int:
        """The number of sequences, or -1 before the first call."""
        return -1 if self.lengths is None else self.lengths.shape[0]

    @property
    def is_compileable(self) -> bool:
        """False: `generate` would pass four-dimensional masks, which this model does not take."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether the cache has seen a call."""
        return self.lengths is not None

    def reset(self) -> None:
        """Discard all tokens and keep the buffers."""
        super().reset()
        self.max_length, self.ragged, self._columns, self._padded_columns = 0, False, 0, 0
        if self.lengths is not None:
            self.lengths.zero_()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Make sequence b continue the former sequence beam_idx[b], for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times, copies next to each other."""
        if self.lengths is not None:
            index = torch.arange(self.batch_size, device=self.lengths.device)
            self.batch_select_indices(index.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences `indices`, given as indices or a boolean mask, in that order."""
        if self.lengths is None:
            return
        indices = indices.to(self.lengths.device)
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        for layer in self.layers:
            layer.resize_batch(indices, self.max_length)
        self.lengths = self.lengths.index_select(0, indices)

    @property
    def keeps_past(self) -> bool:
        """Whether states are recorded or kept, which padding ends."""
        return any(layer.record_past or layer.snapshots for layer in self._recurrent_layers())

    def snapshot(self) -> None:
        """Keep the states of recurrent layers as they are now, so that `crop` and `fork` can go back to this point."""
        for layer in self._recurrent_layers():
            layer.take_snapshot(self._columns)

    def activate_past_recording(self, tokens: int = RECORDED_TOKENS) -> None:
        """Record what recurrent layers need to go back by any number of the last tokens, from the next call on.

        Args:
            tokens: How many tokens to be able to go back at least. A single call of up to 8 times as many can be taken
                back whole. The memory is that of about 2 * tokens inputs, and of one more state.
        """
        for layer in self._recurrent_layers():
            layer.activate_past_recording(tokens)

    def longest_prefix(self, length: int) -> int:
        """Return the largest number of positions, at most `length`, to which `crop` and `fork` can go back.

        Args:
            length: Input positions, usually those that the cache has in common with a new prompt.
        """
        if length >= self._columns:
            return self._columns
        if length < self._padded_columns:
            return 0
        layer = next(self._recurrent_layers(), None)
        if layer is None or length >= self._columns - layer.recorded:
            return length
        return max((x for x in layer.snapshots if x <= length), default=0)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove positions from the end of every sequence.

        Args:
            tokens_to_remove: The negated number of positions to remove; a positive number is the length to keep.

        Raises:
            ValueError: If more would be removed than the cache holds; or if the states after the remaining ones are
                not stored, or padding would be removed: `longest_prefix` tells what can be kept.
        """
        removed = -tokens_to_remove if tokens_to_remove <= 0 else max(self._columns - tokens_to_remove, 0)
        if removed == 0 or self._columns == 0 or self.lengths is None:
            return
        kept = self._check_prefix("crop: tokens_to_remove", self._columns - removed, tokens_to_remove)
        if kept == 0:
            self.reset()
            return
        for layer in self._recurrent_layers():
            layer.go_back(kept, self._columns)
        self.lengths -= removed
        self.max_length -= removed
        self._columns = kept

    def fork(self, length: int | None = None) -> "HypeNetCache":
        """Return a copy that has seen the first `length` positions, by default all, and shares no memory.

        Raises:
            ValueError: As `crop`.
        """
        kept = self._columns if length is None else self._check_prefix("fork: length", length, length)
        fork = HypeNetCache.__new__(HypeNetCache)
        fork.__dict__ = dict(self.__dict__)
        removed = self._columns - kept
        fork.max_length, fork._columns = max(self.max_length - removed, 0), kept
        fork.layers = [
            layer.copy_of(kept, self._columns)
            if isinstance(layer, RecurrentCacheLayer)
            else layer.copy_of(self.capacity if self.fixed else fork.max_length)
            for layer in self.layers
        ]
        fork.lengths = None if self.lengths is None or kept == 0 else self.lengths - removed
        fork.ragged, fork._padded_columns = self.ragged and kept > 0, min(self._padded_columns, kept)
        return fork

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return all that the cache holds but what is recorded, by name: for a cache that has seen a call."""
        assert self.lengths is not None
        counts = [self._columns, self._padded_columns, self.max_length, self.ragged, self.snapshot_every]
        tensors = {"lengths": self.lengths, "counts": torch.tensor(counts, dtype=torch.int64)}
        for i, layer in enumerate(self.layers):
            tensors |= {f"{i}.{name}": x for name, x in layer.state_dict(self.max_length).items()}
        return tensors

    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            KeyError: If a tensor is missing.
            ValueError: If shapes do not fit the model or each other.
        """
        lengths, counts = tensors["lengths"], tensors["counts"].tolist()
        if lengths.dim() != 1 or len(counts) != 5 or (lengths.numel() and int(lengths.max()) > counts[2]):
            raise ValueError("lengths and counts must fit each other")
        for i, (layer, mixer) in enumerate(zip(self.layers, self._config.mixers, strict=True)):
            heads, kv_heads, size = self._config.head_sizes(mixer)
            own = {name.removeprefix(f"{i}."): x for name, x in tensors.items() if name.startswith(f"{i}.")}
            if isinstance(layer, RecurrentCacheLayer):
                layer.load_state_dict(own, (len(lengths), heads, size, size))
            else:
                layer.load_state_dict(own, (len(lengths), counts[2], kv_heads, size))
        self.lengths = lengths
        self._columns, self._padded_columns, self.max_length, ragged, self.snapshot_every = counts
        self.ragged = bool(ragged)

    def _check_prefix(self, argument: str, kept: int, got: int) -> int:
        """Return `kept` if the cache can go back to it; else raise an error about `argument`."""
        if not 0 <= kept <= self._columns:
            rule = f"at most the {self._columns} tokens seen"
        elif self.longest_prefix(kept) == kept:
            return kept
        elif kept < self._padded_columns:
            rule = f"such that the {self._padded_columns} positions with padding remain"
        else:
            rule = (
                f"such that the states after {kept} tokens are stored; nearest: {self.longest_prefix(kept)} "
                "(see snapshot_every, snapshot and activate_past_recording)"
            )
        raise ValueError(f"HypeNetCache.{argument} must be {rule}, got {got}")

    def _recurrent_layers(self) -> Iterator[RecurrentCacheLayer]:
        return (layer for layer in self.layers if isinstance(layer, RecurrentCacheLayer))

    def _last_snapshot(self) -> int:
        layer = next(self._recurrent_layers(), None)
        return self._columns if layer is None else max(layer.snapshots, default=0)
