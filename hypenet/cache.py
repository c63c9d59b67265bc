"""The generation cache of a HypeNet: preallocated keys and values for softmax layers, one state for recurrent layers.

Padding is never stored. Sequence b owns the first `lengths[b]` rows of every key and value buffer, so its results do
not depend on the other sequences in the batch. B batch, HK key-value heads, D head dimension, K and V state rows and
columns.
"""

from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer

from hypenet.configuration_hypenet import SOFTMAX, HypeNetConfig


class SoftmaxCacheLayer(CacheLayerMixin):
    """Keys and values [B, capacity, HK, D] of one layer; a full buffer at least doubles its capacity."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    keys: torch.Tensor | None
    values: torch.Tensor | None

    def reserve(self, k: torch.Tensor, batch: int, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the buffers, grown to `capacity` tokens per sequence, with the heads and dtype of k [..., HK, D]."""
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
        """Replace row b by the former row index[b]; only the first `length` tokens are in use."""
        if self.keys is None or self.values is None:
            return
        if index.shape[0] == self.keys.shape[0]:
            self.keys[:, :length] = self.keys[:, :length].index_select(0, index)
            self.values[:, :length] = self.values[:, :length].index_select(0, index)
        else:
            self.keys, self.values = self.keys.index_select(0, index), self.values.index_select(0, index)

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


class RecurrentCacheLayer(LinearAttentionLayer):
    """One state [B, H, K, V] in the accumulation type; its address stays the same while decoding.

    transformers considers a linear layer filled once its convolution state is written. These layers have no
    convolution, so writing the recurrent state marks them as filled.
    """

    device: torch.device | None  # type: ignore[assignment]  # the base class sets None

    @property
    def state(self) -> torch.Tensor | None:
        """Return the state, or None before the first token."""
        return self.recurrent_states[0] if self.has_previous_state[0] else None

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs: Any) -> torch.Tensor:
        """Copy `recurrent_states` [B, H, K, V] into the state and return it, without autograd history."""
        self.device = recurrent_states.device
        self.has_previous_state[state_idx] = True
        return super().update_recurrent_state(recurrent_states.detach(), state_idx, **kwargs)

    def resize_batch(self, index: torch.Tensor, length: int) -> None:
        """Replace row b by the former row index[b], in place if the batch size stays the same."""
        if self.state is None:
            return
        rows = self.state.index_select(0, index)
        if rows.shape == self.state.shape:
            self.state.copy_(rows)
        else:
            self.recurrent_states[0] = rows


class HypeNetCache(Cache):
    """The keys, values and states that a HypeNet keeps between calls.

    `generate` creates one; to continue a sequence yourself, create one and pass it as `past_key_values`.

    Args:
        config: The model's configuration, which names the kind of every layer.
        capacity: Tokens per sequence to allocate at the first call; the buffers grow when it is exceeded.

    Attributes:
        lengths (int32 [B] on the model's device): Real tokens stored for each sequence; None before the first call.
        max_length (int): An upper bound of `lengths` that needs no device synchronisation.
        ragged (bool): Whether the lengths may differ between sequences.

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

    def advance(self, columns: int, tokens: torch.Tensor | int, longest: int, ragged: bool) -> None:
        """Count new tokens, after the layers have run.

        Args:
            columns: Input positions per sequence, padding included.
            tokens: Real tokens per sequence: an int, or int32 [B].
            longest: The largest of `tokens`.
            ragged: Whether `tokens` may differ between sequences.
        """
        assert self.lengths is not None, "prepare() comes first"
        self.lengths += tokens
        self.max_length += longest
        self.ragged |= ragged
        self._columns += columns

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
        return layer.reserve(k, self.batch_size, capacity)

    def state(self, layer_idx: int) -> torch.Tensor | None:
        """Return the state [B, H, K, V] of a recurrent layer, or None before the first token."""
        layer = self.layers[layer_idx]
        assert isinstance(layer, RecurrentCacheLayer)
        return layer.state

    def store_state(self, layer_idx: int, state: torch.Tensor) -> None:
        """Store the state [B, H, K, V] of a recurrent layer."""
        layer = self.layers[layer_idx]
        assert isinstance(layer, RecurrentCacheLayer)
        layer.update_recurrent_state(state)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of input positions seen, padding included, which transformers calls the cache's length."""
        return self._columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return (length, offset) of the mask that transformers would build."""
        return self._columns + query_length, 0

    def nbytes(self) -> int:
        """Return the bytes of all buffers, unused capacity included."""
        tensors = [self.lengths]
        for layer in self.layers:
            tensors += [layer.state] if isinstance(layer, RecurrentCacheLayer) else [layer.keys, layer.values]
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
        self.max_length, self.ragged, self._columns = 0, False, 0
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

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens from the end of every sequence.

        Args:
            tokens_to_remove: The negated number of tokens to remove; a positive number is the length to keep.

        Raises:
            NotImplementedError: If tokens would be removed while a layer is recurrent (its earlier states are not
                stored) or after a padded batch (which positions were padding is not stored).
            ValueError: If more tokens would be removed than the cache holds.
        """
        removed = -tokens_to_remove if tokens_to_remove <= 0 else max(self._columns - tokens_to_remove, 0)
        if removed == 0 or self._columns == 0 or self.lengths is None:
            return
        recurrent = [i for i, layer in enumerate(self.layers) if isinstance(layer, RecurrentCacheLayer)]
        if recurrent:
            raise NotImplementedError(
                f"HypeNetCache.crop: tokens_to_remove must be 0 with recurrent layers ({recurrent}), whose "
                f"earlier states are not stored, got {tokens_to_remove}"
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
