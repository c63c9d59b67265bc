"""Compiles, before their first use, the CUDA kernels that NVRTC would compile at it.

Which kernels these are the launchers themselves say: the ops run on tensors in host memory, with a CUDA module that
notes what it would launch and launches nothing.
"""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import product
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hypenet_kernels as kernels
from hypenet_kernels import _native, _nvrtc

Kernel = tuple[str, str]  # source, expression


class Launch(NamedTuple):
    """A kernel, its grid and block along x, and the bytes of its params."""

    source: str
    expression: str
    num_blocks: int
    num_threads: int
    shared_bytes: int
    params: bytes


TOKENS, SPLIT_TOKENS = 96, 16384  # of a sequence, and of one long enough to be split
NUM_PROCESSORS = (1, 3, 6, 1024)  # few and many SMs: launchers choose by what fills the GPU
BAR = 30  # characters


def warmup(
    capability: tuple[int, int], head_dims: Sequence[int], dtypes: Sequence[torch.dtype], threads: int | None = None
) -> int:
    """Compile the kernels of every op for a GPU into the cache; print progress, and return how many were compiled.

    Args:
        capability: of the GPU, (9, 0) for an H100. The GPU need not be there.
        head_dims: head dimensions of keys, values and attention.
        dtypes: of the model.
        threads: that compile at the same time; None: as many as processors.

    Raises:
        NotImplementedError: if NVRTC is not installed or does not know the GPU.
    """
    wanted = collect(capability, [functools.partial(_run_ops, D, dtype) for D, dtype in product(head_dims, dtypes)])
    missing = [kernel for kernel in wanted if not _nvrtc.is_cached(*kernel, capability)]
    print(f"{len(wanted)} kernels for {_nvrtc.architecture(capability)}, of which {len(missing)} are to be compiled")
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        running = {pool.submit(_nvrtc.compile_kernel, *kernel, capability): kernel for kernel in missing}
        for done, future in enumerate(as_completed(running), 1):
            future.result()
            _show(done, len(missing), _nvrtc.short_name(running[future][1]))
    return len(missing)


def collect(capability: tuple[int, int], runs: Sequence[Callable[[], None]]) -> list[Kernel]:
    """Return the kernels that functions of ops on tensors in host memory would launch on a GPU, each once."""
    found: dict[Kernel, None] = {}
    for num_processors, run in product(NUM_PROCESSORS, runs):
        found |= dict.fromkeys(launch[:2] for launch in launches(num_processors, shared_bytes(capability), run))
    return list(found)


def launches(num_processors: int, shared_bytes: int, run: Callable[[], None]) -> list[Launch]:
    """Return what a function of ops on tensors in host memory would launch on a GPU, which need not be there.

    Args:
        num_processors: SMs of the GPU.
        shared_bytes: of shared memory that a block can have.
        run: calls the ops.
    """
    module = _native.runtime_cuda()
    module.start_collecting(num_processors, shared_bytes)
    try:
        with _on_host_memory(module):
            run()
    finally:
        found = module.stop_collecting()
    return [Launch(*launch) for launch in found]


def shared_bytes(capability: tuple[int, int]) -> int:
    """Return the bytes of shared memory that a block can have (CUDA programming guide, technical specifications)."""
    if capability in ((8, 0), (8, 7)):
        return 163 * 1024
    return 99 * 1024 if capability[0] in (8, 12) else 227 * 1024


