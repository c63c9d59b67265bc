"""Other implementations of the ops, to compare ours with. Each is an optional import, none a dependency.

A peer takes a case and its tensors and returns a callable with the same results as ours, or None if it does not
implement the case. It raises ModuleNotFoundError if its package is not installed.
"""

import contextlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from itertools import cycle

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import cases
from bench.cases import Case, Run, Tensors

Peer = Callable[[Case, Tensors], Run | None]
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def transformers_fallback(case: Case, x: Tensors) -> Run | None:
    """The PyTorch fallback of transformers, used when no kernel package is installed."""
    from transformers.models.qwen3_next import modeling_qwen3_next as modeling
    from transformers.utils import logging

    logging.set_verbosity_error()  # silences the warning that the fallback is slow
    if case.op == "chunk_gated_delta_rule":
        rule = modeling.torch_chunk_gated_delta_rule
        repeat = x["v"].shape[2] // x["q"].shape[2]

        def forward(t: Tensors) -> tuple[torch.Tensor, ...]:
            q, k = (t[name].repeat_interleave(repeat, dim=2) if repeat > 1 else t[name] for name in ("q", "k"))
            return rule(q, k, t["v"], g=t["g"], beta=t["beta"])

        return cases.runner(case, forward, x, ("q", "k", "v", "g", "beta"))
    if case.op == "gated_delta_step":
        repeat, next_states = x["v"].shape[2] // x["q"].shape[2], cycle(x["states"])
        q, k = (x[name].repeat_interleave(repeat, dim=2) for name in ("q", "k"))

        @torch.no_grad()
        def run() -> tuple[torch.Tensor, ...]:
            rule = modeling.torch_recurrent_gated_delta_rule
            state = {"initial_state": next(next_states), "output_final_state": True}
            return (rule(q, k, x["v"], g=x["g"], beta=x["beta"], **state)[0],)

        return run
    return None


def ggml(case: Case, x: Tensors) -> Run | None:
    """ggml's CPU op; float32, forward only."""
    from bench.ggml import GatedDeltaNet

    fits = x["q"].device.type == "cpu" and case.dtype == "float32" and not case.backward
    if case.op not in ("chunk_gated_delta_rule", "gated_delta_step") or not fits:
        return None
    # ggml copies its inputs: to rotate through the states as ours does, use one graph per state.
    states = x.get("states", [None])
    nets = [GatedDeltaNet(x["q"], x["k"], x["v"], x["g"], x["beta"], state) for state in states]
    next_nets = cycle(nets)

    def run() -> tuple[torch.Tensor, ...]:
        net = next(next_nets)
        net.run()
        return (net.o,)

    return run


