"""Compiles CUDA kernels with NVRTC to cubins, and keeps them in the user's cache folder.

The C++ module `_cuda_rtc` calls `compile_kernel` at a kernel's first launch on a device. The key of a cubin is a hash
of the sources, the options, NVRTC's version and the kernel's name: there is nothing to invalidate. A file holds a line
of JSON and then the cubin; one that is damaged counts as missing.
"""

import functools
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import re
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

Capability = tuple[int, int]

SOURCES = Path(__file__).with_name("csrc")
INSTALL = (
    "pip install 'hypenet[cuda]' for a torch of CUDA 13, 'hypenet[cuda12]' for one of CUDA 12 (cuda-bindings and NVRTC)"
)
FLAGS = ("--std=c++20", "-default-device", "--ptxas-options=-v")  # NVRTC 12 takes no lambda without -default-device

logger = logging.getLogger("hypenet_kernels")


@dataclass(frozen=True)
class Cubin:
    """A compiled kernel: machine code, its symbol in it, and what the compiler said ("" if read from the cache)."""

    code: bytes
    symbol: str
    log: str = ""


def is_installed() -> bool:
    """Whether cuda.bindings is there, through which NVRTC is called."""
    try:
        return importlib.util.find_spec("cuda.bindings.nvrtc") is not None
    except ModuleNotFoundError:
        return False


def version() -> tuple[int, int]:
    """Return NVRTC's version, as (major, minor)."""
    major, minor = _checked(_nvrtc().nvrtcVersion())
    return major, minor


