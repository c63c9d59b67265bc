"""Loads the native modules and passes tensors to them as pointers, strides and streams."""

import functools
import importlib
import json
import logging
import os
from pathlib import Path

import torch  # before any native module, so that both share torch's OpenMP runtime

DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # csrc/params.h, DType
LEVELS = {"AVX512": "v4", "AVX2": "v3"}  # torch's name of the processor's level -> ours; anything else is the baseline
HALF = (torch.bfloat16, torch.float16)
CUDA_OPS = {  # the ops that have a CUDA kernel, and for which dtypes
    "chunk_gated_delta_rule": HALF,
    "fused_recurrent_gated_delta_rule": (torch.float32, *HALF),
    "chunk_simple_gla": HALF,
    "fused_recurrent_simple_gla": (torch.float32, *HALF),
    "gated_delta_step": (torch.float32, *HALF),
    "simple_gla_step": (torch.float32, *HALF),
    "hype_attention": HALF,
    "hype_attention_decode": HALF,
}
ABSENT = (0, 0, 0, 0)  # the View of an optional tensor that is not there

logger = logging.getLogger("hypenet_kernels")


def level():
    """The instruction-set level whose module this processor runs: baseline, v3, v4 or v4_bf16.

    torch knows no level above AVX512, so that an ATEN_CPU_CAPABILITY that names this one means it without bfloat16.
    """
    name = LEVELS.get(torch.backends.cpu.get_cpu_capability(), "baseline")
    return f"{name}_bf16" if name == "v4" and "ATEN_CPU_CAPABILITY" not in os.environ and _multiplies_bf16() else name


def _multiplies_bf16():
    """Whether the processor has AVX512-BF16; False where this torch cannot say."""
    return getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)


@functools.cache
def cpu():
    """The CPU module compiled for this processor's instruction set."""
    name = f"hypenet_kernels._cpu_{level()}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        folder = Path(__file__).parent
        raise ImportError(
            f"hypenet_kernels: {name} is not built in {folder}. In a checkout build it with `pip install -e .`; to use "
            "an installed copy instead, run outside the checkout"
        ) from error


@functools.cache
def cuda():
    """The CUDA module. Importing it needs no driver."""
    try:
        return importlib.import_module("hypenet_kernels._cuda")
    except ModuleNotFoundError as error:
        raise NotImplementedError(
            f"hypenet_kernels: the CUDA kernels were left out of the build: {build_info()['cuda']}"
        ) from error


@functools.cache
def build_info():
    """What setup.py wrote: compiler, cuda_targets (None without CUDA), cuda (nvcc, or why there is no CUDA module)."""
    path = Path(__file__).with_name("_build.json")
    if not path.is_file():
        return {"compiler": None, "cuda_targets": None, "cuda": "nothing is built here"}
    return json.loads(path.read_text())


@functools.cache
def kernel(op, name, device):
    """What runs the kernel `name` on `device`, for `op`, given a dict of its params' fields. Said once in the log."""
    if device.type == "cpu":
        logger.info("%s: C++ (_cpu_%s)", op, level())
        return getattr(cpu(), name)
    launch = getattr(cuda(), name)
    logger.info("%s: CUDA (_cuda) on %s", op, device)
    return functools.partial(_on_current_stream, launch, device)


def _on_current_stream(launch, device, fields):
    with torch.cuda.device(device):
        launch(fields, torch.cuda.current_stream().cuda_stream)


def accumulator(dtype):
    """The type in which kernels accumulate and keep states: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def on_cuda(x):
    """Whether the CUDA kernels run on x."""
    return x.is_cuda


def empty_like(x):
    """A new contiguous tensor of x's shape, dtype and device."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def view(x):
    """(pointer, strides of batch, token, head) of a [B, T, heads, dim] or [B, T, heads] tensor; ABSENT for None."""
    if x is None:
        return ABSENT
    strides = x.stride()
    return x.data_ptr(), strides[0], strides[1], strides[2]


def indices(x):
    """Address of a contiguous int32 or int64 tensor, and whether it is int32; (0, False) for None."""
    return (0, False) if x is None else (x.data_ptr(), x.dtype == torch.int32)


def pointer(x):
    """Address of a contiguous tensor; 0 for None."""
    return 0 if x is None else x.data_ptr()


def dense_last(x):
    """x itself where its last dimension is contiguous (any other strides are fine), else a contiguous copy."""
    dense = x is None or x.is_contiguous() or x.stride(-1) == 1 or x.shape[-1] <= 1
    return x if dense else x.contiguous()


def aligned_rows(x):
    """x itself where its rows are contiguous and begin at multiples of 16 bytes, else a copy."""
    if x is None:
        return None
    step = 16 // x.element_size()
    strides = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    if x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(stride % step == 0 for stride in strides):
        return x
    return x.clone(memory_format=torch.contiguous_format)
