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
    weight: Tensor  # [W, C] in the accumulation type, as bias
    bias: Tensor | None  # [C]
    initial_states: Tensor | None  # [N, W - 1, C] in x's dtype
    positions: Tensor | None  # [B, T] int32: tokens of the same sequence before each; None: t
    sequences: Tensor | None  # [B, T] int32: sequence of each token, -1 for none; None: the batch
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
        weight: [C, W], W = 2, 3 or 4.
        bias: [C].
        seq_idx: [B, T] int32 or int64, sequence of every token; a change of its value begins a new sequence.
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
    silu = _check(OP, x, weight, bias, activation)
    _checks.rank(OP, "x", x, "B C T")
    (B, C, T), W = x.shape, weight.shape[1]
    positions = sequences = None
    if seq_idx is not None:
        for name in ("cu_seqlens", "initial_states", "final_states_out"):
            value = cu_seqlens if name == "cu_seqlens" else initial_states if name[0] == "i" else final_states_out
            if value is not None:
                _checks.fail(ValueError, OP, name, "be None with seq_idx", value)
        if return_final_states:
            _checks.fail(ValueError, OP, "return_final_states", "be False with seq_idx", True)
        positions = _positions_of_runs(seq_idx, B, T)
        sequences = None
    N = B
    if cu_seqlens is not None:
        N = cu_seqlens.shape[0] - 1 if cu_seqlens.dim() else 0
        positions, sequences = _positions_of_bounds(cu_seqlens, x)
    if initial_states is not None:
        _checks.shape(OP, "initial_states", initial_states, (N, C, W - 1))
        _checks.dtype(OP, "initial_states", initial_states, (x.dtype,))
        initial_states = initial_states.mT
    rows = x.transpose(1, 2)
    wide = _native.accumulator(x.dtype)
    inputs = Inputs(
        rows,
        weight.to(wide).T,
        None if bias is None else bias.to(wide),
        initial_states,
        positions,
        sequences,
        silu,
    )
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

    No gradient. Allocates y and copies of the weights; on CUDA nothing is read on the host, so a graph can capture it.

    Args:
        x: [B, C] or [B, C, T] in conv_state's dtype.
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
    silu = _check(UPDATE_OP, x, weight, bias, activation)
    if x.dim() not in (2, 3):
        _checks.fail(ValueError, UPDATE_OP, "x", "have 2 or 3 dimensions [B, C] or [B, C, T]", list(x.shape))
    rows = x[:, None] if x.dim() == 2 else x.transpose(1, 2)
    wide = _native.accumulator(x.dtype)
    bias = None if bias is None else bias.to(wide)
    y: Tensor = _update(rows, conv_state, weight.to(wide).T, bias, cache_seqlens, conv_state_indices, silu)
    return y[:, 0] if x.dim() == 2 else y.transpose(1, 2)


