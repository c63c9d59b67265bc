"""Registers our ops as a backend of flash-linear-attention, through its own registry (fla-core 0.6 and newer).

fla asks its backends in the order of their priority, and each backend's verifier whether it takes a call; a call that
none takes goes to fla's own Triton kernels. fla 0.6 dispatches two of the ops that we have: chunk_gated_delta_rule, and
fused_recurrent_simple_gla, to which its recurrent retention and Lightning attention lead. Its other two entry points
have no dispatch, so a backend cannot reach them.
"""

import importlib.metadata
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

import hypenet_kernels
from hypenet_kernels import _native

NAME, PRIORITY = "hypenet", 2  # before FlashQLA's 3; lower comes first
OLDEST = (0, 6)
Verdict = tuple[bool, str | None]


class FlaBackend:
    """A registered backend. `restore` takes it out of fla's registry again, as does leaving a `with` block."""

    def __init__(self, registries: dict[str, Any]) -> None:
        self._registries = registries

    @property
    def functions(self) -> tuple[str, ...]:
        """The functions of fla that this backend serves."""
        return tuple(self._registries)

    def restore(self) -> None:
        """Take the backend out of fla's registry. Does nothing the second time."""
        for registry in self._registries.values():
            registry._backends.pop(NAME, None)

    def __enter__(self) -> "FlaBackend":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.restore()


def register_fla_backend() -> FlaBackend:
    """Let flash-linear-attention's own ops run on our kernels, on CUDA and, which fla cannot, on the CPU.

    Calls that our ops do not support (context parallelism, float32 in chunks on CUDA, head dimensions that are not
    built) go to fla's own kernels as before; fla logs the reason once.

    Returns:
        The backend, with `functions` and `restore()`; also a context manager.

    Raises:
        ImportError: fla-core is missing, or older than 0.6.

    Example:
        >>> from hypenet_kernels.integrations import register_fla_backend
        >>> backend = register_fla_backend()  # doctest: +SKIP
        >>> backend.functions  # doctest: +SKIP
        ('chunk_gated_delta_rule', 'fused_recurrent_simple_gla')
    """
    _check_version()
    from fla import backends
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.simple_gla import fused_recurrent_simple_gla

    members = {
        "backend_type": NAME,
        "priority": PRIORITY,
        "env_var": "FLA_HYPENET",
        "chunk_gated_delta_rule": _method(hypenet_kernels.chunk_gated_delta_rule),
        "chunk_gated_delta_rule_verifier": _method(_takes_chunks),
        "fused_recurrent_simple_gla": _method(hypenet_kernels.fused_recurrent_simple_gla),
        "fused_recurrent_simple_gla_verifier": _method(_takes_recurrent),
    }
    backend = type("HypeNetBackend", (backends.BaseBackend,), members)
    backends.register("gated_delta_rule")(backend)
    backends.register(fused_recurrent_simple_gla)(backend)
    return FlaBackend(
        {
            chunk_gated_delta_rule.__name__: backends._operation_registries["gated_delta_rule"],
            fused_recurrent_simple_gla.__name__: backends._function_registries[_unwrapped(fused_recurrent_simple_gla)],
        }
    )


def _check_version() -> None:
    try:
        version = importlib.metadata.version("fla-core")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError('register_fla_backend: needs fla-core; install with: pip install "fla-core>=0.6"') from None
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise ImportError(f"register_fla_backend: fla-core must be at least 0.6, got {version}")


def _unwrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def _method(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` as a method that ignores its instance."""
    return lambda self, *arguments, **options: function(*arguments, **options)


def _takes_chunks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **options: Any) -> Verdict:
    if options.get("cp_context") is not None:
        return False, "context parallelism is not built"
    return _takes("chunk_gated_delta_rule", q, k, v)


def _takes_recurrent(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> Verdict:
    return _takes("fused_recurrent_simple_gla", q, k, v)


def _takes(op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Verdict:
    """Whether the op is built for these tensors."""
    if q.is_cpu:
        return True, None
    if not q.is_cuda:
        return False, f"no kernels for {q.device.type}"
    try:
        _native.cuda()
    except NotImplementedError as error:
        return False, str(error)
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    if dtype not in _native.HALF:
        return False, f"{op} on CUDA takes bfloat16 and float16, got {dtype}"
    if q.shape[-1] > 256:
        return False, f"head dimensions of keys above 256 are not built, got {q.shape[-1]}"
    return True, None