@contextlib.contextmanager
def _on_host_memory(module: ModuleType) -> Iterator[None]:
    """Within the context, ops on tensors in host memory call the CUDA module."""

    on_host = _native.kernel

    def kernel(op: str, name: str, device: torch.device) -> Callable[[dict[str, Any]], None]:
        if op.removesuffix("_bwd") in _native.TRITON_OPS:
            return on_host(op, name, device)
        return lambda fields: getattr(module, name)(fields, (0, 0))

    replaced = {"kernel": kernel, "cuda": lambda: module, "on_cuda": lambda x: True}
    before = {name: getattr(_native, name) for name in replaced}
    try:
        for name, function in replaced.items():
            setattr(_native, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(_native, name, function)


def _run_ops(D: int, dtype: torch.dtype) -> None:
    """Call every op that has CUDA kernels for the type as models do: training, prefill, packed and split, decoding."""
    half = dtype in _native.HALF
    with torch.random.fork_rng(devices=[]):
        for run in (_recurrences, _attention) * half + (_steps, _convolutions):
            try:
                run(D, dtype)
            except RuntimeError as error:
                if "less shared memory than the kernel needs" not in str(error):
                    raise


def _recurrences(D: int, dtype: torch.dtype) -> None:
    pool, slots = torch.zeros(2, 2, D, D), torch.tensor([1])
    packed = torch.tensor([0, 3, TOKENS])
    for tokens, options in (
        (TOKENS, {"output_final_state": True}),
        (TOKENS, {"cu_seqlens": packed}),
        (TOKENS, {"initial_state": pool, "state_indices": slots}),
        (SPLIT_TOKENS, {"split_sequence": True}),
    ):
        q, k, v, g, beta = _recurrent_inputs(D, dtype, tokens)
        differentiated = "state_indices" not in options
        _call(kernels.chunk_gated_delta_rule, (q, k, v, g, beta), differentiated, **options)
        _call(kernels.chunk_simple_gla, (q, k, v, g), differentiated, **options)


def _steps(D: int, dtype: torch.dtype) -> None:
    q, k, v, g, beta = _recurrent_inputs(D, dtype, 1)
    state = torch.zeros(1, 2, D, D)
    kernels.simple_gla_step(q, k, v, g, state)
    _, states = kernels.gated_delta_step(q, k, v, g, beta, state, output_states=True)
    kernels.commit_states(state, states, torch.tensor([1]))


def _attention(D: int, dtype: torch.dtype) -> None:
    q, k = torch.zeros(1, TOKENS, 2, D, dtype=dtype), torch.zeros(1, TOKENS, 1, D, dtype=dtype)
    _call(kernels.hype_attention, (q, k, k.clone()), True, gate=q, logit_scale_base=100.0)
    kernels.hype_attention_decode(q[:, :1], k, k.clone(), torch.tensor([7]), logit_scale_base=100.0)


def _convolutions(D: int, dtype: torch.dtype) -> None:
    x, weight = torch.zeros(1, TOKENS, D, dtype=dtype).transpose(1, 2), torch.zeros(D, 4, dtype=dtype)
    _call(kernels.causal_conv1d_fn, (x, weight), True, activation="silu")
    kernels.causal_conv1d_update(x[..., 0], torch.zeros(1, D, 4, dtype=dtype), weight, activation="silu")


def _recurrent_inputs(D: int, dtype: torch.dtype, tokens: int) -> tuple[Tensor, ...]:
    q, v = torch.zeros(1, tokens, 1, D, dtype=dtype), torch.zeros(1, tokens, 2, D, dtype=dtype)
    return q, q.clone(), v, torch.zeros(1, tokens, 2), torch.zeros(1, tokens, 2)


def _call(op: Callable[..., Any], inputs: tuple[Tensor, ...], differentiated: bool, **options: Any) -> None:
    """Call an op with and, if `differentiated`, without gradients."""
    op(*inputs, **options)
    if not differentiated:
        return
    leaves = [x.clone().requires_grad_() for x in inputs]
    results = op(*leaves, **options)
    o = results[0] if isinstance(results, tuple) else results
    torch.autograd.grad(o.float().sum(), leaves)


def _show(done: int, total: int, name: str) -> None:
    filled = BAR * done // total
    line = f"[{'#' * filled}{' ' * (BAR - filled)}] {done}/{total} {name}"
    if sys.stdout.isatty():
        width = os.get_terminal_size().columns - 1
        print(f"\r{line[:width]:{width}}", end="\n" if done == total else "", flush=True)
    else:
        print(line, flush=True)
