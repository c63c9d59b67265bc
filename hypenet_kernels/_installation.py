"""Reports what is built here, and which implementation each op uses on each device, and why."""

import importlib.metadata
import importlib.util
import platform
from pathlib import Path
from typing import Any

import torch

from hypenet_kernels import _native, _nvrtc


def _version() -> str:
    if "version" in _native.build_info():  # of a copy that _hub.py wrote
        return str(_native.build_info()["version"])
    try:
        return importlib.metadata.version("hypenet")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


__version__ = _version()


def report() -> dict[str, Any]:
    """Return facts about this installation, as a dict of plain data; `show_config` prints it.

    Keys: version, folder, python, torch, threads, processor, level, modules (name -> built?), compiler, cuda_targets
    (None without nvcc), cuda (nvcc, or why its module was left out), nvrtc (version, None where it cannot be used),
    cubins (the folder of kernels that NVRTC compiled), gpus, openmp (runtimes in this process) and ops:
    op -> device -> {"implementation": str or None where the op raises, "why": str}.
    """
    info = _native.build_info()
    return {
        "version": __version__,
        "folder": str(Path(__file__).parent),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        "level": _native.level(),
        "modules": {
            name: _is_built(name)
            for name in ("_cpu_baseline", "_cpu_v3", "_cpu_v4", "_cpu_v4_bf16", "_cuda", "_cuda_rtc")
        },
        "compiler": info["compiler"],
        "cuda_targets": info["cuda_targets"],
        "cuda": info["cuda"],
        "nvrtc": _nvrtc_version()[0],
        "cubins": str(_nvrtc.cache_folder()),
        "gpus": _gpus(),
        "openmp": _openmp_runtimes(),
        "ops": {op: {"cpu": _on_cpu(), "cuda": _on_cuda(op)} for op in _native.CUDA_OPS},
    }


def show_config() -> None:
    """Print what `report` returns, as numpy.show_config and torch.__config__.show do for theirs."""
    facts = report()
    built = ", ".join(name for name, there in facts["modules"].items() if there) or "no native module"
    cuda = f"for {facts['cuda_targets']} by {facts['cuda']}" if facts["cuda_targets"] else f"not built: {facts['cuda']}"
    print(f"hypenet_kernels {facts['version']} in {facts['folder']}")
    print(f"  torch      {facts['torch']}, Python {facts['python']}, {facts['threads']} threads")
    print(f"  processor  {facts['processor']}: level {facts['level']}")
    print(f"  built      {built} ({facts['compiler']})")
    print(f"  CUDA       {cuda}")
    print(f"  NVRTC      {_nvrtc_version()[1]}")
    print(f"  GPU        {', '.join(facts['gpus']) or 'none visible'}")
    print("\nops")
    for op, devices in facts["ops"].items():
        for device, choice in devices.items():
            print(f"  {op:33} {device:5} {choice['implementation'] or 'raises'}: {choice['why']}")


def _on_cpu() -> dict[str, str | None]:
    module = f"_cpu_{_native.level()}"
    if not _is_built(module):
        return {"implementation": None, "why": f"hypenet_kernels.{module} is not built"}
    capability = torch.backends.cpu.get_cpu_capability()
    return {"implementation": f"C++ ({module})", "why": f"torch reports {capability} for this CPU"}


def _on_cuda(op: str) -> dict[str, str | None]:
    """What the current GPU runs; without one, what one for which nvcc compiled the kernels would run."""
    info, gpus = _native.build_info(), _gpus()
    seen = ", ".join(gpus) or "no GPU visible"
    if op in _native.TRITON_OPS:
        if _native.TRITON:
            return {"implementation": "Triton", "why": f"Triton is installed; {seen}"}
        return {"implementation": "torch", "why": "Triton is not installed"}
    version, why = _nvrtc_version()
    if gpus:
        try:
            chosen = _native.cuda_for(torch.cuda.get_device_capability()).__name__.rpartition(".")[2]
        except NotImplementedError as error:
            return {"implementation": None, "why": str(error).removeprefix("hypenet_kernels: ")}
        source = f"built for {info['cuda_targets']}" if chosen == "_cuda" else f"NVRTC {why}"
        return {"implementation": f"CUDA ({chosen})", "why": f"{source}; {seen}"}
    if _is_built("_cuda"):
        return {"implementation": "CUDA (_cuda)", "why": f"built for {info['cuda_targets']}; {seen}"}
    if _is_built("_cuda_rtc") and version is not None:
        return {"implementation": "CUDA (_cuda_rtc)", "why": f"NVRTC {why}; {seen}"}
    return {"implementation": None, "why": f"{info['cuda']}; NVRTC: {why}"}


def _nvrtc_version() -> tuple[str | None, str]:
    """Return (version or None, version and cache, or what is missing)."""
    try:
        version = "{}.{}".format(*_nvrtc.version())
    except NotImplementedError as error:
        return None, str(error).removeprefix("hypenet_kernels: ")
    return version, f"{version}, kernels kept in {_nvrtc.cache_folder() or 'no folder'}"


def _is_built(module: str) -> bool:
    return importlib.util.find_spec(f"{__package__}.{module}") is not None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpus() -> list[str]:
    """Names and compute capabilities, without starting CUDA where there is no device."""
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{gpu.name} ({gpu.major}.{gpu.minor})" for gpu in found]


def _openmp_runtimes() -> list[str]:
    """Files of the OpenMP runtimes loaded by now; more than one would mean two thread pools."""
    maps = Path("/proc/self/maps")
    paths = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines()} if maps.is_file() else set()
    return sorted(p for p in paths if any(name in Path(p).name for name in ("libgomp", "libiomp", "libomp")))
