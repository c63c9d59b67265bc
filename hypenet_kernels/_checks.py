"""Checks of the ops' arguments. An error is one line: op, argument, rule and the value that breaks it.

TypeError: dtype or kind of device. ValueError: rank, shape, layout, range. NotImplementedError: legal, but not built.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from hypenet_kernels import _native

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
STRIDED = torch.strided
LONGEST = 12  # values of a list that a message shows


def fail(error: type[Exception], op: str, argument: str, rule: str, got: Any) -> NoReturn:
    """Raise error("<op>: <argument> must <rule>, got <got>"); of tensors and long lists it shows no contents."""
    if isinstance(got, Tensor):
        got = f"a tensor of shape {list(got.shape)}"
    elif isinstance(got, (list, tuple)) and len(got) > LONGEST:
        got = f"[{', '.join(map(str, got[:LONGEST]))}, ...] ({len(got)} values)"
    raise error(f"{op}: {argument} must {rule}, got {got}")


def tensor(op: str, name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        fail(TypeError, op, name, "be a tensor", type(x).__name__)


def tensors(op: str, required: Mapping[str, Any], optional: Mapping[str, Any]) -> None:
    """Check tensors by name: all on the device of the first, which must be built; optional ones may be None."""
    first, q = next(iter(required.items()))
    if not isinstance(q, Tensor):
        tensor(op, first, q)
    device = q.device
    for arguments in (required, optional):
        for name, x in arguments.items():
            if isinstance(x, Tensor):
                if x.device != device:
                    fail(ValueError, op, name, f"be on {first}'s device {device}", x.device)
                if x.layout is not STRIDED:
                    fail(TypeError, op, name, "be a dense tensor (layout torch.strided)", x.layout)
            elif x is not None or arguments is required:
                tensor(op, name, x)
    if not (q.is_cpu or q.is_meta or q.is_cuda):
        fail(NotImplementedError, op, first, "be on cpu or meta or cuda (nothing else is built)", device)


def rank(op: str, name: str, x: Tensor, dims: str) -> None:
    """dims: the letters of the dimensions, as in 'B T H K'."""
    if x.dim() != dims.count(" ") + 1:
        fail(ValueError, op, name, f"have {len(dims.split())} dimensions [{', '.join(dims.split())}]", list(x.shape))


def shape(op: str, name: str, x: Tensor, expected: Sequence[int]) -> None:
    if x.shape != tuple(expected):
        fail(ValueError, op, name, f"have shape {list(expected)}", list(x.shape))


def dtype(op: str, name: str, x: Tensor, allowed: Iterable[torch.dtype]) -> None:
    if x.dtype not in allowed:
        fail(TypeError, op, name, f"be {' or '.join(_name(d) for d in allowed)}", _name(x.dtype))


def element(op: str, name: str, x: Tensor) -> None:
    """Check that x has a float type that is built for its device: all on the CPU, on CUDA those of CUDA_OPS."""
    built = _native.CUDA_OPS[op.removesuffix("_bwd")] if _native.on_cuda(x) else FLOATS
    if x.dtype not in built:
        dtype(op, name, x, FLOATS)
        rule = f"be {' or '.join(_name(d) for d in built)} on CUDA"
        fail(NotImplementedError, op, name, rule, _name(x.dtype))


def _name(x: torch.dtype) -> str:
    return str(x).removeprefix("torch.")


def same_dtype(op: str, name: str, x: Tensor, like: Tensor) -> None:
    if x.dtype != like.dtype:
        fail(TypeError, op, name, f"have q's dtype {like.dtype}", x.dtype)


def like(op: str, name: str, x: Tensor, like_name: str, other: Tensor) -> None:
    """Check that x has the shape and dtype of another argument."""
    if x.shape != other.shape:
        fail(ValueError, op, name, f"have {like_name}'s shape {list(other.shape)}", list(x.shape))
    if x.dtype != other.dtype:
        fail(TypeError, op, name, f"have {like_name}'s dtype {other.dtype}", x.dtype)


def multiple(op: str, name: str, value: int, of_name: str, of: int) -> None:
    if of == 0 or value % of:
        fail(ValueError, op, name, f"be a multiple of {of_name} = {of}", value)


def number(op: str, name: str, value: Any) -> float:
    """Return a real number of any type as a float; a tensor of one element too, if it needs no gradient."""
    if isinstance(value, float):
        return value
    if isinstance(value, Tensor) and (value.numel() != 1 or value.is_complex() or value.requires_grad):
        fail(ValueError, op, name, "be one real number that requires no grad (it gets none)", value)
    if not hasattr(value, "__float__"):
        fail(TypeError, op, name, "be a number", type(value).__name__)
    return float(value)


def integer(op: str, name: str, value: Any) -> None:
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            fail(ValueError, op, name, "be an integer of 64 bits", value)
        return
    if isinstance(value, Tensor) or not hasattr(value, "__index__"):
        fail(TypeError, op, name, "be an integer", type(value).__name__)


def scale(op: str, value: Any, q: Tensor) -> float:
    """Return the scale of a call: value, by default D ** -0.5 of q [..., D]."""
    if value is None:
        return max(1, q.shape[-1] if q.dim() else 1) ** -0.5
    return number(op, "scale", value)


def indices(op: str, name: str, x: Tensor, size: int) -> None:
    """Check that x is [size] int32 or int64."""
    shape(op, name, x, [size])
    dtype(op, name, x, (torch.int32, torch.int64))


def has_values(x: Tensor) -> bool:
    """Whether reading x's values costs nothing: on the CPU, outside of tracing."""
    return x.device.type == "cpu" and not isinstance(x, FakeTensor) and not torch.compiler.is_compiling()


