"""Loads the native modules, and passes tensors to them as pointers, strides and streams."""

import functools
import importlib
import importlib.util
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # before any native module, so that both share torch's OpenMP runtime
from torch import Tensor

from hypenet_kernels import _nvrtc

DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # csrc/params.h, DType
LEVELS = {"AVX512": "v4", "AVX2": "v3"}  # torch's name of the CPU's instruction set -> ours; all else: baseline
HALF = (torch.bfloat16, torch.float16)
TRITON = importlib.util.find_spec("triton") is not None
# whose CUDA kernels are not of the CUDA module
TRITON_OPS = ("rms_norm_rope", "rms_norm_gated", "add_rms_norm", "swiglu")
CUDA_OPS = {  # the ops that have a CUDA kernel, and for which dtypes
    "chunk_gated_delta_rule": HALF,
    "fused_recurrent_gated_delta_rule": (torch.float32, *HALF),
    "chunk_simple_gla": HALF,
    "fused_recurrent_simple_gla": (torch.float32, *HALF),
    "gated_delta_step": (torch.float32, *HALF),
    "simple_gla_step": (torch.float32, *HALF),
    "hype_attention": HALF,
    "hype_attention_decode": HALF,
    "commit_states": (torch.float32,),
    "causal_conv1d_fn": (torch.float32, *HALF),
    "causal_conv1d_update": (torch.float32, *HALF),
    **dict.fromkeys(TRITON_OPS, (torch.float64, torch.float32, *HALF)),
}
ABSENT = (0, 0, 0, 0)  # the View of an optional tensor that was not given

logger = logging.getLogger("hypenet_kernels")


def level() -> str:
    """Return the level of the CPU module to use: baseline, v3, v4 or v4_bf16.

    ATEN_CPU_CAPABILITY cannot express AVX512-BF16, so setting it to avx512 selects plain v4.
    """
    name = LEVELS.get(torch.backends.cpu.get_cpu_capability(), "baseline")
    return f"{name}_bf16" if name == "v4" and "ATEN_CPU_CAPABILITY" not in os.environ and _multiplies_bf16() else name


def _multiplies_bf16() -> bool:
    """Whether the CPU has AVX512-BF16; False if this torch cannot tell."""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return capabilities.get("avx512_bf16", False)


@functools.cache
def cpu() -> ModuleType:
    """Return the CPU module compiled for this CPU's instruction set."""
    name = f"{__package__}._cpu_{level()}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        folder = Path(__file__).parent
        raise ImportError(
            f"hypenet_kernels: {name} is not built in {folder}. In a checkout build it with `pip install -e .`; to use "
            "an installed copy instead, run outside the checkout"
        ) from error


@functools.cache
def cuda() -> ModuleType:
    """Return a CUDA module, to read the limits of the kernels. Importing it needs no driver."""
    return built_cuda() or runtime_cuda()


@functools.cache
def built_cuda() -> ModuleType | None:
    """Return the module with kernels that nvcc compiled, None if the build left them out."""
    try:
        return importlib.import_module(f"{__package__}._cuda")
    except ModuleNotFoundError:
        return None


@functools.cache
def runtime_cuda() -> ModuleType:
    """Return the module whose kernels NVRTC compiles at their first launch."""
    left_out = f"hypenet_kernels: the CUDA kernels were left out of the build: {build_info()['cuda']}"
    if not _nvrtc.is_installed():
        raise NotImplementedError(f"{left_out}. To compile them when they are used: {_nvrtc.INSTALL}")
    try:
        module = importlib.import_module(f"{__package__}._cuda_rtc")
    except ModuleNotFoundError as error:
        raise NotImplementedError(left_out) from error
    module.set_compiler(_nvrtc.compile_kernel)
    return module


