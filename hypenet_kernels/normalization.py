"""RMSNorm in one pass with what precedes or follows it in a decoder layer, whose cost is that of moving memory.

n = x / sqrt(mean(x^2) + eps) * weight                    over the last dimension
rms_norm_rope:   n, rotated by the angles of its token    q and k of attention and of recurrent layers
rms_norm_gated:  n * act(g)                               the output of recurrent layers
add_rms_norm:    n of x + residual, and the sum           between the parts of a layer

Arithmetic is float32, or float64 for float64; results are rounded once. Kernels: C++ on the CPU, Triton on CUDA; on
CUDA without Triton, the definition in `reference` runs, one operator of torch after the other.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hypenet_kernels import _checks, _native, _ops, reference

ROPE_OP, GATED_OP, ADD_OP = "rms_norm_rope", "rms_norm_gated", "add_rms_norm"
BLOCK = 64  # rows: kNormBlock in csrc/params.h
ACTIVATIONS = {"silu": True, "swish": True, "sigmoid": False}


class RopeInputs(NamedTuple):
    """The arguments of rms_norm_rope."""

    x: Tensor  # [B, T, H, D]
    weight: Tensor | None  # [D]
    cos: Tensor | None  # [B or 1, T, D]
    sin: Tensor | None
    eps: float


class GatedInputs(NamedTuple):
    """The arguments of rms_norm_gated."""

    x: Tensor  # [..., D]
    g: Tensor  # like x
    weight: Tensor  # [D]
    eps: float
    silu: bool


class AddInputs(NamedTuple):
    """The arguments of add_rms_norm."""

    x: Tensor  # [..., D]
    residual: Tensor  # [..., D]
    weight: Tensor  # [D]
    eps: float


def rms_norm_rope(
    x: Tensor,
    weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Normalise every head of q or k, and rotate it by the angles of its token.

    Differentiable once in x and weight. The halves of a head rotate against each other, as transformers' rotate_half:
    y_j = n_j cos_j - n_{j+D/2} sin_j;  y_{j+D/2} = n_{j+D/2} cos_{j+D/2} + n_j sin_{j+D/2}.

    Args:
        x: [B, T, H, D], float64, float32, bfloat16 or float16. Without cos and sin any [..., D].
        weight: [D] of any float type; None: rotate without a norm.
        cos, sin: [B or 1, T, D] of one float type; None: normalise without a rotation.
        eps: Added to the mean square.

    Returns:
        y of x's shape and dtype.

    Raises:
        TypeError: dtype. ValueError: shape, device, or cos and sin that require grad.

    Example:
        >>> import torch
        >>> q, angles = torch.randn(2, 5, 3, 8), torch.randn(1, 5, 8)
        >>> rms_norm_rope(q, torch.ones(8), angles.cos(), angles.sin()).shape
        torch.Size([2, 5, 3, 8])
    """
    optional = {"weight": weight, "cos": cos, "sin": sin}
    _checks.tensors(ROPE_OP, {"x": x}, optional)
    _checks.element(ROPE_OP, "x", x)
    for name, angle in (("cos", cos), ("sin", sin)):
        if angle is not None and angle.requires_grad and torch.is_grad_enabled():
            _checks.fail(ValueError, ROPE_OP, name, "not require grad (there is no gradient in the angles)", True)
    inputs = RopeInputs(x, weight, cos, sin, eps)
    if _native.runs_in_torch(ROPE_OP, x):
        _check_rope(inputs)
        return reference.rms_norm_rope(*inputs)
    return _rope(*inputs)[0] if _checks.wants_gradient(x, weight) else _rope_inference(*inputs)


