"""Loads the native modules and passes tensors to them as pointers and strides."""

import functools
import importlib

import torch  # before any native module, so that both share torch's OpenMP runtime

DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # csrc/params.h, DType
LEVELS = {"AVX512": "v4", "AVX2": "v3"}  # torch's name of the processor's level -> ours; anything else is the baseline
ABSENT = (0, 0, 0, 0)  # the View of an optional tensor that is not there


@functools.cache
def cpu():
    """The CPU module compiled for this processor's instruction set."""
    level = LEVELS.get(torch.backends.cpu.get_cpu_capability(), "baseline")
    return importlib.import_module(f"hypenet_kernels._cpu_{level}")


def accumulator(dtype):
    """The type in which kernels accumulate and keep states: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def view(x):
    """(pointer, strides of batch, token, head) of a [B, T, heads, dim] or [B, T, heads] tensor; ABSENT for None."""
    return ABSENT if x is None else (x.data_ptr(), *x.stride()[:3])


def pointer(x):
    """Address of a contiguous tensor; 0 for None."""
    return 0 if x is None else x.data_ptr()


def dense_last(x):
    """x itself where its last dimension is contiguous (any other strides are fine), else a contiguous copy."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
