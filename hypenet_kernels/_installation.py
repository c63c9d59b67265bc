"""What is built here, and which implementation each op uses on each device, and why."""

import importlib.metadata
import importlib.util
import platform
from pathlib import Path

import torch

from hypenet_kernels import _native

OPS = (
    "chunk_gated_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "gated_delta_step",
    "chunk_simple_gla",
    "fused_recurrent_simple_gla",
    "simple_gla_step",
    "hype_attention",
    "hype_attention_decode",
)


def report():
    """Facts about this installation, as a dict of plain data; `python -m hypenet_kernels` prints it.

    Keys: version, folder, python, torch, threads, processor, level, modules (name -> built?), compiler, cuda_targets
    (None without CUDA), cuda (nvcc, or why there is no CUDA module), gpus, openmp (runtimes in this process) and ops:
    op -> device -> {"implementation": str or None where the op raises, "why": str}.
    """
    info = _native.build_info()
    return {
        "version": _version(),
        "folder": str(Path(__file__).parent),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        "level": _native.level(),
        "modules": {name: _is_built(name) for name in ("_cpu_baseline", "_cpu_v3", "_cpu_v4", "_cpu_v4_bf16", "_cuda")},
        "compiler": info["compiler"],
        "cuda_targets": info["cuda_targets"],
        "cuda": info["cuda"],
        "gpus": _gpus(),
        "openmp": _openmp_runtimes(),
        "ops": {op: {"cpu": _on_cpu(), "cuda": _on_cuda(op)} for op in OPS},
    }


def _on_cpu():
    module = f"_cpu_{_native.level()}"
    if not _is_built(module):
        return {"implementation": None, "why": f"hypenet_kernels.{module} is not built"}
    capability = torch.backends.cpu.get_cpu_capability()
    return {"implementation": f"C++ ({module})", "why": f"torch reports {capability} for this processor"}


def _on_cuda(op):
    if op not in _native.CUDA_OPS:
        return {"implementation": None, "why": "no CUDA kernel is written for it"}
    info = _native.build_info()
    if not _is_built("_cuda"):
        return {"implementation": None, "why": info["cuda"]}
    return {"implementation": "CUDA (_cuda)", "why": f"built for {info['cuda_targets']}; {_gpus() or 'no GPU visible'}"}


def _is_built(module):
    return importlib.util.find_spec(f"hypenet_kernels.{module}") is not None


def _version():
    try:
        return importlib.metadata.version("hypenet")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor():
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpus():
    """Names and compute capabilities, without starting CUDA where there is no device."""
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{gpu.name} ({gpu.major}.{gpu.minor})" for gpu in found]


def _openmp_runtimes():
    """Files of the OpenMP runtimes loaded by now; more than one would mean two thread pools."""
    maps = Path("/proc/self/maps")
    paths = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines()} if maps.is_file() else set()
    return sorted(p for p in paths if any(name in Path(p).name for name in ("libgomp", "libiomp", "libomp")))
