"""The generation cache of a HypeNet: preallocated keys and values for softmax layers, one state for recurrent layers.

Padding is never stored. Sequence b owns the first `lengths[b]` rows of every key and value buffer, so that what a
sequence sees does not depend on the batch it is in. B batch, HK key-value heads, D head dimension, K and V state rows
and columns.
"""

from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer

from hypenet.configuration_hypenet import SOFTMAX, HypeNetConfig


class SoftmaxCacheLayer(CacheLayerMixin):
    """Keys and values [B, capacity, HK, D]; the capacity at least doubles when it no longer suffices."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    keys: torch.Tensor | None
    values: torch.Tensor | None

    def reserve(self, k: torch.Tensor, batch: int, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for `capacity` tokens in each of `batch` sequences, with the heads and dtype of k [..., HK, D]."""
        present = 0 if self.keys is None else self.keys.shape[1]
        if self.keys is not None and self.values is not None and present >= capacity:
            return self.keys, self.values
        capacity = max(capacity, 2 * present)
        keys, values = (k.new_empty(batch, capacity, *k.shape[-2:]) for _ in range(2))
        if self.keys is not None and self.values is not None:
            keys[:, :present], values[:, :present] = self.keys, self.values
        self.keys, self.values = keys, values
        self.is_initialized = True
        return keys, values

    def resize_batch(self, index: torch.Tensor, length: int) -> None:
        """Row b becomes what row index[b] was; only the first `length` tokens carry anything."""
        if self.keys is None or self.values is None:
            return
        if index.shape[0] == self.keys.shape[0]:
            self.keys[:, :length] = self.keys[:, :length].index_select(0, index)
            self.values[:, :length] = self.values[:, :length].index_select(0, index)
        else:
            self.keys, self.values = self.keys.index_select(0, index), self.values.index_select(0, index)

    def reset(self) -> None:
        pass  # lengths of zero make the old content unreachable

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
        raise NotImplementedError(f"{type(self).__name__}: {method} is not offered by one layer, ask the HypeNetCache")


class RecurrentCacheLayer(LinearAttentionLayer):
    """One state [B, H, K, V] in the accumulation type, at an address that does not change while decoding.

    transformers marks a linear layer as filled when its convolution state is written; these layers have none, so
    writing the recurrent state marks it.
    """

    device: torch.device | None  # type: ignore[assignment]  # the base class sets None

    @property
    def state(self) -> torch.Tensor | None:
        """The state, or None before the first token."""
        return self.recurrent_states[0] if self.has_previous_state[0] else None

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs: Any) -> torch.Tensor:
        self.device = recurrent_states.device
        self.has_previous_state[state_idx] = True
        return super().update_recurrent_state(recurrent_states.detach(), state_idx, **kwargs)

    def resize_batch(self, index: torch.Tensor, length: int) -> None:
        if self.state is None:
            return
        rows = self.state.index_select(0, index)
        if rows.shape == self.state.shape:
            self.state.copy_(rows)
        else:
            self.recurrent_states[0] = rows


