"""The benchmark cases: ops at model shapes, with their inputs, a call of our op, and the FLOPs and bytes of the work.

FLOPs and bytes are those of the mathematics: each product counted once, a triangular product as half of a square one,
every input read once and every output written once. Work beyond that lowers an implementation's fraction of the roof.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F

import hypenet_kernels as kernels

LOGIT_SCALE_BASE = 500.0
# A decode step rotates through copies of its state or KV cache that together exceed the processor's caches, so that
# every call reads from memory. A case with `cached=1` uses the same copy every time.
ROTATED_BYTES = 256 * 2**20
# Sizes of the copy of a case that is checked against the reference: more tokens than a chunk, than a segment of a split
# sequence, and more keys than one split of the decode kernel.
SHRUNK_TOKENS, SHRUNK_SPLIT_TOKENS, SHRUNK_KEYS = 70, 2100, 1000

Tensors = dict[str, Any]  # the inputs of a case by name; "states" and "caches" hold lists of copies
Run = Callable[[], tuple[torch.Tensor, ...]]
Forward = Callable[[Tensors], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    `sizes` maps the letters of the op's docstring (B, T, H, ...) to numbers, and the options `gated`, `cached` and
    `split` to 0 or 1. `quick`: the case is part of the selection that runs in under a minute.
    """

    op: str
    sizes: dict[str, int]
    dtype: str = "float32"
    backward: bool = False
    quick: bool = False

    @property
    def name(self) -> str:
        sizes = " ".join(f"{letter}={size}" for letter, size in self.sizes.items())
        return f"{self.op} {'fwd+bwd' if self.backward else 'fwd'} {sizes} {self.dtype}"

    @property
    def itemsize(self) -> int:
        """Bytes of one element of q, k and v."""
        return self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


@dataclass
class Workload:
    """A case on a device.

    `run` calls our op and returns its outputs, or the gradients of `names` for a case with a backward pass; a peer
    returns the same tensors. `options`: further keyword arguments of the op.
    """

    tensors: Tensors
    run: Run
    flops: float
    bytes: float
    names: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


def build(case: Case, device: str | torch.device) -> Workload:
    """Create the tensors of a case, from a fixed seed, and the call to time."""
    torch.manual_seed(0)
    return BUILDERS[case.op](case, torch.device(device))


def shrunk(case: Case) -> Case:
    """Return the case with few tokens and heads, small enough for the float64 reference.

    Head dimensions, the number of query heads per key head, and options are those of `case`.
    """
    s = case.sizes
    split, group = s.get("split", 0), s["H"] // s["HK"] if "HK" in s else s.get("HV", s["H"]) // s["H"]
    small = {
        "B": 1 if split else 2,
        "T": SHRUNK_SPLIT_TOKENS if split else SHRUNK_TOKENS,
        "S": SHRUNK_KEYS,
        "H": 2 * group if "HK" in s else 2,
        "HK": 2,
        "HV": 2 * group,
    }
    sizes = {name: small.get(name, size) for name, size in s.items()}
    return replace(case, sizes=sizes if "T" in s else sizes | {"cached": 1}, quick=False)


def runner(case: Case, forward: Forward, tensors: Tensors, names: tuple[str, ...]) -> Run:
    """Return the call that a case times.

    Args:
        forward: takes the tensors by name and returns (o, ...).
        names: the tensors to differentiate with respect to.

    Returns:
        A function without arguments that returns (o,), or for a case with a backward pass the gradients of `names`.
    """
    if not case.backward:

        @torch.no_grad()
        def run() -> tuple[torch.Tensor, ...]:
            return (forward(tensors)[0],)

        return run
    leaves = {name: tensors[name].detach().requires_grad_() for name in names}
    inputs = tensors | leaves
    o = forward(inputs)[0]
    torch.manual_seed(1)
    do = torch.randn(o.shape, device=o.device).to(o.dtype)
    return lambda: torch.autograd.grad(forward(inputs)[0], list(leaves.values()), do)


# ---- gated delta rule, simple GLA


def _recurrence_tensors(case: Case, device: torch.device, T: int) -> Tensors:
    s, dtype = case.sizes, case.torch_dtype
    B, H, HV, K, V = s["B"], s["H"], s.get("HV", s["H"]), s["K"], s["V"]
    q, k = (F.normalize(torch.randn(B, T, H, K, device=device), dim=-1).to(dtype) for _ in range(2))
    v = torch.randn(B, T, HV, V, device=device).to(dtype)
    g = F.logsigmoid(torch.randn(B, T, HV, device=device) + 3)
    beta = torch.rand(B, T, HV, device=device)
    return {"q": q, "k": k, "v": v, "g": g, "beta": beta}


