"""The short causal depthwise convolution of recurrent layers (Gated DeltaNet, Mamba2), and its decode form.

z_t = bias + sum_d weight_{W-1-d} x_{t-d},  d = 0 ... W-1        per channel; x before the sequence is its initial state
y_t = z_t, or silu(z_t)

Names, order and meaning of the arguments are those of the package causal-conv1d, with `cu_seqlens` added.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hypenet_kernels import _checks, _native, _ops

OP, UPDATE_OP = "causal_conv1d_fn", "causal_conv1d_update"
BLOCK = 64  # tokens: kConvBlock in csrc/params.h
ACTIVATIONS = {None: False, "silu": True, "swish": True}


class Inputs(NamedTuple):
    """The arguments of the forward op."""

    x: Tensor  # [B, T, C]
    weight: Tensor  # [C, W]
    bias: Tensor | None  # [C]
    initial_states: Tensor | None  # [N, W - 1, C] in x's dtype
    seq_idx: Tensor | None  # [B, T]
    cu_seqlens: Tensor | None  # [N + 1]
    silu: bool


class UpdateInputs(NamedTuple):
    """The arguments of the update op."""

    x: Tensor  # [B, T, C]
    conv_state: Tensor  # [slots, C, L]
    weight: Tensor  # [C, W]
    bias: Tensor | None  # [C]
    cache_seqlens: Tensor | None  # [B]
    conv_state_indices: Tensor | None  # [B]
    silu: bool


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """Convolve every channel of x with its own causal filter; packed sequences do not see each other.

    Differentiable once in x, weight, bias and initial_states, also through the final states.

    Args:
        x: [B, C, T], float64, float32, bfloat16 or float16 (on CUDA not float64). Channels next to each other in
            memory, as in the transpose of a [B, T, C] tensor, save a copy.
        weight: [C, W], W = 2, 3 or 4, of any float type, as bias.
        bias: [C].
        seq_idx: [B, T] int32 or int64, sequence of every token; a change of its value begins a new sequence, and where
            it is negative y is 0. Takes no states: how many sequences have one would depend on its values.
        initial_states: [N, C, W - 1] in x's dtype, inputs before each sequence; N = B, or the number of packed
            sequences. Default: zeros.
        return_final_states: whether to return the last W - 1 inputs of each sequence too.
        final_states_out: [N, C, W - 1] in x's dtype, where to write them too, without a gradient.
        activation: None, "silu" or "swish".
        cu_seqlens: [N + 1] int32 or int64, bounds of sequences packed along T (B = 1). Where it ends before T, y is 0.

    Returns:
        y [B, C, T] in x's dtype, its channels next to each other in memory; with return_final_states
        (y, final_states [N, C, W - 1]).

    Raises:
        TypeError: dtype. ValueError: shape, device, range, or arguments that exclude each other.

    Example:
        >>> import torch
        >>> x, weight = torch.randn(2, 100, 8).transpose(1, 2), torch.randn(8, 4)
        >>> causal_conv1d_fn(x, weight, activation="silu").shape
        torch.Size([2, 8, 100])
    """
    optional = {"bias": bias, "seq_idx": seq_idx, "initial_states": initial_states, "cu_seqlens": cu_seqlens}
    _checks.tensors(OP, {"x": x, "weight": weight}, optional | {"final_states_out": final_states_out})
    _checks.rank(OP, "x", x, "B C T")
    silu = _check(OP, x, weight, bias, activation)
    (B, C, T), W = x.shape, weight.shape[1]
    if seq_idx is not None:
        _check_seq_idx(seq_idx, (B, T), cu_seqlens, initial_states, return_final_states, final_states_out)
    N = B
    if cu_seqlens is not None:
        _checks.cu_seqlens(OP, cu_seqlens, x.transpose(1, 2), "x")
        N = cu_seqlens.shape[0] - 1
    if initial_states is not None:
        _checks.shape(OP, "initial_states", initial_states, (N, C, W - 1))
        _checks.dtype(OP, "initial_states", initial_states, (x.dtype,))
        initial_states = initial_states.mT
    rows = x.transpose(1, 2)
    inputs = Inputs(rows, weight, bias, initial_states, seq_idx, cu_seqlens, silu)
    if _checks.wants_gradient(*inputs[:4]):
        y = _differentiable(*inputs)[0].transpose(1, 2)
    else:
        y = _inference(*inputs).transpose(1, 2)
    if not return_final_states and final_states_out is None:
        return y
    final_states = _final_states(rows, initial_states, cu_seqlens, W).mT
    if final_states_out is not None:
        _checks.shape(OP, "final_states_out", final_states_out, final_states.shape)
        _checks.dtype(OP, "final_states_out", final_states_out, (x.dtype,))
        final_states_out.detach().copy_(final_states.detach())
    return (y, final_states) if return_final_states else y


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Convolve the next token, or tokens, of every sequence, and update its window of inputs in place.

    No gradient. Allocates y alone; on CUDA nothing is read on the host, so a graph can capture it.

    Args:
        x: [B, C] or [B, C, T] in conv_state's dtype, any strides.
        conv_state: [B, C, L], L >= W - 1, any strides: the last L inputs, newest last. With conv_state_indices a pool
            of any number of slots.
        weight, bias, activation: as in `causal_conv1d_fn`.
        cache_seqlens: [B] int32 or int64, how many inputs came before: conv_state is then a ring, whose entry i % L is
            input i.
        conv_state_indices: [B] int32 or int64, the slot of each sequence; negative: skip it, its y is 0.

    Returns:
        y of x's shape.

    Raises:
        As `causal_conv1d_fn`; on CUDA a slot that does not exist gives y = NaN.

    Example:
        >>> import torch
        >>> state = torch.zeros(2, 8, 3)
        >>> y = causal_conv1d_update(torch.ones(2, 8), state, torch.ones(8, 4))
        >>> y.shape, state[0, 0]
        (torch.Size([2, 8]), tensor([0., 0., 1.]))
    """
    required = {"x": x, "conv_state": conv_state, "weight": weight}
    optional = {"bias": bias, "cache_seqlens": cache_seqlens, "conv_state_indices": conv_state_indices}
    _checks.tensors(UPDATE_OP, required, optional)
    _checks.no_grad(UPDATE_OP, required, optional)
    if x.dim() not in (2, 3):
        _checks.fail(ValueError, UPDATE_OP, "x", "have 2 or 3 dimensions [B, C] or [B, C, T]", list(x.shape))
    silu = _check(UPDATE_OP, x, weight, bias, activation)
    rows = x[:, None] if x.dim() == 2 else x.transpose(1, 2)
    y: Tensor = _update(rows, conv_state, weight, bias, cache_seqlens, conv_state_indices, silu)
    return y[:, 0] if x.dim() == 2 else y.transpose(1, 2)


