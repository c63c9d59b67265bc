"""Chunks, segments and workspace of the recurrences on CUDA.

NT chunks of 64 tokens; NS segments of chunks where sequences are split; K and V as the kernels take them (padded_dims).
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hypenet_kernels import _checks, _native

if TYPE_CHECKING:
    from hypenet_kernels._recurrence import Inputs

CHUNK = 64  # tokens
# Head dimensions that are built; others are padded with zeros, which changes nothing, and narrowed back.
KEY_DIMS, VALUE_DIM_MULTIPLE = (64, 128, 256), 64
# Splitting sequences takes 2.25 times the work, so it is for few heads: at most SPLIT_HEADS of 128 value columns. They
# are cut into DEVICE_HEADS segments, about what a large GPU runs at once, of at least MIN_SEGMENT chunks, since the
# states still go from segment to segment one by one.
SPLIT_HEADS, DEVICE_HEADS, MIN_SEGMENT = 40, 128, 16
STEP_TOKENS = 16  # up to which the recurrent form goes token by token


class Saved(NamedTuple):
    """Tensors saved for backward."""

    G: Tensor  # [NT, HV, 64] float32, sum of max(g, -50) log2(e) from the chunk's start to each token
    L: Tensor  # [NT, HV, 64, 64], stril((I + stril(diag(beta) K K^T . Gamma))^-1), hi/lo split (gated_delta.cuh)
    h: Tensor | None  # [NT, HV, K, V], the state before every chunk, rounded; None in inference
    chunk_offsets: Tensor  # [2, N + 1] int64, chunks before every sequence, and cu_seqlens within [0, T]; or empty
    transfers: Tensor  # [NS, HV, K, K] ([NS, HV] without beta) float32: a segment multiplies a state by it; or empty
    segment_offsets: Tensor  # [N + 1] int64, segments before every sequence; empty without cu_seqlens or split


class ForwardWorkspace(NamedTuple):
    saved: Saved
    P: Tensor | None  # [NT, HV, 64, 64], scale (Q K^T) . Gamma; None without beta, where no kernel stores it
    segment_states: Tensor | None  # [NS, HV, K, V] float32, the state before the segment


class BackwardWorkspace(NamedTuple):
    saved: Saved
    dstates: Tensor  # [NT, HV, K, V], the gradient of the state after the chunk
    dB_low: Tensor | None  # [B, T, HV, V], low part of dv / beta where some beta of a chunk exceeds 1
    segment_states: Tensor | None  # [NS, HV, K, V] float32, the gradient of the state after the segment


def padded_dims(op: str, q: Tensor, v: Tensor) -> tuple[int, int]:
    """Return K and V as the kernels over whole sequences take them."""
    if q.dtype not in _native.HALF:
        rule = "be bfloat16 or float16 on CUDA in chunks and for a gradient"
        _checks.fail(NotImplementedError, op, "q", rule, q.dtype)
    K, V = q.shape[3], v.shape[3]
    built = [n for n in KEY_DIMS if n >= K]
    if not built:
        _checks.fail(NotImplementedError, op, "q", f"have a head dimension of at most {KEY_DIMS[-1]} on CUDA", K)
    return built[0], (V + VALUE_DIM_MULTIPLE - 1) // VALUE_DIM_MULTIPLE * VALUE_DIM_MULTIPLE


def max_chunks(x: "Inputs") -> int:
    """Return how many chunks the sequences have together; with cu_seqlens the most that they may have."""
    B, T = x.q.shape[:2]
    return B * ((T + CHUNK - 1) // CHUNK) if x.cu_seqlens is None else T // CHUNK + x.num_sequences


def max_segments(x: "Inputs") -> int:
    """Return how many segments the sequences have together; with cu_seqlens the most that they may have."""
    N, T, tokens = x.num_sequences, x.q.shape[1], x.segment_chunks * CHUNK
    if tokens == 0:
        return N
    return N * max(1, -(-T // tokens)) if x.cu_seqlens is None else N + T // tokens


def chunks_of_segment(x: "Inputs") -> int:
    """Return how many chunks a segment of a split sequence has, from shapes alone; 0 where splitting does not pay."""
    sequence_heads = x.v.shape[2] * -(-x.v.shape[3] // 128)
    if x.num_sequences * sequence_heads > SPLIT_HEADS:
        return 0
    chunks = max(MIN_SEGMENT, -(-max_chunks(x) * sequence_heads // DEVICE_HEADS))
    return chunks if 2 * chunks * CHUNK <= x.q.shape[1] else 0


def saved_tensors(x: "Inputs", K: int, V: int, save: bool = True) -> Saved:
    """Allocate what the forward fills for the backward (save=False: only what the forward itself needs)."""
    NT, HV, new = max_chunks(x), x.v.shape[2], x.q.new_empty
    offsets = 0 if x.cu_seqlens is None else x.cu_seqlens.shape[0]
    transfer = () if x.beta is None else (K, K)
    return Saved(
        G=new(NT, HV, CHUNK, dtype=torch.float32),
        L=new(0) if x.beta is None else new(NT, HV, CHUNK, CHUNK),
        h=new(NT, HV, K, V) if save else None,
        chunk_offsets=new(2, offsets, dtype=torch.int64),
        transfers=new((max_segments(x), HV, *transfer) if x.segment_chunks else (0,), dtype=torch.float32),
        segment_offsets=new(offsets if x.segment_chunks else 0, dtype=torch.int64),
    )


def forward_workspace(x: "Inputs", K: int, V: int, save: bool) -> ForwardWorkspace:
    """Allocate what the kernels of the forward pass to each other and to the backward."""
    P = None if x.beta is None else x.q.new_empty(max_chunks(x), x.v.shape[2], CHUNK, CHUNK)
    return ForwardWorkspace(saved_tensors(x, K, V, save), P, _segment_states(x, K, V))


def backward_workspace(op: str, x: "Inputs", K: int, V: int, saved: Saved) -> BackwardWorkspace:
    """Allocate what the kernels of the backward pass to each other."""
    h, (B, T, HV) = saved.h, x.v.shape[:3]
    if h is None or h.shape != (max_chunks(x), HV, K, V):
        _checks.fail(ValueError, op, "saved", "be the tensors that the forward on CUDA saved for these inputs", saved)
    dB_low = None if x.beta is None else x.q.new_empty(B, T, HV, V)
    return BackwardWorkspace(saved, torch.empty_like(h), dB_low, _segment_states(x, K, V))


def _segment_states(x: "Inputs", K: int, V: int) -> Tensor | None:
    return x.q.new_empty(max_segments(x), x.v.shape[2], K, V, dtype=torch.float32) if x.segment_chunks else None


def fields(x: "Inputs", workspace: ForwardWorkspace | BackwardWorkspace) -> dict[str, Any]:
    """Return the fields of the params struct that only CUDA has: geometry, and every tensor of the workspace."""
    saved, *others = workspace
    names = *Saved._fields, *workspace._fields[1:]
    return {
        "num_chunks": max_chunks(x),
        "segment_chunks": x.segment_chunks,
        "num_segments": max_segments(x),
        **{name: _native.pointer(y) for name, y in zip(names, (*saved, *others), strict=True)},
    }