def chunk_flops(sizes: dict[str, int], chunk: int, delta: bool, backward: bool) -> float:
    """Return the FLOPs of the chunk form: products with the state, and lower triangles within a chunk.

    In the backward pass of the delta rule, the product with the symmetric gradient of K K^T is a full square.
    """
    B, T, HV, K, V = sizes["B"], sizes["T"], sizes.get("HV", sizes["H"]), sizes["K"], sizes["V"]
    state, triangle = K * V, chunk / 2
    forward = (3 if delta else 2) * state + triangle * ((2 if delta else 1) * (K + V))
    reverse = (7 if delta else 4) * state + triangle * ((6 if delta else 3) * K + (5 if delta else 2) * V)
    return 2.0 * B * T * HV * (forward + (reverse if backward else 0))


def _chunk_length(device: torch.device, sizes: dict[str, int]) -> int:
    """Return the tokens per chunk: 64 on CUDA; on the CPU as chunk_length() in csrc/cpu chooses it."""
    return 64 if device.type == "cuda" else 32 if sizes["K"] + sizes["V"] >= 128 else 16


def _recurrence_bytes(case: Case, T: int, delta: bool) -> float:
    s = case.sizes
    B, H, HV, K, V = s["B"], s["H"], s.get("HV", s["H"]), s["K"], s["V"]
    inputs = case.itemsize * B * T * (2 * H * K + HV * V) + 4 * B * T * HV * (2 if delta else 1)
    outputs = case.itemsize * B * T * HV * V
    # The backward pass reads the inputs and do, and writes a gradient for every input.
    return inputs + outputs + (2 * inputs + outputs if case.backward else 0)


def _chunk(case: Case, device: torch.device, delta: bool) -> Workload:
    x = _recurrence_tensors(case, device, case.sizes["T"])
    names = ("q", "k", "v", "g", "beta") if delta else ("q", "k", "v", "g")
    op = kernels.chunk_gated_delta_rule if delta else kernels.chunk_simple_gla
    options: dict[str, Any] = {"split_sequence": True} if case.sizes.get("split", 0) else {}
    forward = lambda t: op(*(t[name] for name in names), **options)  # noqa: E731
    flops = chunk_flops(case.sizes, _chunk_length(device, case.sizes), delta, case.backward)
    size = _recurrence_bytes(case, case.sizes["T"], delta)
    return Workload(x, runner(case, forward, x, names), flops, size, names)


def _step(case: Case, device: torch.device, delta: bool) -> Workload:
    s = case.sizes
    B, HV, K, V = s["B"], s.get("HV", s["H"]), s["K"], s["V"]
    x = _recurrence_tensors(case, device, 1)
    state_bytes = 4 * B * HV * K * V
    states = [torch.randn(B, HV, K, V, device=device) for _ in range(_num_copies(s, state_bytes))]
    x["states"] = states
    next_states = cycle(states)

    def run() -> tuple[torch.Tensor, ...]:
        state = next(next_states)
        if delta:
            return (kernels.gated_delta_step(x["q"], x["k"], x["v"], x["g"], x["beta"], state),)
        return (kernels.simple_gla_step(x["q"], x["k"], x["v"], x["g"], state),)

    # Products: the decay, S^T k (delta rule only), the update, S^T q.
    flops = (7.0 if delta else 5.0) * B * HV * K * V
    return Workload(x, run, flops, 2.0 * state_bytes + _recurrence_bytes(case, 1, delta))