def _check(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> bool:
    """Check what both ops require of their operands; return whether silu is wanted."""
    if activation not in ACTIVATIONS:
        _checks.fail(ValueError, op, "activation", "be None, 'silu' or 'swish'", repr(activation))
    _checks.element(op, "x", x)
    _checks.rank(op, "weight", weight, "C W")
    for name, y in (("weight", weight), ("bias", bias)):
        if y is not None:
            _checks.dtype(op, name, y, _checks.FLOATS)
    C = x.shape[1] if x.dim() > 1 else 0
    if weight.shape[0] != C or not 2 <= weight.shape[1] <= 4:
        rule = f"have shape [C = {C}, W] with W = 2, 3 or 4"
        _checks.fail(ValueError, op, "weight", rule, list(weight.shape))
    if bias is not None:
        _checks.shape(op, "bias", bias, (C,))
    return ACTIVATIONS[activation]


def _positions_of_runs(seq_idx: Tensor, B: int, T: int) -> Tensor:
    """Return [B, T] int32: how many tokens before each have its seq_idx without a break."""
    _checks.shape(OP, "seq_idx", seq_idx, (B, T))
    _checks.dtype(OP, "seq_idx", seq_idx, (torch.int32, torch.int64))
    t = torch.arange(T, device=seq_idx.device, dtype=torch.int32)
    begins = torch.ones_like(seq_idx, dtype=torch.bool)
    begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return t - torch.where(begins, t, 0).cummax(dim=1).values


def _positions_of_bounds(cu_seqlens: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ([1, T] position in its sequence, [1, T] sequence or -1 after the last) of every token, int32."""
    _checks.cu_seqlens(OP, cu_seqlens, x.transpose(1, 2), whole=False)
    t = torch.arange(x.shape[2], device=x.device)
    n = torch.searchsorted(cu_seqlens.long(), t, right=True) - 1
    positions = (t - cu_seqlens.long()[n]).int()
    return positions[None], torch.where(n < cu_seqlens.shape[0] - 1, n, -1).int()[None]


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
    W = x.weight.shape[0]
    _checks.shape(OP, "weight", x.weight, (W, C))
    for name, y in (("positions", x.positions), ("sequences", x.sequences)):
        if y is not None:
            _checks.shape(OP, name, y, (B, T))
            _checks.dtype(OP, name, y, (torch.int32,))


def _forward_fake(save: bool, *arguments: Any) -> Any:
    x = Inputs._make(arguments)
    _check_inputs(x)
    y = _native.empty_like(x.x)
    return (y, []) if save else y


def _forward(save: bool, *arguments: Any) -> Any:
    x, results = Inputs._make(arguments), _forward_fake(save, *arguments)
    y = results[0] if save else results
    if y.numel():
        rows, tensors = _native.dense_last(x.x), _contiguous(x)
        fields = {**_operands(x, rows, tensors), "y": _native.pointer(y)}
        _native.kernel(OP, "causal_conv1d_fwd", rows.device)(fields)
    return results


def _backward_fake(dy: Tensor, *arguments: Any) -> Any:
    x, op = Inputs._make(arguments), f"{OP}_bwd"
    _check_inputs(x)
    _checks.like(op, "dy", dy, "x", x.x)
    W, C = x.weight.shape
    dinitial = x.x.new_zeros(0 if x.initial_states is None else x.initial_states.shape)
    return _native.empty_like(x.x), x.weight.new_zeros(W + 1, C), dinitial


def _backward(dy: Tensor, *arguments: Any) -> Any:
    x, gradients = Inputs._make(arguments), _backward_fake(dy, *arguments)
    dx, dweight, dinitial = gradients
    if dx.numel():
        rows, dy, tensors = _native.dense_last(x.x), _native.dense_last(dy), _contiguous(x)
        (B, T, C), W = rows.shape, x.weight.shape[0]
        num_blocks = B * (-(-T // BLOCK))
        partials = dweight.new_empty(num_blocks, W + 1, C)
        fields = {
            **_operands(x, rows, tensors),
            "dy": _native.view(dy),
            "num_blocks": num_blocks,
            "dx": _native.pointer(dx),
            "dweight": _native.pointer(dweight),
            "dinitial_states": _native.pointer(dinitial if x.initial_states is not None else None),
            "partials": _native.pointer(partials),
        }
        _native.kernel(f"{OP}_bwd", "causal_conv1d_bwd", rows.device)(fields)
    return gradients


def _contiguous(x: Inputs) -> dict[str, Tensor | None]:
    names = ("weight", "bias", "initial_states", "positions", "sequences")
    return {name: _native.contiguous(getattr(x, name)) for name in names}


def _operands(x: Inputs, rows: Tensor, tensors: dict[str, Tensor | None]) -> dict[str, Any]:
    """The fields that forward and backward share; rows: x as kernels read it."""
    B, T, C = rows.shape
    return {
        "dtype": _native.DTYPES[rows.dtype],
        "silu": x.silu,
        "num_threads": torch.get_num_threads(),
        "B": B,
        "T": T,
        "C": C,
        "W": x.weight.shape[0],
        "x": _native.view(rows),
        **{name: _native.pointer(y) for name, y in tensors.items()},
    }


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor, *_: Any) -> Any:
    x = Inputs._make((*ctx.saved_tensors, ctx.silu))
    dx, dweight, dinitial = _backward_op(dy, *x)
    dbias = None if x.bias is None else dweight[-1]
    return dx, dweight[:-1], dbias, None if x.initial_states is None else dinitial, None, None, None


def _update_fake(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    slots: Tensor | None,
    silu: bool,
) -> Tensor:
    op, (B, _, C), W = UPDATE_OP, x.shape, weight.shape[0]
    _checks.rank(op, "conv_state", state, "slots C L")
    _checks.shape(op, "conv_state", state, (B if slots is None else state.shape[0], C, state.shape[2]))
    if state.shape[2] < W - 1:
        _checks.fail(ValueError, op, "conv_state", f"hold at least W - 1 = {W - 1} inputs", state.shape[2])
    if state.dtype != x.dtype:
        _checks.fail(TypeError, op, "conv_state", f"have x's dtype {x.dtype}", state.dtype)
    if any(n > 1 and stride == 0 for n, stride in zip(state.shape, state.stride(), strict=True)):
        _checks.fail(ValueError, op, "conv_state", "not be expanded (it is written to)", f"strides {state.stride()}")
    for name, y in (("cache_seqlens", lengths), ("conv_state_indices", slots)):
        if y is not None:
            _checks.indices(op, name, y, B)
    return _native.empty_like(x)


def _update_run(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    slots: Tensor | None,
    silu: bool,
) -> Tensor:
    y = _update_fake(x, state, weight, bias, lengths, slots, silu)
    if y.numel() == 0:
        return y
    if slots is not None and not _native.on_cuda(x):
        _checks.slots(UPDATE_OP, slots, state.shape[0], "conv_state_indices")
    x, weight = _native.dense_last(x), weight.contiguous()
    bias, lengths, slots = map(_native.contiguous, (bias, lengths, slots))
    B, T, C = x.shape
    fields = {
        "dtype": _native.DTYPES[x.dtype],
        "silu": silu,
        "num_threads": torch.get_num_threads(),
        "B": B,
        "T": T,
        "C": C,
        "W": weight.shape[0],
        "x": _native.view(x),
        "weight": _native.pointer(weight),
        "bias": _native.pointer(bias),
        "L": state.shape[2],
        "num_slots": state.shape[0],
        "cache_seqlens": _native.indices(lengths),
        "state_indices": _native.indices(slots),
        "conv_state": _native.view(state),
        "y": _native.pointer(y),
    }
    _native.kernel(UPDATE_OP, "causal_conv1d_update", x.device)(fields)
    return y


_SCHEMA = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_states, Tensor? positions, Tensor? sequences, bool silu"
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
