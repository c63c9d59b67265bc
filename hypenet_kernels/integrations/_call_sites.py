"""Functions with the signatures that transformers' recurrent layers call, computed by hypenet_kernels' ops.

Each factory takes a `Site` and returns the function to put there. Keywords that arrive only because a caller passed
them to `model.forward` are dropped (the ops accept no unknown argument); those that name packed documents never are.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import hypenet_kernels
from hypenet_kernels.integrations import _packing

logger = logging.getLogger("hypenet_kernels")
# Activations of the convolution: the name in transformers -> the name in hypenet_kernels.
_ACTIVATIONS: dict[str | None, str | None] = {None: None, "silu": "silu", "swish": "silu"}


@dataclass(frozen=True)
class Site:
    """A function of a modeling file.

    Attributes:
        module: The modeling file.
        name: The function's name in it.
        original: The function that was there.
        partner: Name of the function of the same file that must keep packed documents apart as well, so that the layer
            does; "" where there is no such function, None where the layer cannot pack at all.
    """

    module: ModuleType
    name: str
    original: Callable[..., Any]
    partner: str | None

    def __str__(self) -> str:
        return f"{self.module.__name__}.{self.name}"

    def fall_back(self, reason: object, *args: Any, **kwargs: Any) -> Any:
        """Call the original function; say so, once for each reason."""
        _say_once(str(self), str(reason))
        return self.original(*args, **kwargs)

    def check_packing(self) -> None:
        """Raise ValueError unless the whole layer keeps packed documents apart."""
        if self.partner is None:
            raise ValueError(f"{self}: this layer cannot keep packed sequences apart; pass one sequence a row")
        if self.partner and not is_replacement(getattr(self.module, self.partner)):
            rule = f"needs {self.partner} to be replaced too for packed sequences"
            raise ValueError(f"{self}: {rule}; call patch_transformers without turning it off")


def is_replacement(function: Callable[..., Any]) -> bool:
    return hasattr(function, "hypenet_site")


def gated_delta_rule(site: Site, op: str = "chunk_gated_delta_rule") -> Callable[..., Any]:
    """Return the chunk form, torch_chunk_gated_delta_rule, or what else `op` computes of the same arguments."""

    def chunk_gated_delta_rule(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        chunk_size: int = 64,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        *,
        scale: float | None = None,
        cu_seqlens: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **ignored: Any,
    ) -> tuple[Tensor, Tensor | None]:
        tensors = query, key, value, g, beta
        if not on_supported_device(query):
            arguments = initial_state, output_final_state, use_qk_l2norm_in_kernel
            return _original_delta_rule(site, query.device.type, tensors, *arguments, cu_seqlens, seq_idx)
        shape = query.shape[:2]
        bounds = _document_bounds(site, shape, cu_seqlens, seq_idx, initial_state is not None or output_final_state)
        q, k, v, g, beta = (_flat(x, bounds) for x in tensors)
        try:
            o, final_state = getattr(hypenet_kernels, op)(
                q=q,
                k=k,
                v=v,
                g=g,
                beta=beta,
                scale=scale,
                initial_state=initial_state,
                output_final_state=output_final_state,
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
                cu_seqlens=bounds,
            )
        except NotImplementedError as error:
            arguments = initial_state, output_final_state, use_qk_l2norm_in_kernel
            return _original_delta_rule(site, error, tensors, *arguments, bounds, None)
        return o.reshape(*shape, *o.shape[2:]), final_state

    return chunk_gated_delta_rule


def gated_delta_step(site: Site) -> Callable[..., Any]:
    """Return the token by token form: torch_recurrent_gated_delta_rule.

    A step updates the state that it is given and returns it: the layer stores it back into the cache that it took it
    from, which then copies nothing. Where a gradient is wanted, or the op cannot update the state in place, the state
    is left alone and a new one returned.
    """
    whole = gated_delta_rule(site, "fused_recurrent_gated_delta_rule")

    def recurrent_gated_delta_rule(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        *,
        scale: float | None = None,
        cu_seqlens: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **ignored: Any,
    ) -> tuple[Tensor, Tensor | None]:
        B, T = query.shape[:2]
        tensors = query, key, value, g, beta
        steps = T == 1 and (cu_seqlens is None or cu_seqlens.shape[0] == B + 1)  # then every row is one document
        can_step = steps and output_final_state and _can_step(query, initial_state, *tensors)
        if initial_state is None or not can_step:
            return whole(
                *tensors,
                initial_state=initial_state,
                output_final_state=output_final_state,
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
                scale=scale,
                cu_seqlens=None if steps else cu_seqlens,
                seq_idx=None if steps else seq_idx,
            )
        try:
            o = hypenet_kernels.gated_delta_step(
                q=query,
                k=key,
                v=value,
                g=g,
                beta=beta,
                state=initial_state,
                scale=scale,
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            )
        except NotImplementedError as error:
            return _original_delta_rule(site, error, tensors, initial_state, True, use_qk_l2norm_in_kernel, None, None)
        return o, initial_state

    return recurrent_gated_delta_rule


def mamba2_scan(site: Site) -> Callable[..., Any]:
    """Return the chunk form of Mamba-2: mamba2_chunk_scan.

    y_t = C_t^T S_t + D x_t with S_t = e^{dt_t A} S_{t-1} + B_t (dt_t x_t)^T is simple gated linear attention with
    q = C, k = B, v = dt x and g = dt A (Mamba-2, arXiv 2405.21060, equation 1). transformers stores S as [P, N], here
    it is [N, P]: the states that are returned are transposed views.
    """

    def mamba2_chunk_scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int | None = None,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        *,
        z: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **ignored: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        def original(reason: object) -> Any:
            if z is not None:
                raise NotImplementedError(f"{site}: z must be None on {hidden_states.device.type}, got a tensor")
            return site.fall_back(
                reason,
                hidden_states,
                dt,
                A,
                B,
                C,
                chunk_size=chunk_size,
                D=D,
                dt_bias=dt_bias,
                initial_states=initial_states,
                dt_softplus=dt_softplus,
                dt_limit=dt_limit,
                return_final_states=return_final_states,
            )

        shape = hidden_states.shape[:2]
        cu_seqlens = cu_seq_lens_q if cu_seqlens is None else cu_seqlens
        has_cache = initial_states is not None or return_final_states
        bounds = _document_bounds(site, shape, cu_seqlens, seq_idx, has_cache)
        if not on_supported_device(hidden_states):
            if bounds is not None:
                raise NotImplementedError(f"{site}: packed sequences must be on cpu or cuda")
            return original(hidden_states.device.type)
        dt = _time_step(hidden_states, dt, dt_bias, dt_softplus).clamp(*dt_limit)
        v = (hidden_states * dt.unsqueeze(-1)).to(hidden_states.dtype)
        q, k, v, g = (_flat(x, bounds) for x in (C, B, v, dt * A))
        try:
            o, final_state = hypenet_kernels.chunk_simple_gla(
                q=q,
                k=k,
                v=v,
                g=g,
                scale=1.0,
                initial_state=None if initial_states is None else initial_states.transpose(-1, -2),
                output_final_state=return_final_states,
                cu_seqlens=bounds,
            )
        except NotImplementedError as error:
            if bounds is not None:
                raise
            return original(error)
        y = _skip_and_gate(o.reshape(hidden_states.shape), hidden_states, D, z)
        return (y, final_state.transpose(-1, -2)) if return_final_states else y

    return mamba2_chunk_scan


def mamba2_step(site: Site) -> Callable[..., Any]:
    """Return the step of Mamba-2: mamba2_selective_state_update, in place on the state [B, H, P, N].

    The state that `mamba2_scan` returned is [N, P] in memory, as the op reads it, and the cache keeps that layout; any
    other (of a cache that the original filled, or that beam search reordered) costs two copies.
    """

    def mamba2_selective_state_update(
        state: Tensor,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        z: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **ignored: Any,
    ) -> Tensor:
        cu_seqlens = cu_seq_lens_q if cu_seqlens is None else cu_seqlens
        if cu_seqlens is not None and cu_seqlens.shape[0] != hidden_states.shape[0] + 1:
            rule = f"name one sequence for each of the {hidden_states.shape[0]} states"
            raise ValueError(f"{site}: cu_seqlens must {rule}, got {cu_seqlens.shape[0] - 1}")
        expanded = [(dt, 1), (A, 2)] + [(x, 1) for x in (D, dt_bias) if x is not None]
        one_decay = all(_constant(x, dim) for x, dims in expanded for dim in range(-dims, 0))

        def original(reason: object) -> Any:
            return site.fall_back(
                reason, state, hidden_states, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=dt_softplus, z=z
            )

        if not one_decay or not on_supported_device(hidden_states):
            return original("a decay that is not one number a head" if not one_decay else hidden_states.device.type)
        x = hidden_states.unsqueeze(1)
        step = _time_step(x, dt[..., 0].unsqueeze(1), None if dt_bias is None else dt_bias[:, 0], dt_softplus)
        arguments: dict[str, Any] = {
            "q": C.unsqueeze(1),
            "k": B.unsqueeze(1),
            "v": (x * step.unsqueeze(-1)).to(x.dtype),
            "g": step * A[:, 0, 0],
            "scale": 1.0,
        }
        kv_state = state.transpose(-1, -2)
        try:
            if _can_step(x, kv_state, *arguments.values()):
                o = hypenet_kernels.simple_gla_step(**arguments, state=kv_state)
            else:
                o, new_state = hypenet_kernels.fused_recurrent_simple_gla(
                    **arguments, initial_state=kv_state, output_final_state=True
                )
                state.copy_(new_state.transpose(-1, -2))
        except NotImplementedError as error:
            return original(error)
        y = _skip_and_gate(o, x, None if D is None else D[:, 0], None if z is None else z.unsqueeze(1))
        return y.squeeze(1).to(hidden_states.dtype)

    return mamba2_selective_state_update


def mamba2_fused(site: Site) -> Callable[..., Any]:
    """Return None for mamba2_split_conv1d_scan_combined: the layer then calls the functions that are replaced."""

    def mamba2_split_conv1d_scan_combined(*args: Any, **kwargs: Any) -> None:
        return None

    return mamba2_split_conv1d_scan_combined


def causal_conv1d(site: Site) -> Callable[..., Any]:
    """Return the depthwise convolution over whole sequences: causal_conv1d_fn."""

    def causal_conv1d_fn(
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        *,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **ignored: Any,
    ) -> Tensor:
        B, _, T = hidden_states.shape
        cu_seqlens = cu_seq_lens_q if cu_seqlens is None else cu_seqlens
        packed = cu_seqlens is not None or seq_idx is not None
        reason = _unsupported_convolution(hidden_states, weight, activation)
        if packed:
            site.check_packing()
            if reason:
                raise NotImplementedError(f"{site}: packed sequences are not built for {reason}")
        if reason:
            return site.fall_back(reason, hidden_states, weight, bias, activation=activation)
        if cu_seqlens is not None and B > 1:
            seq_idx, cu_seqlens = _packing.document_of_token((B, T), cu_seqlens), None
        y = hypenet_kernels.causal_conv1d_fn(
            hidden_states.to(weight.dtype),
            weight,
            bias=bias,
            seq_idx=seq_idx if cu_seqlens is None else None,
            activation=_ACTIVATIONS[activation],
            cu_seqlens=cu_seqlens,
        )
        return y.to(hidden_states.dtype)

    return causal_conv1d_fn


def causal_conv1d_step(site: Site) -> Callable[..., Any]:
    """Return the convolution of a decoding step, in place on the cache's state: causal_conv1d_update."""

    def causal_conv1d_update(
        hidden_states: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **ignored: Any,
    ) -> Tensor:
        tensors = hidden_states, conv_state, weight, bias
        reason = _unsupported_convolution(hidden_states, weight, activation)
        if not reason and not (hidden_states.dtype == conv_state.dtype == weight.dtype):
            reason = "a state or weight of another dtype"
        if reason:
            return site.fall_back(reason, *tensors, activation=activation)
        if _wants_gradient(*tensors) or not conv_state.is_contiguous():
            return site.original(*tensors, activation=activation)
        return hypenet_kernels.causal_conv1d_update(
            hidden_states, conv_state, weight, bias=bias, activation=_ACTIVATIONS[activation]
        )

    return causal_conv1d_update


