"""Run the CUDA kernels on the host: build csrc/emu with the .cu files, and route public ops on CPU tensors to it.

A test requests the fixture `device` and creates its tensors there:

    def test_step(device):
        o = gated_delta_step(*(x.to(device) for x in inputs), state.to(device))

Emulated, `device` is the CPU, and every op that has a CUDA implementation runs it, with its kernels on the emulator.
Under the marker `cuda` it is the GPU. An error in a kernel raises RuntimeError naming kernel, block and thread.
"""

import contextlib
import fcntl
import functools
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
import warnings
import zlib
from pathlib import Path

import pytest
import torch

from hypenet_kernels import _native

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "emu"
SEEDS = (0, 1, 2)  # schedules, for tests that run several
COMMON = (
    "-std=c++20 -fPIC -g1 -fvisibility=hidden -Wall -Wextra -Wno-unknown-pragmas -DHYPENET_CUDA=1 -DHYPENET_EMULATED=1"
)
MACHINE = "-O3 -fno-math-errno"
# csrc/emu/access.cpp implements the calls that -fsanitize=thread inserts, in place of libtsan. gcc must not turn loops
# into memcpy or memset, nor expand memcpy inline: the accesses that it would generate are not instrumented.
KERNEL = "-O1 -x c++ -fsanitize=thread"
GCC_KERNEL = (
    "--param tsan-instrument-func-entry-exit=0 -fno-tree-loop-distribute-patterns"
    " -fno-builtin-memcpy -fno-builtin-memset -fno-builtin-memmove"
)
CLANG_KERNEL = "-mllvm -tsan-instrument-func-entry-exit=0 -mllvm -tsan-instrument-read-before-write=1"
NEW_LINE = "\n"  # f-strings of Python 3.11 cannot contain a backslash
WRITABLE_VIEWS = ("k_cache", "v_cache", "conv_state")
_POINTER, _VIEW, _INDICES = _native.pointer, _native.view, _native.indices


def compiler():
    return os.environ.get("CXX") or next(name for name in ("g++", "clang++", "c++") if shutil.which(name))


def _write_ninja(path, module, bindings, kernels):
    import ninja
    import pybind11

    kernel_flags = f"{KERNEL} {CLANG_KERNEL if 'clang' in compiler() else GCC_KERNEL}"
    includes = [f"-I{ROOT}/csrc", f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_paths()['include']}"]
    command = f"nice -n 5 {compiler()} {COMMON} {shlex.join(includes)} $flags -MMD -MF $out.d -c $in -o $out"
    with open(path, "w") as file:
        writer = ninja.ninja_syntax.Writer(file, width=10**6)
        writer.rule("compile", command, depfile="$out.d", deps="gcc")
        writer.rule("link", f"{compiler()} -shared $in -o $out -ldl")
        # The emulator comes first: for inline functions that kernels use too, the linker keeps its uninstrumented copy.
        sources = [(s, "machine", MACHINE) for s in sorted((ROOT / "csrc/emu").glob("*.cpp"))]
        sources += [(bindings, module, "-O0 -g0"), *((s, module, kernel_flags) for s in kernels)]
        objects = []
        for source, folder, flags in sources:
            variables = {"flags": f"{flags} {os.environ.get('CXXFLAGS', '')}"}
            objects += writer.build(f"{folder}/{source.stem}.o", "compile", str(source), variables=variables)
        writer.build(f"{module}.so", "link", objects)


@functools.cache
def _compile(module, bindings, kernels):
    """Build the changed parts of a module; return the compiler's errors, or ""."""
    import ninja

    BUILD.mkdir(parents=True, exist_ok=True)
    command = [Path(ninja.BIN_DIR, "ninja"), "-C", BUILD, "-f", f"{module}.ninja", "-j2", "--quiet"]
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one test process builds, others wait
        _write_ninja(BUILD / f"{module}.ninja", module, bindings, kernels)
        result = subprocess.run(command, capture_output=True, text=True)
    return f"{module} does not compile:\n{result.stdout[-8000:]}{result.stderr}" if result.returncode else ""


