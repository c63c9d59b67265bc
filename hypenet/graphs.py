"""A decode step as one CUDA graph: the GPU replays all of its kernels, and Python and the launches cost nothing."""

from collections.abc import Callable

import torch

from hypenet.cache import HypeNetCache
from hypenet.modeling_hypenet import HypeNetForCausalLM

WARM_UP_STEPS = 2  # before a capture: kernels are compiled and loaded, libraries allocate their workspaces


class DecodeGraph:
    """The step of one new token per sequence, captured once and then replayed, for a model and a cache on a GPU.

    The cache must have a fixed capacity, since a graph remembers addresses; how many tokens each sequence has is read
    on the device. Build one graph for each cache, after the prompt.

    Args:
        model: The model, in evaluation mode.
        cache: A cache with `fixed=True`, which has seen the prompt. Its past must not be recorded.

    Raises:
        ValueError: If the cache is none of that, or on another device.

    Example:
        >>> def greedy(model, ids, tokens):  # doctest: +SKIP
        ...     cache = HypeNetCache(model.config, capacity=ids.shape[1] + tokens, fixed=True)
        ...     token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        ...     step, found = DecodeGraph(model, cache), [token]
        ...     for _ in range(tokens - 1):
        ...         token = step(token)[:, -1].argmax(-1, keepdim=True)
        ...         found.append(token)
        ...     return torch.cat(found, dim=1)
    """

    def __init__(self, model: HypeNetForCausalLM, cache: HypeNetCache) -> None:
        if not cache.fixed or cache.get_seq_length() == 0 or cache.keeps_past or cache.snapshot_every:
            raise ValueError(
                "DecodeGraph: cache must have a fixed capacity, have seen a prompt, and keep no earlier states, got "
                f"fixed={cache.fixed}, {cache.get_seq_length()} tokens"
            )
        self.cache, self.device = cache, model.device
        self._ids = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=model.device)
        self._before = {name: x.clone() for name, x in cache.step_state().items()}

        def step() -> torch.Tensor:
            logits: torch.Tensor = model(self._ids, past_key_values=cache).logits
            cache.count(-1)  # the host counts at every replay instead
            return logits

        with torch.no_grad():
            self._logits, self._replay = self._capture(step)
        self._restore()

    def _capture(self, step: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], object]]:
        """Return the output of a captured step, and the function that replays it."""
        if self.device.type != "cuda":
            raise ValueError(f"DecodeGraph: model must be on a CUDA device, got {self.device}")
        current, side = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                step()
                self._restore()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step()
        return logits, graph.replay

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Run the step on the new tokens, int64 [B, 1].

        Returns:
            Logits [B, 1, vocabulary], in memory that the next call overwrites.

        Raises:
            ValueError: If the tokens have another shape, or the cache is full.
        """
        if input_ids.shape != self._ids.shape:
            raise ValueError(
                f"DecodeGraph: input_ids must have shape {list(self._ids.shape)}, got {list(input_ids.shape)}"
            )
        self.cache.check_space(1)
        self._ids.copy_(input_ids)
        self._replay()
        self.cache.count(1)
        return self._logits

    def _restore(self) -> None:
        """Put the cache back to where the prompt ended; what was written behind it is overwritten."""
        for name, x in self.cache.step_state().items():
            x.copy_(self._before[name])