@functools.cache
def cuda_for(capability: tuple[int, int]) -> ModuleType:
    """Return the module to launch from on a GPU: kernels that nvcc compiled for it, else NVRTC, else nvcc's PTX.

    Raises:
        NotImplementedError: If nvcc was newer than the driver, and NVRTC is not installed.
    """
    built = built_cuda()
    if built is None:
        return runtime_cuda()
    compiled, driver = (version // 1000 for version in built.versions())
    if compiled <= driver and (runs_on(build_info()["cuda_targets"], capability) or not _nvrtc.is_installed()):
        return built
    if not _nvrtc.is_installed():
        raise NotImplementedError(
            f"hypenet_kernels: the kernels need a driver of CUDA {compiled}, as nvcc was, got one of CUDA {driver}: "
            f"update it, or {_nvrtc.INSTALL}"
        )
    return runtime_cuda()


def runs_on(targets: str, capability: tuple[int, int]) -> bool:
    """Whether machine code for one of these targets, like "8.0;9.0a+PTX", runs on a GPU of this compute capability."""
    for major, minor, kind in re.findall(r"(\d+)\.(\d)([af]?)", targets):
        oldest = int(major), int(minor)
        same_major = oldest[0] == capability[0] and oldest <= capability
        if oldest == capability or (same_major and kind != "a"):
            return True
    return False


@functools.cache
def build_info() -> dict[str, Any]:
    """Return what setup.py recorded: compiler, cuda_targets (None without CUDA), cuda (nvcc, or why there is none)."""
    path = Path(__file__).with_name("_build.json")
    if not path.is_file():
        return {"compiler": None, "cuda_targets": None, "cuda": "nothing is built here"}
    info: dict[str, Any] = json.loads(path.read_text())
    return info


@functools.cache
def kernel(op: str, name: str, device: torch.device) -> Callable[[dict[str, Any]], None]:
    """Return the kernel `name` for `device`, a function of its params' fields. The first use by `op` is logged."""
    if device.type == "cpu":
        logger.info("%s: C++ (_cpu_%s)", op, level())
        run: Callable[[dict[str, Any]], None] = getattr(cpu(), name)
        return run
    module = cuda_for(torch.cuda.get_device_capability(device))
    logger.info("%s: CUDA (%s) on %s", op, module.__name__.rpartition(".")[2], device)
    return functools.partial(_on_current_stream, getattr(module, name), device)


def _on_current_stream(launch: Callable[..., None], device: torch.device, fields: dict[str, Any]) -> None:
    with torch.cuda.device(device):
        launch(fields, (device.index, torch.cuda.current_stream().cuda_stream))


def launch(op: str, name: str, x: Tensor, fields: dict[str, Any]) -> None:
    """Run the kernel `name` of an op of TRITON_OPS on x's device.

    Args:
        fields: The fields of its params struct: numbers, None, and contiguous tensors instead of pointers.
    """
    if in_triton(x):
        from hypenet_kernels import triton_kernels  # here, since there may be no Triton

        log_use(op, f"Triton on {x.device}")
        triton_kernels.launch(name, fields)
        return
    given = {
        key: pointer(value) if value is None or isinstance(value, Tensor) else value for key, value in fields.items()
    }
    kernel(op, name, x.device)(given | {"num_threads": threads()})


def in_triton(x: Tensor) -> bool:
    """Whether the ops of TRITON_OPS run their Triton kernels on x."""
    return x.is_cuda


def runs_in_torch(op: str, x: Tensor) -> bool:
    """Whether an op of TRITON_OPS has no kernel for x: on CUDA without Triton."""
    if TRITON or not x.is_cuda:
        return False
    if not torch.compiler.is_compiling():
        log_use(op, "torch, since Triton is not installed")
    return True


@functools.cache
def log_use(op: str, implementation: str) -> None:
    """Log the first use of an implementation that is not one of the native modules."""
    logger.info("%s: %s", op, implementation)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type in which kernels accumulate and keep states: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def on_cuda(x: Tensor) -> bool:
    """Whether the CUDA kernels run on x."""
    return x.is_cuda


def empty_like(x: Tensor) -> Tensor:
    """Return a new contiguous tensor of x's shape, dtype and device."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def view(x: Tensor | None) -> tuple[int, int, int, int]:
    """(pointer, strides of batch, token, head) of a [B, T, heads, dim] or [B, T, heads] tensor; ABSENT for None."""
    if x is None:
        return ABSENT
    strides = x.stride()
    return x.data_ptr(), strides[0], strides[1], strides[2]


def threads() -> int:
    """Return how many threads a CPU kernel may use: torch's number, in a forked child 1.

    The threads of libgomp do not survive a fork, and a child that uses several waits for them for ever. (torch's own
    ops do; its DataLoader therefore sets their number to 1 in its workers.)
    """
    return 1 if _forked else torch.get_num_threads()


def _after_fork() -> None:
    global _forked
    _forked = True


_forked = False
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def indices(x: Tensor | None) -> tuple[int, bool]:
    """(pointer, whether int32) of a contiguous int32 or int64 tensor; (0, False) for None."""
    return (0, False) if x is None else (x.data_ptr(), x.dtype == torch.int32)


def pointer(x: Tensor | None) -> int:
    """Address of a contiguous tensor; 0 for None."""
    return 0 if x is None else x.data_ptr()


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def bounds(cu_seqlens: Tensor | None) -> Tensor | None:
    """cu_seqlens as kernels read them: contiguous int64."""
    return None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()


def dense_last(x: Tensor) -> Tensor:
    """Return x itself if its last dimension is contiguous (any other strides are fine), else a contiguous copy."""
    return x if x.is_contiguous() or x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def rows(x: Tensor, width: int) -> Tensor:
    """x [..., dim] as kernels read it: contiguous rows, on CUDA at multiples of 16 bytes and zero-padded to `width`.

    Returns x itself where it is so already. Zeros change no product, and no output but their own.
    """
    if not on_cuda(x):
        return x if x.is_contiguous() else dense_last(x)
    x = padded(x, width)
    step = 16 // x.element_size()
    strides = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    if x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(stride % step == 0 for stride in strides):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def padded(x: Tensor, *size: int) -> Tensor:
    """Return x with its last dimensions enlarged to `size` by zeros."""
    have = x.shape[-len(size) :]
    if have == size:
        return x
    missing = [n - m for n, m in zip(size, have, strict=True)]
    return torch.nn.functional.pad(x, [side for n in reversed(missing) for side in (0, n)])


def buffer(x: Tensor, *size: int) -> Tensor:
    """Return what a kernel writes in place of x: x itself, or a new tensor if its last dimensions are not `size`."""
    return x if x.shape[-len(size) :] == size else x.new_empty(*x.shape[: -len(size)], *size)


def narrowed(wide: Tensor, x: Tensor) -> Tensor:
    """Return the part of wide = buffer(x, ...) that belongs to x."""
    return x if wide is x else wide[tuple(slice(n) for n in x.shape)].contiguous()