def build(module, bindings, kernels):
    """Build and load a native module that runs `kernels` on the emulator."""
    if errors := _compile(module, bindings, tuple(kernels)):
        raise RuntimeError(errors)
    spec = importlib.util.spec_from_file_location(module, BUILD / f"{module}.so")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@functools.cache
def module():
    """Return the module with the library's CUDA kernels on the emulator."""
    return build("_emulated", ROOT / "csrc/bindings.cpp", sorted((ROOT / "csrc/cuda").glob("*.cu")))


def launch(module, kernel, tensors, **fields):
    """Call a kernel of an emulated module; it may access only `tensors`, given by field name."""
    written = (*kernel.__doc__.rpartition("Writes: ")[2].rstrip(".\n").split(", "), *WRITABLE_VIEWS)
    module.set_tensors(
        [
            (name, x.data_ptr(), x.element_size(), list(x.shape), list(x.stride()), name in written)
            for name, x in tensors.items()
        ]
    )
    try:
        kernel(fields, (0, 0))
    except RuntimeError as error:
        raise RuntimeError(f"{error}{''.join(f'{NEW_LINE}  at {place}' for place in _call_chain(module))}") from None
    finally:
        module.set_tensors([])


def _call_chain(module):
    """Return the source lines of the last error, innermost call first; empty without addr2line."""
    offsets = module.call_chain()
    if not offsets or not shutil.which("addr2line"):
        return []
    command = ["addr2line", "-ie", module.__file__, *map(hex, offsets)]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    places = [os.path.relpath(line.partition(" (discriminator")[0], ROOT) for line in lines]
    return [place for place in places if not place.startswith(("..", "csrc/emu"))]


class _Call:
    """One run of an op's CUDA implementation; remembers the tensor from which each field was filled."""

    def __init__(self):
        self.tensors = {}

    def pointer(self, x):
        return self._remember(x, _POINTER(x))

    def view(self, x):
        return self._remember(x, _VIEW(x))

    def indices(self, x):
        return self._remember(x, _INDICES(x))

    def _remember(self, x, field):
        if x is not None and x.numel() > 0:
            self.tensors[field] = self.tensors[x.data_ptr()] = x
        return field

    def _find(self, field):
        """Look up a field by its value, which distinguishes views of one storage, or else by its address."""
        address = field[0] if isinstance(field, tuple) else field
        return self.tensors.get(field, self.tensors.get(address))

    def kernel(self, op, name, device):
        if op.removesuffix("_bwd") in _native.TRITON_OPS:  # there is nothing to emulate
            return getattr(_native.cpu(), name)
        return functools.partial(self.launch, getattr(module(), name))

    def launch(self, kernel, fields):
        tensors = {name: x for name, field in fields.items() if (x := self._find(field)) is not None}
        launch(module(), kernel, tensors, **fields)


def _run_cuda_implementation(operator, *args):
    call = _Call()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("pointer", "view", "indices", "kernel"):
            patch.setattr(_native, name, getattr(call, name))
        patch.setattr(_native, "cuda", module)
        return operator.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args)


@contextlib.contextmanager
def emulated(seed=0):
    """Within the context, ops on CPU tensors run their CUDA implementation, if any, on the emulator."""
    module().set_seed(seed)
    library = torch.library.Library("hypenet", "IMPL")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="[^$]*other operators may also be overridden")
        patch.setattr(_native, "on_cuda", lambda x: x.is_cpu or x.is_cuda)
        for qualified in torch._C._dispatch_get_all_op_names():
            if qualified.startswith("hypenet::") and torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CUDA"):
                name = qualified.removeprefix("hypenet::")
                run = functools.partial(_run_cuda_implementation, getattr(torch.ops.hypenet, name).default)
                library.impl(name, run, "CPU", allow_override=True)
        try:
            yield
        finally:
            library._destroy()


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """The device on which the CUDA kernels run: the CPU, with the kernels on the emulator, or the GPU.

    Emulated, every test has its own fixed schedule of threads; emulated(seed) selects another one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the reference's products are too small to gain from several
    try:
        if request.param == "cuda":
            yield torch.device("cuda")
        else:
            with emulated(zlib.crc32(request.node.name.encode())):
                yield torch.device("cpu")
    finally:
        torch.set_num_threads(threads)