def _document_bounds(
    site: Site, shape: tuple[int, ...], cu_seqlens: Tensor | None, seq_idx: Tensor | None, has_cache: bool
) -> Tensor | None:
    bounds = _packing.bounds(shape, cu_seqlens, seq_idx)
    if bounds is None:
        return None
    site.check_packing()
    if has_cache and (shape[0] != 1 or bounds.shape[0] != 2):
        raise ValueError(f"{site}: use_cache must be False for packed sequences, got {bounds.shape[0] - 1} of them")
    return bounds


def _original_delta_rule(
    site: Site,
    reason: object,
    tensors: tuple[Tensor, ...],
    initial_state: Tensor | None,
    output_final_state: bool,
    use_qk_l2norm: bool,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
) -> Any:
    return site.fall_back(
        reason,
        *tensors[:3],
        g=tensors[3],
        beta=tensors[4],
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm,
        cu_seqlens=cu_seqlens,
        seq_idx=seq_idx,
    )


def _time_step(x: Tensor, dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool) -> Tensor:
    """Return dt [B, T, H] in the accumulation type of x."""
    dtype = _accumulator(x.dtype)
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    return F.softplus(dt) if dt_softplus else dt


def _skip_and_gate(o: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """Return o + D x, times silu(z), in the accumulation type; D: [H] or [H, P]."""
    dtype = _accumulator(x.dtype)
    y = o.to(dtype)
    if D is not None:
        y = y + x.to(dtype) * (D if D.ndim == 2 else D.unsqueeze(-1))
    return y if z is None else y * F.silu(z.to(dtype))


def _flat(x: Tensor, bounds: Tensor | None) -> Tensor:
    """Return [B, T, ...] as [1, B T, ...] where there are documents."""
    return x if bounds is None else x.flatten(0, 1).unsqueeze(0)


def _can_step(q: Tensor, state: Tensor | None, *inputs: Any) -> bool:
    """Return whether the ops can update `state` in place, and a caller would not miss the old one in a backward."""
    return (
        state is not None
        and on_supported_device(q)
        and state.device == q.device
        and state.dtype == _accumulator(q.dtype)
        and state.is_contiguous()
        and not _wants_gradient(state, *inputs)
    )


def _wants_gradient(*inputs: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def on_supported_device(x: Tensor) -> bool:
    return x.device.type in ("cpu", "cuda")


def _constant(x: Tensor, dim: int) -> bool:
    return x.shape[dim] == 1 or x.stride(dim) == 0


def _unsupported_convolution(x: Tensor, weight: Tensor, activation: str | None) -> str | None:
    """Return in words why the ops cannot compute this convolution, or None."""
    if not on_supported_device(x):
        return x.device.type
    if activation not in _ACTIVATIONS:
        return f"the activation {activation}"
    return None if 2 <= weight.shape[-1] <= 4 else f"a width of {weight.shape[-1]}"


_said: set[tuple[str, str]] = set()


def _say_once(site: str, reason: str) -> None:
    if (site, reason) not in _said and not torch.compiler.is_compiling():
        _said.add((site, reason))
        logger.warning("%s: the function of transformers runs in place of hypenet_kernels' for %s", site, reason)