def rms_norm_gated(x: Tensor, g: Tensor, weight: Tensor, *, eps: float = 1e-6, activation: str = "silu") -> Tensor:
    """Normalise the output of a recurrence, over a head or over all of them, and multiply it by its gate.

    Differentiable once in x, g and weight.

    Args:
        x: [..., D], float64, float32, bfloat16 or float16.
        g: The gate before its activation, of x's shape and dtype.
        weight: [D] of any float type.
        eps: Added to the mean square.
        activation: "silu" (or "swish") or "sigmoid".

    Returns:
        rms_norm(x) * weight * activation(g), of x's shape and dtype.

    Raises:
        TypeError: dtype. ValueError: shape, device or activation.

    Example:
        >>> import torch
        >>> o, g = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 3, 8)
        >>> rms_norm_gated(o, g, torch.ones(8), activation="sigmoid").shape
        torch.Size([2, 5, 3, 8])
    """
    _checks.tensors(GATED_OP, {"x": x, "g": g, "weight": weight}, {})
    _checks.element(GATED_OP, "x", x)
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        _checks.fail(ValueError, GATED_OP, "activation", f"be one of {list(ACTIVATIONS)}", repr(activation))
    inputs = GatedInputs(x, g, weight, eps, ACTIVATIONS[activation])
    if _native.runs_in_torch(GATED_OP, x):
        _check_gated(inputs)
        return reference.rms_norm_gated(x, g, weight, eps=eps, activation=activation)
    return _gated(*inputs)[0] if _checks.wants_gradient(x, g, weight) else _gated_inference(*inputs)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Add the output of a part of a layer to the residual stream, and normalise the sum for the next part.

    Differentiable once in x, residual and weight.

    Args:
        x: [..., D] in residual's dtype, or in a narrower one.
        residual: The residual stream, of x's shape, float64, float32, bfloat16 or float16.
        weight: [D] of any float type.
        eps: Added to the mean square.

    Returns:
        (x + residual, rms_norm(x + residual) * weight), both of residual's shape and dtype.

    Raises:
        TypeError: dtype. ValueError: shape or device.

    Example:
        >>> import torch
        >>> total, y = add_rms_norm(torch.ones(2, 8), torch.ones(2, 8), torch.full((8,), 3.0))
        >>> total[0, 0], y[0, 0]
        (tensor(2.), tensor(3.0000))
    """
    _checks.tensors(ADD_OP, {"x": x, "residual": residual, "weight": weight}, {})
    _checks.element(ADD_OP, "residual", residual)
    inputs = AddInputs(x, residual, weight, eps)
    if _native.runs_in_torch(ADD_OP, x):
        _check_add(inputs)
        return reference.add_rms_norm(*inputs)
    if _checks.wants_gradient(x, residual, weight):
        total, y, _ = _add(*inputs)
        return total, y
    return _add_inference(*inputs)


def _check_weight(op: str, x: Tensor, weight: Tensor) -> None:
    if x.dim() == 0:
        _checks.fail(ValueError, op, "x", "have at least one dimension", list(x.shape))
    _checks.shape(op, "weight", weight, x.shape[-1:])
    _checks.dtype(op, "weight", weight, _checks.FLOATS)


def _check_rope(x: RopeInputs) -> None:
    op = ROPE_OP
    if (x.cos is None) != (x.sin is None):
        missing, given = ("cos", "sin") if x.cos is None else ("sin", "cos")
        _checks.fail(ValueError, op, missing, f"be given with {given}", None)
    if x.weight is not None:
        _check_weight(op, x.x, x.weight)
    elif x.cos is None:
        _checks.fail(ValueError, op, "weight", "be given without cos and sin (there is nothing to compute)", None)
    if x.cos is None or x.sin is None:
        return
    _checks.rank(op, "x", x.x, "B T H D")
    B, T, _, D = x.x.shape
    if D % 2:
        _checks.fail(ValueError, op, "x", "have an even last dimension with cos and sin", D)
    _checks.rank(op, "cos", x.cos, "B T D")
    _checks.shape(op, "cos", x.cos, (1 if x.cos.shape[0] == 1 else B, T, D))
    _checks.dtype(op, "cos", x.cos, _checks.FLOATS)
    _checks.like(op, "sin", x.sin, "cos", x.cos)


def _check_gated(x: GatedInputs) -> None:
    _check_weight(GATED_OP, x.x, x.weight)
    _checks.like(GATED_OP, "g", x.g, "x", x.x)


def _check_add(x: AddInputs) -> None:
    _check_weight(ADD_OP, x.residual, x.weight)
    _checks.shape(ADD_OP, "x", x.x, x.residual.shape)
    _checks.dtype(ADD_OP, "x", x.x, _checks.FLOATS)
    if torch.promote_types(x.x.dtype, x.residual.dtype) != x.residual.dtype:
        _checks.fail(TypeError, ADD_OP, "x", f"have residual's dtype {x.residual.dtype} or a narrower one", x.x.dtype)


def _operands(x: Tensor, weight: Tensor | None, eps: float) -> dict[str, Any]:
    """The fields that all params structs share."""
    D = x.shape[-1]
    return {
        "dtype": _native.DTYPES[x.dtype],
        "weight_dtype": 0 if weight is None else _native.DTYPES[weight.dtype],
        "rows": x.numel() // D,
        "D": D,
        "eps": eps,
        "weight": _native.contiguous(weight),
    }


def _sums(x: Tensor, dweight: Tensor) -> dict[str, Any]:
    """The fields of a backward with a weight: dweight, and for the C++ kernels the workspace of its parts."""
    if _native.in_triton(x):
        return {"dweight": dweight}
    num_blocks = -(-(x.numel() // x.shape[-1]) // BLOCK)
    return {"num_blocks": num_blocks, "dweight": dweight, "partials": dweight.new_empty(num_blocks, dweight.shape[0])}


def _new_dweight(x: Tensor, weight: Tensor | None) -> Tensor:
    """Return the gradient of a weight in the accumulation type, zero: [D], or without a weight [0]."""
    return x.new_zeros(0 if weight is None else x.shape[-1], dtype=_native.accumulator(x.dtype))


# ---- rms_norm_rope ----


def _rope_operands(x: RopeInputs) -> dict[str, Any]:
    T, H = (1, 1) if x.cos is None else x.x.shape[1:3]
    return {
        **_operands(x.x, x.weight, x.eps),
        "T": T,
        "H": H,
        "x": x.x.contiguous(),
        "angle_dtype": 0 if x.cos is None else _native.DTYPES[x.cos.dtype],
        "shared_angles": x.cos is not None and x.cos.shape[0] == 1,
        "cos": _native.contiguous(x.cos),
        "sin": _native.contiguous(x.sin),
    }


def _rope_fake(save: bool, *arguments: Any) -> Any:
    x = RopeInputs._make(arguments)
    _check_rope(x)
    y = _native.empty_like(x.x)
    return (y, []) if save else y


def _rope_run(save: bool, *arguments: Any) -> Any:
    x, results = RopeInputs._make(arguments), _rope_fake(save, *arguments)
    y = results[0] if save else results
    if y.numel():
        _native.launch(ROPE_OP, "rms_norm_rope_fwd", y, _rope_operands(x) | {"y": y})
    return results


def _rope_bwd_fake(dy: Tensor, *arguments: Any) -> Any:
    x = RopeInputs._make(arguments)
    _check_rope(x)
    _checks.like(f"{ROPE_OP}_bwd", "dy", dy, "x", x.x)
    return _native.empty_like(x.x), _new_dweight(x.x, x.weight)


def _rope_bwd_run(dy: Tensor, *arguments: Any) -> Any:
    x, (dx, dweight) = RopeInputs._make(arguments), _rope_bwd_fake(dy, *arguments)
    if dx.numel():
        fields = _rope_operands(x) | {"dy": dy.contiguous(), "dx": dx}
        fields |= {} if x.weight is None else _sums(x.x, dweight)
        _native.launch(f"{ROPE_OP}_bwd", "rms_norm_rope_bwd", dx, fields)
    return dx, dweight


def _rope_setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _rope_gradients(ctx: Any, dy: Tensor, *_: Any) -> Any:
    x = RopeInputs._make((*ctx.saved_tensors, ctx.eps))
    dx, dweight = _rope_bwd(dy, *x)
    return dx, None if x.weight is None else dweight.to(x.weight.dtype), None, None, None


# ---- rms_norm_gated ----


def _gated_operands(x: GatedInputs) -> dict[str, Any]:
    operands = {"silu": x.silu, "x": x.x.contiguous(), "g": x.g.contiguous()}
    return _operands(x.x, x.weight, x.eps) | operands


def _gated_fake(save: bool, *arguments: Any) -> Any:
    x = GatedInputs._make(arguments)
    _check_gated(x)
    y = _native.empty_like(x.x)
    return (y, []) if save else y


def _gated_run(save: bool, *arguments: Any) -> Any:
    x, results = GatedInputs._make(arguments), _gated_fake(save, *arguments)
    y = results[0] if save else results
    if y.numel():
        _native.launch(GATED_OP, "rms_norm_gated_fwd", y, _gated_operands(x) | {"y": y})
    return results


def _gated_bwd_fake(dy: Tensor, *arguments: Any) -> Any:
    x = GatedInputs._make(arguments)
    _check_gated(x)
    _checks.like(f"{GATED_OP}_bwd", "dy", dy, "x", x.x)
    return _native.empty_like(x.x), _native.empty_like(x.x), _new_dweight(x.x, x.weight)


def _gated_bwd_run(dy: Tensor, *arguments: Any) -> Any:
    x, gradients = GatedInputs._make(arguments), _gated_bwd_fake(dy, *arguments)
    dx, dg, dweight = gradients
    if dx.numel():
        fields = _gated_operands(x) | {"dy": dy.contiguous(), "dx": dx, "dg": dg} | _sums(x.x, dweight)
        _native.launch(f"{GATED_OP}_bwd", "rms_norm_gated_bwd", dx, fields)
    return gradients


def _gated_setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.eps, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _gated_gradients(ctx: Any, dy: Tensor, *_: Any) -> Any:
    x = GatedInputs._make((*ctx.saved_tensors, ctx.eps, ctx.silu))
    dx, dg, dweight = _gated_bwd(dy, *x)
    return dx, dg, dweight.to(x.weight.dtype), None, None


# ---- add_rms_norm ----


def _add_fake(save: bool, *arguments: Any) -> Any:
    x = AddInputs._make(arguments)
    _check_add(x)
    results = _native.empty_like(x.residual), _native.empty_like(x.residual)
    return (*results, []) if save else results


def _add_run(save: bool, *arguments: Any) -> Any:
    x, results = AddInputs._make(arguments), _add_fake(save, *arguments)
    total, y = results[:2]
    if y.numel():
        fields = _operands(x.residual, x.weight, x.eps) | {
            "x_dtype": _native.DTYPES[x.x.dtype],
            "x": x.x.contiguous(),
            "residual": x.residual.contiguous(),
            "sum": total,
            "y": y,
        }
        _native.launch(ADD_OP, "add_rms_norm_fwd", y, fields)
    return results


def _add_bwd_fake(dsum: Tensor, dy: Tensor, total: Tensor, weight: Tensor, eps: float, x_dtype: torch.dtype) -> Any:
    op = f"{ADD_OP}_bwd"
    _check_weight(op, total, weight)
    _checks.like(op, "dsum", dsum, "sum", total)
    _checks.like(op, "dy", dy, "sum", total)
    dresidual = _native.empty_like(total)
    dx = dresidual.new_empty(0 if x_dtype == total.dtype else total.shape, dtype=x_dtype)
    return dx, dresidual, _new_dweight(total, weight)


def _add_bwd_run(dsum: Tensor, dy: Tensor, total: Tensor, weight: Tensor, eps: float, x_dtype: torch.dtype) -> Any:
    gradients = _add_bwd_fake(dsum, dy, total, weight, eps, x_dtype)
    dx, dresidual, dweight = gradients
    if dresidual.numel():
        fields = _operands(total, weight, eps) | {
            "x_dtype": _native.DTYPES[x_dtype],
            "sum": total.contiguous(),
            "dsum": dsum.contiguous(),
            "dy": dy.contiguous(),
            "dresidual": dresidual,
            "dx": None if x_dtype == total.dtype else dx,
        }
        _native.launch(f"{ADD_OP}_bwd", "add_rms_norm_bwd", dresidual, fields | _sums(total, dweight))
    return gradients


def _add_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x = AddInputs._make(inputs)
    ctx.eps, ctx.x_dtype = x.eps, x.x.dtype
    ctx.save_for_backward(output[0], x.weight)


def _add_gradients(ctx: Any, dsum: Tensor, dy: Tensor, *_: Any) -> Any:
    total, weight = ctx.saved_tensors
    dx, dresidual, dweight = _add_bwd(dsum, dy, total, weight, ctx.eps, ctx.x_dtype)
    return dresidual if ctx.x_dtype == total.dtype else dx, dresidual, dweight.to(weight.dtype), None


_ROPE_SCHEMA = "Tensor x, Tensor? weight, Tensor? cos, Tensor? sin, float eps"
_GATED_SCHEMA = "Tensor x, Tensor g, Tensor weight, float eps, bool silu"
_ADD_SCHEMA = "Tensor x, Tensor residual, Tensor weight, float eps"
_rope_bwd, _gated_bwd, _add_bwd = (
    _ops.differentiable_once(
        _ops.define(f"{op}_bwd({schema}) -> ({results})", fake, run), f"{op}: there is no second derivative"
    )
    for op, schema, results, fake, run in (
        (ROPE_OP, f"Tensor dy, {_ROPE_SCHEMA}", "Tensor dx, Tensor dweight", _rope_bwd_fake, _rope_bwd_run),
        (
            GATED_OP,
            f"Tensor dy, {_GATED_SCHEMA}",
            "Tensor dx, Tensor dg, Tensor dweight",
            _gated_bwd_fake,
            _gated_bwd_run,
        ),
        (
            ADD_OP,
            "Tensor dsum, Tensor dy, Tensor sum, Tensor weight, float eps, ScalarType x_dtype",
            "Tensor dx, Tensor dresidual, Tensor dweight",
            _add_bwd_fake,
            _add_bwd_run,
        ),
    )
)
_rope_inference, _rope = _ops.define_differentiable(
    ROPE_OP, _ROPE_SCHEMA, "Tensor y", "Tensor[] saved", _rope_fake, _rope_run, (_rope_setup, _rope_gradients)
)
_gated_inference, _gated = _ops.define_differentiable(
    GATED_OP, _GATED_SCHEMA, "Tensor y", "Tensor[] saved", _gated_fake, _gated_run, (_gated_setup, _gated_gradients)
)
_add_inference, _add = _ops.define_differentiable(
    ADD_OP, _ADD_SCHEMA, "Tensor sum, Tensor y", "Tensor[] saved", _add_fake, _add_run, (_add_setup, _add_gradients)
)