def torch_sdpa(case: Case, x: Tensors, backend: str | None = None) -> Run | None:
    """torch's scaled_dot_product_attention, with logit scale and output gate in eager torch around it."""
    on_cpu = x["q"].device.type == "cpu"
    if "k_cache" in x:
        B, _, H, D = x["q"].shape
        HK, next_caches = x["k_cache"].shape[2], cycle(x["caches"])
        grouped = x["q"].view(B, HK, H // HK, D)  # a group's heads as queries of one head: exact for a single token

        @torch.no_grad()
        def run() -> tuple[torch.Tensor, ...]:
            k, v = (cache.transpose(1, 2) for cache in next(next_caches))
            with _sdpa_backend(backend):
                return (F.scaled_dot_product_attention(grouped, k, v).reshape(B, 1, H, D),)

        return run

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if on_cpu:  # faster than enable_gqa there
            k, v = (y.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for y in (k, v))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        with _sdpa_backend(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not on_cpu).transpose(1, 2)

    return _hype_around(attend, case, x)


def _sdpa_backend(backend: str | None) -> AbstractContextManager[None]:
    """Force an SDPA backend by name (torch raises if it cannot run the inputs); None leaves the choice to torch."""
    if backend is None:
        return contextlib.nullcontext()
    return sdpa_kernel(getattr(SDPBackend, backend))


def _hype_around(attend: Attention, case: Case, x: Tensors) -> Run | None:
    """Build hype_attention from a plain causal attention; return None for other ops."""
    if case.op != "hype_attention":
        return None
    positions = torch.arange(x["q"].shape[1], device=x["q"].device, dtype=torch.float32)
    scale = ((positions + cases.LOGIT_SCALE_BASE).log() / math.log(cases.LOGIT_SCALE_BASE))[:, None, None]

    def forward(t: Tensors) -> tuple[torch.Tensor, ...]:
        if "gate" not in t:
            return (attend(t["q"], t["k"], t["v"]),)
        q = (t["q"].float() * scale).to(t["q"].dtype)
        return (attend(q, t["k"], t["v"]) * t["gate"].sigmoid(),)

    return cases.runner(case, forward, x, ("q", "k", "v", "gate") if "gate" in x else ("q", "k", "v"))


def _on_cuda(peer: Peer) -> Peer:
    """Restrict a peer to CUDA tensors, so that elsewhere its package is not even imported."""

    def on_cuda(case: Case, x: Tensors) -> Run | None:
        return peer(case, x) if x["q"].device.type == "cuda" else None

    return on_cuda


def flash_linear_attention(case: Case, x: Tensors) -> Run | None:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
    from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla

    if case.op == "chunk_gated_delta_rule":
        forward = lambda t: chunk_gated_delta_rule(t["q"], t["k"], t["v"], t["g"], t["beta"])  # noqa: E731
        return cases.runner(case, forward, x, ("q", "k", "v", "g", "beta"))
    if case.op == "chunk_simple_gla":
        forward = lambda t: chunk_simple_gla(t["q"], t["k"], t["v"], t["g"])  # noqa: E731
        return cases.runner(case, forward, x, ("q", "k", "v", "g"))
    if case.op in ("gated_delta_step", "simple_gla_step"):
        next_states = cycle(x["states"])

        @torch.no_grad()
        def run() -> tuple[torch.Tensor, ...]:
            state = {"initial_state": next(next_states), "output_final_state": True}
            if case.op == "simple_gla_step":
                return (fused_recurrent_simple_gla(x["q"], x["k"], x["v"], x["g"], **state)[0],)
            gates = {"g": x["g"], "beta": x["beta"]}
            return (fused_recurrent_gated_delta_rule(x["q"], x["k"], x["v"], **gates, **state)[0],)

        return run
    return None


def flash_qla(case: Case, x: Tensors) -> Run | None:
    from flash_qla import chunk_gated_delta_rule

    if case.op != "chunk_gated_delta_rule":
        return None
    forward = lambda t: chunk_gated_delta_rule(t["q"], t["k"], t["v"], t["g"], t["beta"])  # noqa: E731
    return cases.runner(case, forward, x, ("q", "k", "v", "g", "beta"))


def flashinfer(case: Case, x: Tensors) -> Run | None:
    """FlashInfer; forward only, on packed sequences, with the decay instead of its logarithm."""
    if case.op == "gated_delta_step":
        return _flashinfer_step(x)
    if case.op != "chunk_gated_delta_rule" or case.backward:
        return None
    from flashinfer.gdn_prefill import chunk_gated_delta_rule

    B, T = x["q"].shape[:2]
    q, k, v, g, beta = (x[name].flatten(0, 1) for name in ("q", "k", "v", "g", "beta"))
    alpha, bounds = g.exp(), torch.arange(0, (B + 1) * T, T, device=q.device, dtype=torch.int64)

    def run() -> tuple[torch.Tensor, ...]:
        o = chunk_gated_delta_rule(q, k, v, alpha, beta, cu_seqlens=bounds)
        o = o[0] if isinstance(o, tuple) else o
        return (o.view(x["v"].shape),)

    return run


def _flashinfer_step(x: Tensors) -> Run:
    """FlashInfer's decode step, which takes raw gates: g = -exp(A_log) softplus(a + dt_bias), beta = sigmoid(b)."""
    from flashinfer.gdn_decode import gated_delta_rule_decode

    A_log = dt_bias = torch.zeros(x["v"].shape[2], device=x["v"].device)
    a, b = (-x["g"]).expm1().log().to(x["q"].dtype), x["beta"].logit().to(x["q"].dtype)
    next_states = cycle(x["states"])

    def run() -> tuple[torch.Tensor, ...]:
        inputs = (x["q"], x["k"], x["v"], next(next_states), A_log, a, dt_bias, b)
        return (gated_delta_rule_decode(*inputs, use_qk_l2norm=False)[0],)

    return run


def flash_attention(case: Case, x: Tensors) -> Run | None:
    """The flash-attn package, with logit scale and output gate around it as for SDPA."""
    from flash_attn import flash_attn_func, flash_attn_with_kvcache

    if case.op == "hype_attention_decode":
        next_caches = cycle(x["caches"])
        return lambda: (flash_attn_with_kvcache(x["q"], *next(next_caches)),)
    return _hype_around(partial(flash_attn_func, causal=True), case, x)


PEERS: dict[str, Peer] = {
    "transformers": transformers_fallback,
    "ggml": ggml,
    "torch SDPA": torch_sdpa,
    "torch SDPA, flash": _on_cuda(partial(torch_sdpa, backend="FLASH_ATTENTION")),
    "torch SDPA, cuDNN": _on_cuda(partial(torch_sdpa, backend="CUDNN_ATTENTION")),
    "flash-linear-attention": _on_cuda(flash_linear_attention),
    "FlashQLA": _on_cuda(flash_qla),
    "FlashInfer": _on_cuda(flashinfer),
    "flash-attn": _on_cuda(flash_attention),
}
