"""Tests every op against its reference, on the devices and in the types that it takes."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import hypenet_kernels as kernels
from hypenet_kernels import _native, reference

Values = dict[str, Tensor]
Run = Callable[[Values], Any]

# Relative RMS errors that no correct kernel comes near and no wrong one stays below; tests/ hold kernels to far less.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
SEQUENCE = ("q", "k", "v", "g")


def run(device: str) -> Iterator[bool]:
    """Run every op on `device`, in every dtype it takes; print a line about each and yield whether it is right."""
    on_cuda = _native.on_cuda(torch.empty(0, device=device))
    for op, (compute, expect, gradients) in CASES.items():
        for dtype, bound in BOUNDS.items():
            if on_cuda and dtype not in _native.CUDA_OPS.get(op, ()):
                continue
            differentiated = gradients if not on_cuda or dtype in _native.HALF else ()  # CUDA has no float32 backward
            given = {name: x.to(device) for name, x in _inputs(dtype).items()}
            exact = {name: x.double() if x.is_floating_point() else x for name, x in _inputs(dtype).items()}
            try:
                error = _error(_outputs(compute, given, differentiated), _outputs(expect, exact, differentiated))
                passed, found = error <= bound, f"error {error:.1e} (at most {bound:.0e})"
            except RuntimeError as raised:
                passed, found = False, f"raised {raised}"
            print(f"  {'ok  ' if passed else 'FAIL'} {op:33} {device:5} {str(dtype).removeprefix('torch.'):9} {found}")
            yield passed


def _inputs(dtype: torch.dtype) -> Values:
    B, T, H, HV, K = 2, 37, 2, 4, 16
    random = torch.Generator().manual_seed(0)
    inputs = {
        name: torch.randn(B, T, heads, K, generator=random) for name, heads in zip("qkv", (H, H, HV), strict=True)
    }
    inputs = {name: (x / x.norm(dim=-1, keepdim=True)).to(dtype) for name, x in inputs.items()}
    inputs |= {name: torch.rand(B, T, HV, generator=random) for name in ("g", "beta")}
    inputs["g"] = inputs["g"].log()
    inputs["state"] = torch.randn(B, HV, K, K, generator=random)
    inputs |= {name: torch.randn(B, T, HV, K, generator=random).to(dtype) for name in ("query", "gate")}
    inputs["signal"] = torch.randn(B, T, K, generator=random).to(dtype).transpose(1, 2)
    inputs["angles"] = torch.randn(1, T, K, generator=random)
    inputs["norm"] = torch.randn(K, generator=random).to(dtype)
    inputs["taps"] = torch.randn(K, 4, generator=random).to(dtype)
    return inputs | {"lengths": torch.tensor([11, T - 3])}


def _outputs(function: Run, inputs: Values, differentiated: tuple[str, ...]) -> tuple[Tensor, ...]:
    """Return what the function returns, and the gradients of a weighted sum of it."""
    leaves = {name: inputs[name].clone().requires_grad_() for name in differentiated}
    outputs = function(inputs | leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if not leaves:
        return outputs
    loss = sum((x.double() * torch.arange(x.numel(), device=x.device).view(x.shape).cos()).sum() for x in outputs)
    return *outputs, *torch.autograd.grad(loss, list(leaves.values()))


def _error(results: tuple[Tensor, ...], references: tuple[Tensor, ...]) -> float:
    pairs = zip(results, references, strict=True)
    ratios = [((x.detach().cpu().double() - y).norm() / y.norm()).item() for x, y in pairs]
    return max(ratios, key=lambda ratio: float("inf") if ratio != ratio else ratio)


def _delta(op: Callable[..., Any]) -> Run:
    names = (*SEQUENCE, "beta")
    return lambda x: op(**{name: x[name] for name in names}, initial_state=x["state"], output_final_state=True)


def _gla(op: Callable[..., Any]) -> Run:
    return lambda x: op(**{name: x[name] for name in SEQUENCE}, initial_state=x["state"], output_final_state=True)


def _step(op: Callable[..., Any], names: tuple[str, ...]) -> Run:
    def run(x: Values) -> Any:
        state = x["state"].clone()
        return op(*(x[name] for name in names), state), state

    return run


def _commit(op: Callable[..., Any]) -> Run:
    def run(x: Values) -> Any:
        state = x["state"].clone()
        op(state, torch.stack([2 * state, 3 * state], dim=1), torch.tensor([2, 1], device=state.device))
        return state

    return run


def _convolve(x: Values) -> Any:
    return kernels.causal_conv1d_fn(x["signal"], x["taps"], activation="silu", return_final_states=True)


def _convolve_exactly(x: Values) -> Any:
    return reference.causal_conv1d_fn(x["signal"], x["taps"], activation="silu")


def _convolve_token_by_token(x: Values) -> Any:
    signal, taps = x["signal"], x["taps"]
    window = signal.new_zeros(*signal.shape[:2], taps.shape[1] - 1)
    steps = [kernels.causal_conv1d_update(token, window, taps, activation="silu") for token in signal.unbind(2)]
    return torch.stack(steps, dim=2), window


def _normalize(op: Callable[..., Any]) -> Run:
    return lambda x: op(x["query"], x["norm"], x["angles"].cos(), x["angles"].sin())


def _attention(op: Callable[..., Any]) -> Run:
    options = {"logit_scale_base": 100.0}
    return lambda x: op(x["query"], x["k"], x["v"][:, :, ::2], gate=x["gate"], **options)


def _decode(op: Callable[..., Any]) -> Run:
    def run(x: Values) -> Any:
        k_cache, v_cache, last = x["k"].clone(), x["v"][:, :, ::2].clone(), slice(0, 3)
        appended = {"k": x["k"][:, last], "v": x["v"][:, last, ::2]}
        o = op(x["query"][:, last], k_cache, v_cache, x["lengths"], **appended, logit_scale_base=100.0)
        return o, k_cache, v_cache

    return run


DELTA_GRADIENTS = (*SEQUENCE, "beta", "state")
GLA_GRADIENTS = (*SEQUENCE, "state")
CASES: dict[str, tuple[Run, Run, tuple[str, ...]]] = {
    "chunk_gated_delta_rule": (
        _delta(kernels.chunk_gated_delta_rule),
        _delta(reference.chunk_gated_delta_rule),
        DELTA_GRADIENTS,
    ),
    "fused_recurrent_gated_delta_rule": (
        _delta(kernels.fused_recurrent_gated_delta_rule),
        _delta(reference.chunk_gated_delta_rule),
        DELTA_GRADIENTS,
    ),
    "gated_delta_step": (
        _step(kernels.gated_delta_step, (*SEQUENCE, "beta")),
        _delta(reference.chunk_gated_delta_rule),
        (),
    ),
    "chunk_simple_gla": (_gla(kernels.chunk_simple_gla), _gla(reference.chunk_simple_gla), GLA_GRADIENTS),
    "fused_recurrent_simple_gla": (
        _gla(kernels.fused_recurrent_simple_gla),
        _gla(reference.chunk_simple_gla),
        GLA_GRADIENTS,
    ),
    "simple_gla_step": (_step(kernels.simple_gla_step, SEQUENCE), _gla(reference.chunk_simple_gla), ()),
    "hype_attention": (
        _attention(kernels.hype_attention),
        _attention(reference.hype_attention),
        ("query", "k", "v", "gate"),
    ),
    "commit_states": (_commit(kernels.commit_states), _commit(reference.commit_states), ()),
    "causal_conv1d_fn": (_convolve, _convolve_exactly, ("signal", "taps")),
    "causal_conv1d_update": (_convolve_token_by_token, _convolve_exactly, ()),
    "rms_norm_rope": (_normalize(kernels.rms_norm_rope), _normalize(reference.rms_norm_rope), ("query", "norm")),
    "rms_norm_gated": (
        lambda x: kernels.rms_norm_gated(x["query"], x["gate"], x["norm"]),
        lambda x: reference.rms_norm_gated(x["query"], x["gate"], x["norm"]),
        ("query", "gate", "norm"),
    ),
    "add_rms_norm": (
        lambda x: kernels.add_rms_norm(x["query"], x["gate"], x["norm"]),
        lambda x: reference.add_rms_norm(x["query"], x["gate"], x["norm"]),
        ("query", "gate", "norm"),
    ),
    "swiglu": (
        lambda x: kernels.swiglu(x["query"], x["gate"]),
        lambda x: reference.swiglu(x["query"], x["gate"]),
        ("query", "gate"),
    ),
    "hype_attention_decode": (_decode(kernels.hype_attention_decode), _decode(reference.hype_attention_decode), ()),
}
