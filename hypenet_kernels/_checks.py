"""What every op checks, written once for all devices. A failed check says op, argument, rule and what it got.

TypeError: dtype or kind of device. ValueError: rank, shape, layout, range. NotImplementedError: legal, but not built.
"""

import torch
from torch._subclasses.fake_tensor import FakeTensor

from hypenet_kernels import _native

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CPU_FLOATS = FLOATS


def fail(error, op, argument, rule, got):
    raise error(f"{op}: {argument} must {rule}, got {got}")


def tensor(op, name, x):
    if not isinstance(x, torch.Tensor):
        fail(TypeError, op, name, "be a tensor", type(x).__name__)


def tensors(op, required, optional):
    """The tensor arguments by name, q first; of the optional ones None passes. All on q's device, and that is built."""
    q = required["q"]
    tensor(op, "q", q)
    device = q.device
    for arguments in (required, optional):
        for name, x in arguments.items():
            if x is None and arguments is optional:
                continue
            if not isinstance(x, torch.Tensor):
                tensor(op, name, x)
            if x.device != device:
                fail(ValueError, op, name, f"be on q's device {device}", x.device)
    if not (q.is_cpu or q.is_meta or (q.is_cuda and op in _native.CUDA_OPS)):
        devices = ("cpu", "meta", "cuda") if op in _native.CUDA_OPS else ("cpu", "meta")
        fail(NotImplementedError, op, "q", f"be on {' or '.join(devices)} (nothing else is built)", device)


def rank(op, name, x, dims):
    """dims: the letters of the dimensions, as in 'B T H K'."""
    if x.dim() != dims.count(" ") + 1:
        fail(ValueError, op, name, f"have {len(dims.split())} dimensions [{', '.join(dims.split())}]", list(x.shape))


def shape(op, name, x, expected):
    if x.shape != tuple(expected):
        fail(ValueError, op, name, f"have shape {list(expected)}", list(x.shape))


def dtype(op, name, x, allowed):
    if x.dtype not in allowed:
        fail(TypeError, op, name, f"be {' or '.join(_name(d) for d in allowed)}", _name(x.dtype))


def element(op, name, x):
    """A float type that is built for the device."""
    on_cuda = _native.on_cuda(x)
    built = _native.CUDA_OPS.get(op, FLOATS) if on_cuda else FLOATS if x.is_meta else CPU_FLOATS
    if x.dtype not in built:
        dtype(op, name, x, FLOATS)
        rule = f"be {' or '.join(_name(d) for d in built)} on {'CUDA' if on_cuda else 'CPU'}"
        fail(NotImplementedError, op, name, rule, _name(x.dtype))


def _name(x):
    return str(x).removeprefix("torch.")


def same_dtype(op, name, x, like):
    if x.dtype != like.dtype:
        fail(TypeError, op, name, f"have q's dtype {like.dtype}", x.dtype)


def like(op, name, x, like_name, other):
    """Shape and dtype of another argument."""
    if x.shape != other.shape:
        fail(ValueError, op, name, f"have {like_name}'s shape {list(other.shape)}", list(x.shape))
    if x.dtype != other.dtype:
        fail(TypeError, op, name, f"have {like_name}'s dtype {other.dtype}", x.dtype)


def multiple(op, name, value, of_name, of):
    if of == 0 or value % of:
        fail(ValueError, op, name, f"be a multiple of {of_name} = {of}", value)


def cu_seqlens(op, x, B, T):
    """[N + 1] int32 or int64, from 0 to T, never falling; only with B = 1. Values are checked where there are any."""
    rank(op, "cu_seqlens", x, "N+1")
    dtype(op, "cu_seqlens", x, (torch.int32, torch.int64))
    if B != 1:
        fail(ValueError, op, "q", "have batch size 1 with cu_seqlens (pack the sequences along T)", B)
    if x.numel() < 1:
        fail(ValueError, op, "cu_seqlens", "have at least one entry", list(x.shape))
    if x.device.type == "cpu" and not isinstance(x, FakeTensor):
        bounds = x.tolist()
        if bounds[0] != 0 or bounds[-1] != T or bounds != sorted(bounds):
            fail(ValueError, op, "cu_seqlens", f"rise from 0 to T = {T} without falling", bounds)


def wants_gradient(*tensors):
    """Whether a call is to be differentiated; None among the tensors passes."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


def no_grad(op, required, optional):
    """Decode ops mutate their state and have no backward."""
    if wants_gradient(*required.values(), *optional.values()):
        name = next(name for name, x in (required | optional).items() if x is not None and x.requires_grad)
        fail(ValueError, op, name, "not require grad (a decode op has no backward; use torch.no_grad())", True)
