"""What a mixer receives in addition to the hidden states: positions, packing, and the cache.

B batch, T tokens, D head dimension.
"""

from dataclasses import dataclass

import torch

from hypenet.cache import HypeNetCache
from hypenet.cache_layers import Recurrence

# A call with a cache and at most this many tokens per sequence runs on the in-place decode kernels.
MAX_STEP_TOKENS = 8


@dataclass
class MixerContext:
    """The second argument of every mixer.

    To run a mixer on its own, for example to train it against one layer of a teacher, set `position_embeddings`, and
    `cu_seqlens` if documents are packed; the other fields belong to the model.

    Attributes:
        position_embeddings: cos and sin, each [B or 1, T, D], as `Qwen3RotaryEmbedding` returns them; None for mixers
            without rotary embedding.
        cu_seqlens: int32 [N + 1]; the input is [1, total, hidden] and sequence n is tokens cu_seqlens[n] to
            cu_seqlens[n + 1]. None: B sequences of T tokens.
        cache: Holds the earlier tokens; every mixer reads and updates its layer. None: no cache.
        past: Input positions that the cache has seen, 0 without a cache.
        step: Whether to use the in-place decode kernels: each of the B sequences continues with a few new tokens.
        state_indices: int32 [B], only with `step`: b, or -1 where the new token of sequence b is padding and must
            change nothing. None: no padding.
        slots: With `cu_seqlens` and a cache: the sequence of each of the `total` tokens, and its position there.
        longest: With a cache: the largest number of new tokens of a sequence.

    Example:
        >>> import torch
        >>> from hypenet import HypeNetConfig, LightningAttention, MixerContext
        >>> config = HypeNetConfig(hidden_size=32, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        ...                        lightning_use_rope=False)
        >>> mixer = LightningAttention(config, layer_idx=1)
        >>> documents = MixerContext(cu_seqlens=torch.tensor([0, 5, 9], dtype=torch.int32))
        >>> mixer(torch.randn(1, 9, 32), documents).shape
        torch.Size([1, 9, 32])
    """

    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None
    cu_seqlens: torch.Tensor | None = None
    cache: HypeNetCache | None = None
    past: int = 0
    step: bool = False
    state_indices: torch.Tensor | None = None
    slots: tuple[torch.Tensor, torch.Tensor] | None = None
    longest: int = 0

    def recur(self, layer_idx: int, run: Recurrence) -> torch.Tensor:
        """Run the recurrence of layer `layer_idx`, from the state in the cache and into it if there is one.

        Args:
            layer_idx: Index of the layer.
            run: The recurrence over the new tokens.

        Returns:
            The output [B, T, H, V].
        """
        if self.cache is None:
            o: torch.Tensor = run.chunk(*run.inputs, cu_seqlens=self.cu_seqlens)[0]
            return o
        layer = self.cache.recurrent(layer_idx)
        if not self.step:
            return layer.run_chunk(run, self.cu_seqlens, self.past, self.cache.snapshot_every)
        state = layer.state
        assert state is not None
        if self.state_indices is not None:
            layer.forget()
        elif layer.record_past:
            layer.record(run, {0: state})
        return run.step(*run.inputs, state=state, state_indices=self.state_indices)

    def append(self, layer_idx: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the new keys and values of softmax layer `layer_idx` to the cache, which there must be.

        Args:
            layer_idx: Index of the layer.
            k, v: [B, T, HK, D]. In a step they are only given space, since the decode kernel writes them.

        Returns:
            All keys and values, each [B, capacity, HK, D].
        """
        assert self.cache is not None
        keys, values = self.cache.reserve(layer_idx, k, self.longest)
        if self.step:
            return keys, values
        for buffer, new in ((keys, k.detach()), (values, v.detach())):
            if self.slots is None:
                buffer[:, self.past : self.past + k.shape[1]] = new
            else:
                buffer[self.slots] = new[0]
        return keys, values
