"""What is measured: model shapes, not test shapes. A case knows its tensors, how to run ours, and what the work costs.

FLOPs and bytes are those of the mathematics: products once, triangles as triangles, every input read and every output
written once. What an implementation does beyond them lowers its fraction of the roof.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle

import torch
import torch.nn.functional as F

import hypenet_kernels as kernels

LOGIT_SCALE_BASE = 500.0
# Copies of what a decode step reads, together larger than any processor's cache, unless a case says `cached`: the same
# again.
ROTATED_BYTES = 256 * 2**20
# Of the case on which an op is held to its reference: past a chunk, past the split of a sequence, past one of the keys.
GATE_TOKENS, GATE_SPLIT_TOKENS, GATE_KEYS = 70, 2100, 1000


@dataclass(frozen=True)
class Case:
    """One op at one shape. `sizes` in the letters of the ops; `quick`: part of the run that takes under a minute."""

    op: str
    sizes: dict
    dtype: str = "float32"
    backward: bool = False
    quick: bool = False

    @property
    def name(self):
        sizes = " ".join(f"{letter}={size}" for letter, size in self.sizes.items())
        return f"{self.op} {'fwd+bwd' if self.backward else 'fwd'} {sizes} {self.dtype}"

    @property
    def itemsize(self):
        return getattr(torch, self.dtype).itemsize


@dataclass
class Workload:
    """A case on a device. `run` and every peer return the tensors that must agree with each other's.

    `names`: the tensors whose gradients a case with backward returns. `options`: further arguments of the op.
    """

    tensors: dict
    run: Callable
    flops: float
    bytes: float
    names: tuple = ()
    options: dict = field(default_factory=dict)


def build(case, device):
    """The tensors of a case, seeded, and how to run it."""
    torch.manual_seed(0)
    return BUILDERS[case.op](case, torch.device(device))


def gate(case):
    """The case in small, for the float64 reference: its head dimensions, groups of heads and options."""
    s = case.sizes
    split, group = s.get("split", 0), s["H"] // s["HK"] if "HK" in s else s.get("HV", s["H"]) // s["H"]
    small = {
        "B": 1 if split else 2,
        "T": GATE_SPLIT_TOKENS if split else GATE_TOKENS,
        "S": GATE_KEYS,
        "H": 2 * group if "HK" in s else 2,
        "HK": 2,
        "HV": 2 * group,
    }
    sizes = {name: small.get(name, size) for name, size in s.items()}
    return replace(case, sizes=sizes if "T" in s else sizes | {"cached": 1}, quick=False)


def runner(case, forward, tensors, names):
    """What a case times of `forward`, which takes the dict of tensors and returns o first.

    Forward only: a call that returns (o,). With backward: one that returns the gradients of `names`.
    """
    if not case.backward:

        @torch.no_grad()
        def run():
            return (forward(tensors)[0],)

        return run
    leaves = {name: tensors[name].detach().requires_grad_() for name in names}
    inputs = tensors | leaves
    o = forward(inputs)[0]
    torch.manual_seed(1)
    do = torch.randn(o.shape, device=o.device).to(o.dtype)
    return lambda: torch.autograd.grad(forward(inputs)[0], list(leaves.values()), do)


# ---- gated delta rule, simple GLA


def _recurrence_tensors(case, device, T):
    s, dtype = case.sizes, getattr(torch, case.dtype)
    B, H, HV, K, V = s["B"], s["H"], s.get("HV", s["H"]), s["K"], s["V"]
    q, k = (F.normalize(torch.randn(B, T, H, K, device=device), dim=-1).to(dtype) for _ in range(2))
    v = torch.randn(B, T, HV, V, device=device).to(dtype)
    g = F.logsigmoid(torch.randn(B, T, HV, device=device) + 3)
    beta = torch.rand(B, T, HV, device=device)
    return {"q": q, "k": k, "v": v, "g": g, "beta": beta}


def chunk_flops(sizes, chunk, delta, backward):
    """Of the chunk form: products with the state, and within a chunk the lower triangles. In the backward of the delta
    rule one of these products, of the symmetric gradient of K K^T, is a whole square."""
    B, T, HV, K, V = sizes["B"], sizes["T"], sizes.get("HV", sizes["H"]), sizes["K"], sizes["V"]
    state, triangle = K * V, chunk / 2
    forward = (3 if delta else 2) * state + triangle * ((2 if delta else 1) * (K + V))
    reverse = (7 if delta else 4) * state + triangle * ((6 if delta else 3) * K + (5 if delta else 2) * V)
    return 2.0 * B * T * HV * (forward + (reverse if backward else 0))


def _chunk_length(device, sizes):
    """Tokens of a chunk: csrc/cpu/gated_delta_chunk.h, and 64 on CUDA."""
    return 64 if device.type == "cuda" else 32 if sizes["K"] + sizes["V"] >= 128 else 16


def _recurrence_bytes(case, T, delta):
    s = case.sizes
    B, H, HV, K, V = s["B"], s["H"], s.get("HV", s["H"]), s["K"], s["V"]
    inputs = case.itemsize * B * T * (2 * H * K + HV * V) + 4 * B * T * HV * (2 if delta else 1)
    outputs = case.itemsize * B * T * HV * V
    # The backward reads the inputs and do, and writes a gradient for every input.
    return inputs + outputs + (2 * inputs + outputs if case.backward else 0)


def _chunk(case, device, delta):
    x = _recurrence_tensors(case, device, case.sizes["T"])
    names = ("q", "k", "v", "g", "beta") if delta else ("q", "k", "v", "g")
    op = kernels.chunk_gated_delta_rule if delta else kernels.chunk_simple_gla
    options = {"split_sequence": True} if case.sizes.get("split", 0) else {}
    forward = lambda t: op(*(t[name] for name in names), **options)  # noqa: E731
    flops = chunk_flops(case.sizes, _chunk_length(device, case.sizes), delta, case.backward)
    size = _recurrence_bytes(case, case.sizes["T"], delta)
    return Workload(x, runner(case, forward, x, names), flops, size, names)


def _step(case, device, delta):
    s = case.sizes
    B, HV, K, V = s["B"], s.get("HV", s["H"]), s["K"], s["V"]
    x = _recurrence_tensors(case, device, 1)
    state_bytes = 4 * B * HV * K * V
    states = [torch.randn(B, HV, K, V, device=device) for _ in range(_num_copies(s, state_bytes))]
    x["states"] = states
    turns = cycle(states)

    def run():
        state = next(turns)
        if delta:
            return (kernels.gated_delta_step(x["q"], x["k"], x["v"], x["g"], x["beta"], state),)
        return (kernels.simple_gla_step(x["q"], x["k"], x["v"], x["g"], state),)

    # Decay, S^T k for the delta rule, the update, S^T q.
    flops = (7.0 if delta else 5.0) * B * HV * K * V
    return Workload(x, run, flops, 2.0 * state_bytes + _recurrence_bytes(case, 1, delta))


def _num_copies(sizes, num_bytes):
    return 1 if sizes.get("cached", 0) else max(1, ROTATED_BYTES // num_bytes)


# ---- HyPE attention


def _attention(case, device):
    s, dtype = case.sizes, getattr(torch, case.dtype)
    B, T, H, HK, D = s["B"], s["T"], s["H"], s["HK"], s["D"]
    x = {"q": torch.randn(B, T, H, D, device=device).to(dtype)}
    x |= {name: torch.randn(B, T, HK, D, device=device).to(dtype) for name in ("k", "v")}
    options = {}
    names = ("q", "k", "v")
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


def _attention_decode(case, device):
    s, dtype = case.sizes, getattr(torch, case.dtype)
    B, S, H, HK, D = s["B"], s["S"], s["H"], s["HK"], s["D"]
    x = {"q": torch.randn(B, 1, H, D, device=device).to(dtype)}
    x |= {name: torch.randn(B, S, HK, D, device=device).to(dtype) for name in ("k_cache", "v_cache")}
    x["cache_seqlens"] = torch.full((B,), S, device=device)
    cache_bytes = 2 * B * S * HK * D * case.itemsize
    copies = range(_num_copies(s, cache_bytes) - 1)
    x["caches"] = [(x["k_cache"], x["v_cache"]), *((x["k_cache"].clone(), x["v_cache"].clone()) for _ in copies)]
    turns = cycle(x["caches"])

    def run():
        return (kernels.hype_attention_decode(x["q"], *next(turns), x["cache_seqlens"]),)

    return Workload(x, run, 4.0 * B * H * S * D, cache_bytes + 2 * x["q"].nbytes)


BUILDERS = {
    "chunk_gated_delta_rule": partial(_chunk, delta=True),
    "chunk_simple_gla": partial(_chunk, delta=False),
    "gated_delta_step": partial(_step, delta=True),
    "simple_gla_step": partial(_step, delta=False),
    "hype_attention": _attention,
    "hype_attention_decode": _attention_decode,
}


def _cpu_cases():
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
        cases += [Case("hype_attention", {"B": 1, "T": T, **attention}, backward=b, quick=T == 1024) for b in (0, 1)]
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


def _cuda_cases():
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
