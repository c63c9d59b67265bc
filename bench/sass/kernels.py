"""Which kernels the model covers, where their loops are, and the shapes for which times are predicted."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

import hypenet_kernels as kernels

CHUNK = 64
K = V = D = 128
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """An op at a shape.

    Attributes:
        op: of OPS.
        B, T: sequences, and tokens of each (for decoding: keys).
        H, HV: key and value heads; for attention query and key-value heads.
        peers: milliseconds published for others, by name.
    """

    name: str
    op: str
    B: int
    T: int
    H: int
    HV: int
    backward: bool = False
    peers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Kernel:
    """A kernel of the model, by the name of its function.

    Attributes:
        unit: what one iteration of its loop processes, for tables.
        iterations: of the longest block, of a case.
        lengths: values of T whose difference in cycles is that of iterations; None: a block is measured as a whole.
        causal: blocks have from 1 / n of the iterations of the longest to all of them; otherwise all have the same.
        num_bytes: to and from device memory, of a case.
    """

    function: str
    unit: str
    num_bytes: Callable[[Case], float]
    iterations: Callable[[Case], int] = lambda case: 1
    lengths: tuple[int, int] | None = None
    causal: bool = False

    @property
    def name(self) -> str:
        """The name of the function without what all share."""
        return self.function.removesuffix("_kernel")

    @property
    def backward(self) -> bool:
        """Whether it belongs to the backward pass."""
        return "_bwd_" in self.function


def _chunks(case: Case) -> int:
    return case.T // CHUNK


def _rows(case: Case, *, keys: int = 0, values: int = 0, matrices: int = 0, states: int = 0) -> float:
    """Return the bytes of so many tensors of H K, HV V and HV C elements a token, and HV K V elements a chunk."""
    a_token = case.H * K * keys + case.HV * V * values + case.HV * CHUNK * matrices + case.HV * K * V * states / CHUNK
    return DTYPE.itemsize * case.B * case.T * a_token


def _of_delta(case: Case, matrices: int) -> int:
    return 0 if case.op == "chunk_simple_gla" else matrices


CHUNK_LENGTHS, KEY_LENGTHS = (4 * CHUNK, 12 * CHUNK), (8 * CHUNK, 16 * CHUNK)
KERNELS = (
    Kernel("gated_delta_prepare_kernel", "block", lambda c: _rows(c, keys=2, matrices=_of_delta(c, 2))),
    Kernel(
        "gated_delta_scan_kernel",
        "chunk",
        lambda c: _rows(c, keys=2, values=2, matrices=_of_delta(c, 2)),
        _chunks,
        CHUNK_LENGTHS,
    ),
    Kernel(
        "gated_delta_bwd_scan_kernel",
        "chunk",
        lambda c: _rows(c, keys=2, values=2, matrices=_of_delta(c, 1), states=1),
        _chunks,
        CHUNK_LENGTHS,
    ),
    Kernel(
        "gated_delta_bwd_chunk_kernel",
        "block",
        lambda c: _rows(c, keys=4, values=4, matrices=_of_delta(c, 1), states=2),
    ),
    Kernel(
        "hype_attention_fwd_kernel",
        "64 keys",
        lambda c: _rows(c, keys=2, values=2),
        lambda c: c.T // 64,
        KEY_LENGTHS,
        causal=True,
    ),
    Kernel(
        "hype_attention_bwd_keys_kernel",
        "64 queries",
        lambda c: _rows(c, keys=2, values=4),
        lambda c: c.T // 64 * (c.H // c.HV),
        KEY_LENGTHS,
        causal=True,
    ),
    Kernel(
        "hype_attention_bwd_queries_kernel",
        "64 keys",
        lambda c: _rows(c, keys=3, values=2),
        lambda c: c.T // 64,
        KEY_LENGTHS,
        causal=True,
    ),
    Kernel("hype_attention_decode_split_kernel", "block", lambda c: _rows(c, values=2)),
)

# Published times. Gated delta rule: FlashQLA's README, H200, against FlashInfer 0.6.13 (without sequence split) and fla
# 0.5.1. Attention: FlashAttention-3 (arXiv 2407.08608), H100, converted from TFLOP/s at head dimension 128, causal;
# approximate for the backward.
CASES = (
    Case(
        "GDN fwd 4 x 8192",
        "chunk_gated_delta_rule",
        4,
        8192,
        16,
        32,
        peers={"FlashInfer": 0.425, "FlashQLA": 0.611, "fla": 1.898},
    ),
    Case(
        "GDN fwd 1 x 32768",
        "chunk_gated_delta_rule",
        1,
        32768,
        16,
        32,
        peers={"FlashQLA": 0.877, "FlashInfer": 1.550, "fla": 1.890},
    ),
    Case(
        "GDN fwd 1 x 8192",
        "chunk_gated_delta_rule",
        1,
        8192,
        16,
        32,
        peers={"FlashQLA": 0.280, "FlashInfer": 0.394, "fla": 0.472},
    ),
    Case("GDN bwd 4 x 8192", "chunk_gated_delta_rule", 4, 8192, 16, 32, True),
    Case("GDN bwd 1 x 32768", "chunk_gated_delta_rule", 1, 32768, 16, 32, True, {"FlashQLA": 2.515, "fla": 5.697}),
    Case("GLA fwd 4 x 8192", "chunk_simple_gla", 4, 8192, 32, 32),
    Case("GLA fwd 1 x 32768", "chunk_simple_gla", 1, 32768, 32, 32),
    Case("GLA bwd 4 x 8192", "chunk_simple_gla", 4, 8192, 32, 32, True),
    Case("HyPE fwd 1 x 8192", "hype_attention", 1, 8192, 32, 8, peers={"FA2": 1.65, "cuDNN": 1.04, "FA3": 0.91}),
    Case("HyPE bwd 1 x 8192", "hype_attention", 1, 8192, 32, 8, True, {"FA2": 4.7, "FA3": 3.0}),
    Case("HyPE decode 1 x 131072", "hype_attention_decode", 1, 131072, 32, 8),
)
FLASH_ATTENTION_2 = 333  # TFLOP/s measured: HyPE's forward is its design (arXiv 2407.08608, H100, causal, D = 128, 8k)


def inputs(case: Case) -> tuple[Callable[[], object], dict[int, int]]:
    """Return a call of the op, whose tensors are never touched, and the integers in them that decide control flow."""
    B, T, H, HV = case.B, case.T, case.H, case.HV
    if case.op == "hype_attention_decode":
        q = torch.empty(B, 1, H, D, dtype=DTYPE)
        k, v = (torch.empty(B, T, HV, D, dtype=DTYPE) for _ in range(2))
        lengths = torch.full((B,), T, dtype=torch.int32)
        words = {lengths.data_ptr() + 4 * i: T for i in range(B)}
        return lambda: kernels.hype_attention_decode(q, k, v, lengths), words
    q, v = torch.empty(B, T, H, K, dtype=DTYPE), torch.empty(B, T, HV, V, dtype=DTYPE)
    k = torch.empty_like(v if case.op == "hype_attention" else q)
    tensors = [q, k, v]
    if case.op != "hype_attention":
        tensors += [torch.empty(B, T, HV) for _ in range(2 if case.op == "chunk_gated_delta_rule" else 1)]
    op = getattr(kernels, case.op)
    if not case.backward:
        return lambda: op(*tensors), {}

    def run() -> None:
        leaves = [x.detach().requires_grad_() for x in tensors]
        o = op(*leaves)
        o = o[0] if isinstance(o, tuple) else o
        torch.autograd.grad(o, leaves, torch.empty_like(o))

    return run, {}