def cu_seqlens(op: str, x: Tensor, q: Tensor, packed: str = "q") -> None:
    """Check bounds [N + 1] of sequences packed along T of q [B, T, ...]: rising from 0 to at most T. packed: q's name.

    Values are checked on the CPU alone.
    """
    B, T = q.shape[:2]
    rank(op, "cu_seqlens", x, "N+1")
    dtype(op, "cu_seqlens", x, (torch.int32, torch.int64))
    if B != 1:
        fail(ValueError, op, packed, "have batch size 1 with cu_seqlens (pack the sequences along T)", B)
    if x.numel() < 1:
        fail(ValueError, op, "cu_seqlens", "have at least one entry", list(x.shape))
    if has_values(x):
        bounds = x.tolist()
        if bounds[0] != 0 or bounds[-1] > T or bounds != sorted(bounds):
            fail(ValueError, op, "cu_seqlens", f"rise from 0 to at most T = {T} without falling", bounds)


def pool(op: str, name: str, x: Tensor) -> None:
    """Check that states [slots, HV, K, V] can be updated in place: any stride from slot to slot, each contiguous."""
    if x.is_contiguous():
        return
    if not x[:1].is_contiguous() or (x.shape[0] > 1 and x.stride(0) < x.shape[1:].numel()):
        fail(ValueError, op, name, "have contiguous slots that do not overlap", f"strides {list(x.stride())}")


def slots(op: str, state_indices: Tensor, num_slots: int, name: str = "state_indices") -> None:
    """Check the values of state_indices: below num_slots, and none twice; negative ones skip their sequence."""
    values = state_indices.tolist()
    used = [slot for slot in values if slot >= 0]
    if used and max(used) >= num_slots:
        fail(ValueError, op, name, f"be below the number of slots, {num_slots}", values)
    if len(set(used)) < len(used):
        fail(ValueError, op, name, "name no slot twice", values)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a call is to be differentiated, or transformed by torch.func: only the differentiable op notices that."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return _transformed()


def _transformed() -> bool:
    """Whether forward-mode derivatives or a transform of torch.func are on."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def no_grad(
    op: str,
    required: Mapping[str, Any],
    optional: Mapping[str, Any],
    when: str = "(a decode op has no backward; use torch.no_grad())",
) -> None:
    """Check that no gradient is wanted of a call that has none."""
    if _transformed():
        raise NotImplementedError(
            f"{op}: forward-mode derivatives and torch.func transforms are not built for this call"
        )
    if torch.is_grad_enabled():
        for arguments in (required, optional):
            for name, x in arguments.items():
                if x is not None and x.requires_grad:
                    fail(ValueError, op, name, f"not require grad {when}", True)