def architecture(capability: Capability) -> str:
    """Return the target for a GPU: "sm_90a" for (9, 0), the nearest older one of its major if NVRTC lacks it.

    Raises:
        NotImplementedError: if this NVRTC has no target whose code runs on the GPU.
    """
    major, minor = capability
    (supported,) = _checked(_nvrtc().nvrtcGetSupportedArchs())
    number = max((n for n in supported if n // 10 == major and n % 10 <= minor), default=None)
    if major < 8 or number is None:
        rule = "need a GPU of compute capability 8.0 or more" if major < 8 else f"need an NVRTC newer than {_dotted()}"
        raise NotImplementedError(f"hypenet_kernels: the CUDA kernels {rule}, got one of {major}.{minor}")
    return f"sm_{number}a" if major >= 9 and number == 10 * major + minor else f"sm_{number}"


def compile_kernel(source: str, expression: str, capability: Capability) -> tuple[bytes, bytes]:
    """Return (cubin, symbol) of a kernel for a GPU, from the cache or NVRTC.

    Args:
        source: the header of csrc/cuda that defines it.
        expression: its name in C++, with template arguments.
        capability: the GPU's compute capability.

    Raises:
        NotImplementedError: if NVRTC is not installed or does not know the GPU.
        RuntimeError: if NVRTC refuses the kernel.
    """
    target = architecture(capability)
    path = _cache_path(source, expression, target)
    found = _read(path)
    if found is None:
        logger.info("compiling %s for %s with NVRTC %s", short_name(expression), target, _dotted())
        found = build(source, expression, target)
        _publish(path, found)
    return found.code, found.symbol.encode()


def is_cached(source: str, expression: str, capability: Capability) -> bool:
    """Whether compile_kernel would read the kernel from the cache."""
    return _read(_cache_path(source, expression, architecture(capability))) is not None


def build(source: str, expression: str, target: str) -> Cubin:
    """Compile a kernel with NVRTC, past the cache."""
    nvrtc = _nvrtc()
    text, name = f'#include "{source}"\n'.encode(), expression.encode()
    (program,) = _checked(nvrtc.nvrtcCreateProgram(text, f"{Path(source).stem}.cu".encode(), 0, [], []))
    try:
        _checked(nvrtc.nvrtcAddNameExpression(program, name))
        options = [option.encode() for option in _options(target)]
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = _text(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).rstrip(b"\0").decode()
        if int(result):
            what = f"NVRTC {_dotted()} could not compile {short_name(expression)} for {target}"
            raise RuntimeError(f"hypenet_kernels: {what}:\n{log}")
        (symbol,) = _checked(nvrtc.nvrtcGetLoweredName(program, name))
        return Cubin(_text(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN), symbol.decode(), log)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def short_name(expression: str) -> str:
    """Return a kernel's name without namespaces, "gated_delta_fill_kernel<GatedDeltaFwdParams>"."""
    return re.sub(r"\w+::", "", expression)


def cache_folder() -> Path | None:
    """Return where cubins are kept: HYPENET_CACHE, or hypenet/ in the user's cache folder; None without a home."""
    if folder := os.environ.get("HYPENET_CACHE"):
        return Path(folder)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "hypenet")
    except RuntimeError:
        return None


@functools.cache
def _digest() -> str:
    """Hash everything that a kernel may include."""
    digest = hashlib.sha256()
    paths = [SOURCES / "params.h", *(SOURCES / "cuda").rglob("*")]
    for path in sorted(path for path in paths if path.is_file() and path.suffix not in (".cu", ".cpp")):
        name, text = path.relative_to(SOURCES).as_posix().encode(), path.read_bytes()
        digest.update(b"%d %s %d " % (len(name), name, len(text)) + text)
    return digest.hexdigest()


def _options(target: str) -> list[str]:
    cuda = SOURCES / "cuda"
    return [f"--gpu-architecture={target}", *FLAGS, f"--include-path={cuda}", f"--include-path={cuda}/rtc/include"]


def _cache_path(source: str, expression: str, target: str) -> Path | None:
    folder = cache_folder()
    if folder is None:
        return None
    key = json.dumps([_digest(), source, expression, target, FLAGS, version()])
    return folder / f"{Path(source).stem}-{target}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin"


def _read(path: Path | None) -> Cubin | None:
    """Return what a file of the cache holds, None where there is none or it is damaged."""
    if path is None:
        return None
    try:
        line, _, code = path.read_bytes().partition(b"\n")
        header = json.loads(line)
        whole = header["sha256"] == hashlib.sha256(code).hexdigest()
        return Cubin(code, header["symbol"]) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _publish(path: Path | None, cubin: Cubin) -> None:
    """Write a cubin under a name of its own, then move it: no process sees half of it. Without room, go on without."""
    if path is None:
        return
    header = {"symbol": cubin.symbol, "sha256": hashlib.sha256(cubin.code).hexdigest()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".part", delete=False) as file:
            try:
                file.write(json.dumps(header).encode() + b"\n" + cubin.code)
                file.close()
                os.replace(file.name, path)
            except OSError:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        _warn_once(f"hypenet_kernels: compiled kernels are not kept in {path.parent}: {error.strerror or error}")


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


@functools.cache
def _nvrtc() -> ModuleType:
    """Return cuda.bindings.nvrtc, of the major version of torch's CUDA: a driver loads no code of a newer major."""
    if not is_installed():
        raise NotImplementedError(f"hypenet_kernels: NVRTC is not installed: {INSTALL}")
    nvrtc = importlib.import_module("cuda.bindings.nvrtc")
    try:
        major, minor = _checked(nvrtc.nvrtcVersion())
    except (RuntimeError, OSError) as error:
        raise NotImplementedError(f"hypenet_kernels: NVRTC cannot be loaded ({error}): {INSTALL}") from error
    if torch.version.cuda and int(torch.version.cuda.partition(".")[0]) != major:
        raise NotImplementedError(
            f"hypenet_kernels: NVRTC must be of torch's CUDA {torch.version.cuda}, got {major}.{minor}: {INSTALL}"
        )
    return nvrtc


def _dotted() -> str:
    return "{}.{}".format(*version())


def _text(program: Any, size: Any, read: Any) -> bytes:
    (count,) = _checked(size(program))
    buffer = b" " * count
    _checked(read(program, buffer))
    return buffer


def _checked(results: tuple[Any, ...]) -> tuple[Any, ...]:
    if int(results[0]):
        raise RuntimeError(f"hypenet_kernels: NVRTC: {results[0].name}")
    return results[1:]