class HypeNetCache(Cache):
    """What a HypeNet remembers between calls; `generate` makes one, or make it yourself and pass `past_key_values`.

    Args:
        config: The model's configuration, which says what each layer is.
        capacity: Tokens a sequence to make room for at the first call; the buffers grow when it is exceeded.

    Attributes:
        lengths (int32 [B] on the model's device): Real tokens stored for each sequence; None before the first call.
        max_length: An upper bound of `lengths`, known without asking the device.
        ragged: Whether the lengths may differ.
    """

    layers: list[SoftmaxCacheLayer | RecurrentCacheLayer]  # type: ignore[assignment]  # narrower than in Cache

    def __init__(self, config: HypeNetConfig, capacity: int = 0) -> None:
        super().__init__(layers=[SoftmaxCacheLayer() if x == SOFTMAX else RecurrentCacheLayer() for x in config.mixers])
        self.capacity = capacity
        self.lengths: torch.Tensor | None = None
        self.max_length = 0
        self.ragged = False
        self._columns = 0

    def prepare(self, batch: int, device: torch.device) -> None:
        """Called by the model before its layers run: checks that the batch is the one that is stored."""
        if self.lengths is None:
            self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        elif self.lengths.shape[0] != batch:
            raise ValueError(
                f"HypeNetCache: input_ids must have the {self.lengths.shape[0]} sequences that the cache holds, "
                f"got {batch}"
            )

    def advance(self, columns: int, tokens: torch.Tensor | int, longest: int, ragged: bool) -> None:
        """Called by the model after its layers ran: `columns` of input held `tokens` (a number, or one for each
        sequence, at most `longest`) real tokens."""
        assert self.lengths is not None, "prepare() comes first"
        self.lengths += tokens
        self.max_length += longest
        self.ragged |= ragged
        self._columns += columns

    def reserve(self, layer_idx: int, k: torch.Tensor, new_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The buffers of a softmax layer, with room for `new_tokens` more in each sequence; k [..., HK, D]."""
        layer = self.layers[layer_idx]
        assert isinstance(layer, SoftmaxCacheLayer)
        capacity = max(self.max_length + new_tokens, self.capacity if layer.keys is None else 0)
        return layer.reserve(k, self.batch_size, capacity)

    def state(self, layer_idx: int) -> torch.Tensor | None:
        """The state of a recurrent layer, or None before the first token."""
        layer = self.layers[layer_idx]
        assert isinstance(layer, RecurrentCacheLayer)
        return layer.state

    def store_state(self, layer_idx: int, state: torch.Tensor) -> None:
        """Keeps `state` as the state of a recurrent layer."""
        layer = self.layers[layer_idx]
        assert isinstance(layer, RecurrentCacheLayer)
        layer.update_recurrent_state(state)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of input seen so far, padding included: what transformers calls the length of a cache."""
        return self._columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._columns + query_length, 0

    def nbytes(self) -> int:
        """Bytes of all buffers, unused capacity included."""
        tensors = [self.lengths]
        for layer in self.layers:
            tensors += [layer.state] if isinstance(layer, RecurrentCacheLayer) else [layer.keys, layer.values]
        return sum(x.nbytes for x in tensors if x is not None)

    @property
    def batch_size(self) -> int:
        return -1 if self.lengths is None else self.lengths.shape[0]

    @property
    def is_compileable(self) -> bool:
        # generate would hand a compileable cache four-dimensional masks, which this model has no use for.
        return False

    @property
    def is_initialized(self) -> bool:
        return self.lengths is not None

    def reset(self) -> None:
        """Forget everything and keep the buffers."""
        super().reset()
        self.max_length, self.ragged, self._columns = 0, False, 0
        if self.lengths is not None:
            self.lengths.zero_()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Sequence b continues what sequence beam_idx[b] was (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times in a row."""
        if self.lengths is not None:
            index = torch.arange(self.batch_size, device=self.lengths.device)
            self.batch_select_indices(index.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences of `indices`, in that order."""
        if self.lengths is None:
            return
        indices = indices.to(self.lengths.device)
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        for layer in self.layers:
            layer.resize_batch(indices, self.max_length)
        self.lengths = self.lengths.index_select(0, indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens (a positive number is the length to keep).

        Raises NotImplementedError if that would forget anything and a layer is recurrent (a state has no past) or the
        sequences differ in length (which columns were padding is not stored).
        """
        removed = -tokens_to_remove if tokens_to_remove <= 0 else max(self._columns - tokens_to_remove, 0)
        if removed == 0 or self._columns == 0 or self.lengths is None:
            return
        recurrent = [i for i, layer in enumerate(self.layers) if isinstance(layer, RecurrentCacheLayer)]
        if recurrent:
            raise NotImplementedError(
                f"HypeNetCache.crop: tokens_to_remove must be 0 with recurrent layers ({recurrent}), whose state "
                f"cannot go back, got {tokens_to_remove}"
            )
        if self.ragged:
            raise NotImplementedError("HypeNetCache.crop: tokens_to_remove must be 0 after a padded batch")
        if removed > self._columns:
            raise ValueError(
                f"HypeNetCache.crop: tokens_to_remove must be at most the {self._columns} tokens seen, got {removed}"
            )
        self.lengths -= removed
        self.max_length -= removed
        self._columns -= removed
