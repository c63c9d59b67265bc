"""The gated activation of an MLP in one pass: z = silu(x) * y.

Arithmetic is float32, or float64 for float64, and rounded once. Kernels: C++ on the CPU, Triton on CUDA; on CUDA
without Triton, the definition in `reference` runs.
"""

from typing import Any

from torch import Tensor

from hypenet_kernels import _checks, _native, _ops, reference

OP = "swiglu"


def swiglu(x: Tensor, y: Tensor) -> Tensor:
    """Return silu(x) * y, the input of an MLP's down projection. Differentiable once.

    Args:
        x: Output of the gate projection, float64, float32, bfloat16 or float16, of any shape.
        y: Output of the up projection, of x's shape and dtype.

    Raises:
        TypeError: dtype. ValueError: shape or device.

    Example:
        >>> import torch
        >>> swiglu(torch.zeros(2, 3), torch.ones(2, 3)).sum()
        tensor(0.)
    """
    _checks.tensors(OP, {"x": x, "y": y}, {})
    _checks.element(OP, "x", x)
    if _native.runs_in_torch(OP, x):
        _checks.like(OP, "y", y, "x", x)
        return reference.swiglu(x, y)
    return _differentiable(x, y)[0] if _checks.wants_gradient(x, y) else _inference(x, y)


def _fake(save: bool, x: Tensor, y: Tensor) -> Any:
    _checks.like(OP, "y", y, "x", x)
    z = _native.empty_like(x)
    return (z, []) if save else z


def _run(save: bool, x: Tensor, y: Tensor) -> Any:
    results = _fake(save, x, y)
    z = results[0] if save else results
    if z.numel():
        _native.launch(OP, "swiglu_fwd", x, _fields(x, y) | {"z": z})
    return results


def _backward_fake(dz: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    _checks.like(f"{OP}_bwd", "dz", dz, "x", x)
    return _native.empty_like(x), _native.empty_like(x)


def _backward_run(dz: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    dx, dy = _backward_fake(dz, x, y)
    if dx.numel():
        fields = _fields(x, y) | {"dz": dz.contiguous(), "dx": dx, "dy": dy}
        _native.launch(f"{OP}_bwd", "swiglu_bwd", x, fields)
    return dx, dy


def _fields(x: Tensor, y: Tensor) -> dict[str, Any]:
    return {"dtype": _native.DTYPES[x.dtype], "size": x.numel(), "x": x.contiguous(), "y": y.contiguous()}


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dz: Tensor, *_: Any) -> Any:
    return _backward_op(dz, *ctx.saved_tensors)


_backward_op = _ops.differentiable_once(
    _ops.define(f"{OP}_bwd(Tensor dz, Tensor x, Tensor y) -> (Tensor dx, Tensor dy)", _backward_fake, _backward_run),
    f"{OP}: there is no second derivative",
)
_inference, _differentiable = _ops.define_differentiable(
    OP, "Tensor x, Tensor y", "Tensor z", "Tensor[] saved", _fake, _run, (_setup_context, _differentiate)
)