def _num_copies(sizes: dict[str, int], num_bytes: int) -> int:
    return 1 if sizes.get("cached", 0) else max(1, ROTATED_BYTES // num_bytes)


# ---- HyPE attention


def _attention(case: Case, device: torch.device) -> Workload:
    s, dtype = case.sizes, case.torch_dtype
    B, T, H, HK, D = s["B"], s["T"], s["H"], s["HK"], s["D"]
    x = {"q": torch.randn(B, T, H, D, device=device).to(dtype)}
    x |= {name: torch.randn(B, T, HK, D, device=device).to(dtype) for name in ("k", "v")}
    options: dict[str, Any] = {}
    names: tuple[str, ...] = ("q", "k", "v")
    if s.get("gated", 0):
        x["gate"] = torch.randn(B, T, H, D, device=device).to(dtype)
        options["logit_scale_base"] = LOGIT_SCALE_BASE
        names = (*names, "gate")
    forward = lambda t: (kernels.hype_attention(t["q"], t["k"], t["v"], gate=t.get("gate"), **options),)  # noqa: E731
    flops = 2.0 * B * H * T * T * D * (3.5 if case.backward else 1)
    output = case.itemsize * B * T * H * D
    inputs = output * (2 if "gate" in x else 1) + 2 * case.itemsize * B * T * HK * D
    size = inputs + output + (2 * inputs + output if case.backward else 0)
    return Workload(x, runner(case, forward, x, names), flops, size, names, options)


def _attention_decode(case: Case, device: torch.device) -> Workload:
    s, dtype = case.sizes, case.torch_dtype
    B, S, H, HK, D = s["B"], s["S"], s["H"], s["HK"], s["D"]
    x: Tensors = {"q": torch.randn(B, 1, H, D, device=device).to(dtype)}
    x |= {name: torch.randn(B, S, HK, D, device=device).to(dtype) for name in ("k_cache", "v_cache")}
    x["cache_seqlens"] = torch.full((B,), S, device=device)
    cache_bytes = 2 * B * S * HK * D * case.itemsize
    copies = range(_num_copies(s, cache_bytes) - 1)
    x["caches"] = [(x["k_cache"], x["v_cache"]), *((x["k_cache"].clone(), x["v_cache"].clone()) for _ in copies)]
    next_caches = cycle(x["caches"])

    def run() -> tuple[torch.Tensor, ...]:
        k_cache, v_cache = next(next_caches)
        return (kernels.hype_attention_decode(x["q"], k_cache, v_cache, x["cache_seqlens"]),)

    return Workload(x, run, 4.0 * B * H * S * D, cache_bytes + 2 * x["q"].nbytes)


BUILDERS: dict[str, Callable[[Case, torch.device], Workload]] = {
    "chunk_gated_delta_rule": partial(_chunk, delta=True),
    "chunk_simple_gla": partial(_chunk, delta=False),
    "gated_delta_step": partial(_step, delta=True),
    "simple_gla_step": partial(_step, delta=False),
    "hype_attention": _attention,
    "hype_attention_decode": _attention_decode,
}


def _cpu_cases() -> list[Case]:
    heads = {"H": 32, "K": 128, "V": 128}
    attention = {"H": 32, "HK": 8, "D": 128}
    cases = []
    for op in ("chunk_gated_delta_rule", "chunk_simple_gla"):
        for T in (1024, 4096):
            for backward in (False, True):
                cases.append(Case(op, {"B": 1, "T": T, **heads}, backward=backward, quick=T == 1024))
        cases.append(Case(op, {"B": 1, "T": 1024, **heads}, "bfloat16"))
        for T, K in ((16, 16), (128, 64)):
            for backward in (False, True):
                small = {"B": 1, "T": T, "H": 2, "K": K, "V": K}
                cases.append(Case(op, small, backward=backward, quick=T == 128))
    for op in ("gated_delta_step", "simple_gla_step"):
        cases += [Case(op, {"B": B, **heads}, quick=B == 16) for B in (1, 16)]
        cases.append(Case(op, {"B": 1, **heads, "cached": 1}))
    for T in (1024, 4096):
        cases += [
            Case("hype_attention", {"B": 1, "T": T, **attention}, backward=b, quick=T == 1024) for b in (False, True)
        ]
    for b in (False, True):
        cases.append(Case("hype_attention", {"B": 1, "T": 1024, **attention, "gated": 1}, backward=b))
        for T, D in ((16, 16), (128, 64)):
            small = {"B": 1, "T": T, "H": 2, "HK": 1, "D": D}
            cases += [Case("hype_attention", small | extra, backward=b) for extra in ({}, {"gated": 1})]
    cases.append(Case("hype_attention", {"B": 1, "T": 1024, **attention}, "bfloat16"))
    for dtype in ("float32", "bfloat16"):
        for B in (1, 8):
            quick = B == 1 and dtype == "float32"
            cases.append(Case("hype_attention_decode", {"B": B, "S": 32768, **attention}, dtype, quick=quick))
    return cases


def _cuda_cases() -> list[Case]:
    heads = {"H": 16, "HV": 32, "K": 128, "V": 128}
    attention = {"H": 32, "HK": 8, "D": 128}
    cases = []
    for op in ("chunk_gated_delta_rule", "chunk_simple_gla"):
        gla = {"H": 32, "K": 128, "V": 128} if op == "chunk_simple_gla" else heads
        for B, T in ((1, 8192), (4, 8192), (1, 32768)):
            for backward in (False, True):
                cases.append(Case(op, {"B": B, "T": T, **gla}, "bfloat16", backward, quick=(B, T) == (1, 8192)))
        few = {"B": 1, "T": 32768, "H": 8, "K": 128, "V": 128}
        for sizes in (few, few | {"split": 1}):
            cases += [Case(op, sizes, "bfloat16", backward) for backward in (False, True)]
    for op in ("gated_delta_step", "simple_gla_step"):
        for B in (1, 8, 32, 64, 128, 256):
            cases.append(Case(op, {"B": B, **heads}, "bfloat16", quick=B in (1, 64)))
    for T in (2048, 8192):
        for gated in (0, 1):
            for backward in (False, True):
                sizes = {"B": 1, "T": T, **attention, "gated": gated}
                cases.append(Case("hype_attention", sizes, "bfloat16", backward, quick=T == 2048))
    for B, S in ((1, 8192), (1, 32768), (1, 131072), (16, 32768)):
        sizes = {"B": B, "S": S, **attention}
        cases.append(Case("hype_attention_decode", sizes, "bfloat16", quick=S == 32768 and B == 1))
    return cases


CASES = {"cpu": _cpu_cases(), "cuda": _cuda_cases()}