def _check(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> bool:
    """Check what both ops require of their operands; return whether silu is wanted."""
    if activation is not None and (not isinstance(activation, str) or activation not in ACTIVATIONS):
        _checks.fail(ValueError, op, "activation", "be None, 'silu' or 'swish'", repr(activation))
    _checks.element(op, "x", x)
    _checks.rank(op, "weight", weight, "C W")
    for name, y in (("weight", weight), ("bias", bias)):
        if y is not None:
            _checks.dtype(op, name, y, _checks.FLOATS)
    C = x.shape[1]
    if weight.shape[0] != C or not 2 <= weight.shape[1] <= 4:
        rule = f"have shape [C = {C}, W] with W = 2, 3 or 4"
        _checks.fail(ValueError, op, "weight", rule, list(weight.shape))
    if bias is not None:
        _checks.shape(op, "bias", bias, (C,))
    return ACTIVATIONS[activation]


def _check_seq_idx(seq_idx: Tensor, shape: tuple[int, int], *excluded: Any) -> None:
    """Check seq_idx; excluded: cu_seqlens, initial_states, return_final_states, final_states_out."""
    names = ("cu_seqlens", "initial_states", "return_final_states", "final_states_out")
    for name, value in zip(names, excluded, strict=True):
        if value is not None and value is not False:
            rule = f"be {not value if value is True else None} with seq_idx (sequences with states need cu_seqlens)"
            _checks.fail(ValueError, OP, name, rule, value)
    _checks.shape(OP, "seq_idx", seq_idx, shape)
    _checks.dtype(OP, "seq_idx", seq_idx, (torch.int32, torch.int64))


def _final_states(x: Tensor, initial_states: Tensor | None, cu_seqlens: Tensor | None, W: int) -> Tensor:
    """Return [N, W - 1, C]: the last inputs of every sequence, which where it is shorter go on in its initial state."""
    B, T, C = x.shape
    if cu_seqlens is None:
        before = x.new_zeros(B, W - 1, C) if initial_states is None else initial_states
        return torch.cat([before, x], dim=1)[:, T:]
    start, stop = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    i = torch.arange(W - 1, device=x.device)
    tokens = stop - (W - 1) + i  # [N, W - 1]
    inside = (tokens >= start)[..., None]
    rows = x[0][tokens.clamp(0, max(T - 1, 0))] if T else x.new_zeros(*tokens.shape, C)
    if initial_states is None:
        return torch.where(inside, rows, 0)
    older = (tokens - start + W - 1).clamp(0, W - 2)[..., None].expand(-1, -1, C)
    return torch.where(inside, rows, initial_states.gather(1, older))


def _check_inputs(x: Inputs) -> None:
    _checks.rank(OP, "x", x.x, "B T C")
    B, T, C = x.x.shape
    _checks.rank(OP, "weight", x.weight, "C W")
    _checks.shape(OP, "weight", x.weight, (C, x.weight.shape[1]))
    if x.seq_idx is not None:
        _checks.shape(OP, "seq_idx", x.seq_idx, (B, T))


def _forward_fake(save: bool, *arguments: Any) -> Any:
    x = Inputs._make(arguments)
    _check_inputs(x)
    y = _native.empty_like(x.x)
    return (y, []) if save else y


def _forward(save: bool, *arguments: Any) -> Any:
    x, results = Inputs._make(arguments), _forward_fake(save, *arguments)
    y = results[0] if save else results
    if y.numel():
        x = _readable(x)
        fields = {**_operands(x), **_sequences(x), "y": _native.pointer(y)}
        _native.kernel(OP, "causal_conv1d_fwd", y.device)(fields)
    return results


def _backward_fake(dy: Tensor, *arguments: Any) -> Any:
    x, op = Inputs._make(arguments), f"{OP}_bwd"
    _check_inputs(x)
    _checks.like(op, "dy", dy, "x", x.x)
    C, W = x.weight.shape
    dweight = x.x.new_zeros(W + 1, C, dtype=_native.accumulator(x.x.dtype))
    dinitial = x.x.new_zeros(0 if x.initial_states is None else x.initial_states.shape)
    return _native.empty_like(x.x), dweight, dinitial


def _backward(dy: Tensor, *arguments: Any) -> Any:
    x, gradients = Inputs._make(arguments), _backward_fake(dy, *arguments)
    dx, dweight, dinitial = gradients
    if dx.numel():
        x, dy = _readable(x), _native.dense_last(dy)
        (B, T, C), W = x.x.shape, x.weight.shape[1]
        num_blocks = B * (-(-T // BLOCK))
        partials = dweight.new_empty(num_blocks, W + 1, C)
        fields = {
            **_operands(x),
            **_sequences(x),
            "dy": _native.view(dy),
            "num_blocks": num_blocks,
            "dx": _native.pointer(dx),
            "dweight": _native.pointer(dweight),
            "dinitial_states": _native.pointer(dinitial if x.initial_states is not None else None),
            "partials": _native.pointer(partials),
        }
        _native.kernel(f"{OP}_bwd", "causal_conv1d_bwd", dx.device)(fields)
    return gradients


def _readable(x: Inputs) -> Inputs:
    """Return the operands of forward and backward in the layouts that their kernels read."""
    initial_states, seq_idx, cu_seqlens = map(_native.contiguous, x[3:6])
    return x._replace(x=_native.dense_last(x.x), initial_states=initial_states, seq_idx=seq_idx, cu_seqlens=cu_seqlens)


def _operands(x: Inputs | UpdateInputs) -> dict[str, Any]:
    """The fields that all params structs of the family share."""
    B, T, C = x.x.shape
    return {
        "dtype": _native.DTYPES[x.x.dtype],
        "weight_dtype": _native.DTYPES[x.weight.dtype],
        "bias_dtype": 0 if x.bias is None else _native.DTYPES[x.bias.dtype],
        "silu": x.silu,
        "num_threads": _native.threads(),
        "B": B,
        "T": T,
        "C": C,
        "W": x.weight.shape[1],
        "x": _native.view(x.x),
        "weight": _native.view(x.weight[None]),
        "bias": _native.view(None if x.bias is None else x.bias[None, :, None]),
    }


def _sequences(x: Inputs) -> dict[str, Any]:
    return {
        "seq_idx": _native.indices(x.seq_idx),
        "N": 0 if x.cu_seqlens is None else x.cu_seqlens.shape[0] - 1,
        "cu_seqlens": _native.indices(x.cu_seqlens),
        "initial_states": _native.pointer(x.initial_states),
    }


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor, *_: Any) -> Any:
    x = Inputs._make((*ctx.saved_tensors, ctx.silu))
    dx, dweight, dinitial = _backward_op(dy, *x)
    dbias = None if x.bias is None else dweight[-1].to(x.bias.dtype)
    dinitial = None if x.initial_states is None else dinitial
    return dx, dweight[:-1].T.to(x.weight.dtype), dbias, dinitial, None, None, None


def _update_fake(*arguments: Any) -> Tensor:
    x = UpdateInputs._make(arguments)
    op, state, (B, _, C), W = UPDATE_OP, x.conv_state, x.x.shape, x.weight.shape[1]
    _checks.rank(op, "conv_state", state, "slots C L")
    num_slots = B if x.conv_state_indices is None else state.shape[0]
    _checks.shape(op, "conv_state", state, (num_slots, C, state.shape[2]))
    if state.shape[2] < W - 1:
        _checks.fail(ValueError, op, "conv_state", f"hold at least W - 1 = {W - 1} inputs", state.shape[2])
    if state.dtype != x.x.dtype:
        _checks.fail(TypeError, op, "conv_state", f"have x's dtype {x.x.dtype}", state.dtype)
    if any(n > 1 and stride == 0 for n, stride in zip(state.shape, state.stride(), strict=True)):
        _checks.fail(ValueError, op, "conv_state", "not be expanded (it is written to)", f"strides {state.stride()}")
    for name, y in (("cache_seqlens", x.cache_seqlens), ("conv_state_indices", x.conv_state_indices)):
        if y is not None:
            _checks.indices(op, name, y, B)
    return _native.empty_like(x.x)


def _update_run(*arguments: Any) -> Tensor:
    x, y = UpdateInputs._make(arguments), _update_fake(*arguments)
    if y.numel() == 0:
        return y
    if x.conv_state_indices is not None and not _native.on_cuda(y):
        _checks.slots(UPDATE_OP, x.conv_state_indices, x.conv_state.shape[0], "conv_state_indices")
    lengths, slots = _native.contiguous(x.cache_seqlens), _native.contiguous(x.conv_state_indices)
    fields = {
        **_operands(x),
        "L": x.conv_state.shape[2],
        "num_slots": x.conv_state.shape[0],
        "cache_seqlens": _native.indices(lengths),
        "state_indices": _native.indices(slots),
        "conv_state": _native.view(x.conv_state),
        "y": _native.pointer(y),
    }
    _native.kernel(UPDATE_OP, "causal_conv1d_update", y.device)(fields)
    return y


_SCHEMA = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_states, Tensor? seq_idx, Tensor? cu_seqlens, bool silu"
)
_backward_op = _ops.differentiable_once(
    _ops.define(
        f"{OP}_bwd(Tensor dy, {_SCHEMA}) -> (Tensor dx, Tensor dweight, Tensor dinitial_states)",
        _backward_fake,
        _backward,
    ),
    f"{OP}: there is no second derivative",
)
_inference, _differentiable = _ops.define_differentiable(
    OP, _SCHEMA, "Tensor y", "Tensor[] saved", _forward_fake, _forward, (_setup_context, _differentiate)
)
_update = _ops.define(
    f"{UPDATE_OP}(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, Tensor? cache_seqlens, "
    "Tensor? conv_state_indices, bool silu) -> Tensor",
    _update_fake,
    _update_run,
)
