"""Builds the native modules: one CPU module per instruction-set level, and the CUDA module where nvcc is found.

Needs no PyTorch. What decides is a pure function of the environment; NinjaBuild writes one build.ninja and runs it.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
X86_LEVELS = {"baseline": [], "v3": ["-march=x86-64-v3"], "v4": ["-march=x86-64-v4"]}
LEVELS = X86_LEVELS if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}
CXX_FLAGS = shlex.split("-std=c++20 -O3 -fPIC -fopenmp -fvisibility=hidden -fno-math-errno -Wall -Wextra")
NVCC_FLAGS = shlex.split(
    "-std=c++20 -O3 -Xcompiler=-fPIC,-fvisibility=hidden -Xptxas=--warn-on-spills,--warning-as-error"
)
BINDINGS = "csrc/bindings.cpp"
HIDE_CUDART = "-Xlinker=--exclude-libs=ALL"  # or its calls may bind to another CUDA runtime in the process
CUDA_TARGETS = "8.0;9.0a+PTX"
GB_PER_JOB = 1.5  # of memory, for one compiler
NO_CXX = (
    "install g++ 11 or newer (Debian, Ubuntu: apt install build-essential; Fedora: dnf install gcc-c++), or set CXX"
)
NO_HEADERS = "install Python's headers (Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel)"
CXX20_PROBE = "#include <bit>\n#include <concepts>\n#include <omp.h>\nint main() { return std::bit_cast<int>(1.0f); }\n"


def find_compiler(env):
    """The C++ compiler, as words, after a trial of C++20 and OpenMP; without one, ends with what to install."""
    usual = [name for name in ("g++", "c++", "clang++") if shutil.which(name, path=env.get("PATH"))]
    cxx = shlex.split(env.get("CXX", "")) or usual[:1]
    if not cxx or not shutil.which(cxx[0], path=env.get("PATH")):
        sys.exit(f"hypenet: no C++ compiler ({' '.join(cxx) or 'g++, c++, clang++'}) was found: {NO_CXX}")
    probe = [*cxx, "-std=c++20", "-fopenmp", "-fsyntax-only", "-x", "c++", "-"]
    trial = subprocess.run(probe, input=CXX20_PROBE, text=True, capture_output=True)
    if trial.returncode:
        sys.exit(f"hypenet: {' '.join(cxx)} lacks C++20 or OpenMP: {NO_CXX}\n{trial.stderr}")
    return cxx


def find_nvcc(env, usual="/usr/local/cuda", site_packages=tuple(sys.path)):
    """Path of nvcc by CUDA_HOME, CUDA_PATH, PATH, the usual folder, pip's nvidia packages; None where there is none."""
    candidates = [Path(env[name], "bin/nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if env.get(name)]
    candidates += [Path(folder, "nvcc") for folder in env.get("PATH", "").split(os.pathsep) if folder]
    candidates.append(Path(usual, "bin/nvcc"))
    for folder in site_packages:
        candidates += sorted(Path(folder).glob("nvidia/*/bin/nvcc"), reverse=True)
    return next((str(path) for path in candidates if path.is_file()), None)


def cuda_decision(env, nvcc):
    """(whether to build the CUDA module, why). Decided by nvcc, never by a visible GPU."""
    if env.get("HYPENET_SKIP_CUDA_BUILD", "0") not in ("", "0"):
        return False, "HYPENET_SKIP_CUDA_BUILD is set"
    reason = nvcc or "no nvcc in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda"
    if nvcc is None and env.get("FORCE_CUDA", "0") not in ("", "0"):
        sys.exit(f"hypenet: FORCE_CUDA is set, but there is {reason}")
    return nvcc is not None, reason


def gencode(targets):
    """nvcc's flags for a TORCH_CUDA_ARCH_LIST. PTX is never of the 'a' kind, which runs on no later card."""
    flags = []
    for target in targets.replace(";", " ").split():
        parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", target)
        if not parts or int(parts[1]) < 8:
            sys.exit(f"hypenet: TORCH_CUDA_ARCH_LIST must name targets >= 8.0, like '{CUDA_TARGETS}', got '{target}'")
        major, minor, kind, ptx = parts.groups()
        flags.append(f"-gencode=arch=compute_{major}{minor}{kind},code=sm_{major}{minor}{kind}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{major}{minor},code=compute_{major}{minor}")
    return flags


def num_jobs(env, cores, memory_gb):
    """Compilers that run at once: MAX_JOBS, or what cores and memory bear."""
    return int(env.get("MAX_JOBS") or max(1, min(cores, memory_gb / GB_PER_JOB)))


def ninja_rules(env, cxx, nvcc, targets):
    """One rule per compiler and per linker; `nvcc` is None without CUDA."""
    cxx_flags, ld_flags = shlex.split(env.get("CXXFLAGS", "")), shlex.split(env.get("LDFLAGS", ""))
    commands = {"cxx": [*cxx, *CXX_FLAGS, *cxx_flags], "link": [*cxx, "-shared", "-fopenmp", *ld_flags]}
    if nvcc:
        threads = f"--threads={env.get('NVCC_THREADS') or 1}"
        commands["nvcc"] = [nvcc, f"-ccbin={cxx[-1]}", *NVCC_FLAGS, *gencode(targets), threads]
        commands["nvlink"] = [nvcc, f"-ccbin={cxx[-1]}", "-shared", "-cudart=static", HIDE_CUDART]
    for rule, words in commands.items():
        step = "" if rule.endswith("link") else "-MMD -MF $out.d -c $flags "
        yield f"rule {rule}\n  command = {ninja_words(words)} {step}$in -o $out"
        if step:
            yield "  depfile = $out.d\n  deps = gcc"


def ninja_module(module, sources, flags, built):
    """The build lines of one module: an object for each source, then the link with its kind's bindings."""
    kind = module.split("_")[1]
    objects = [f"{module}/{Path(source).stem}.o" for source in sources]
    for source, target in zip(sources, objects, strict=True):
        yield f"build {target}: {'nvcc' if kind == 'cuda' else 'cxx'} {ninja_path(ROOT / source)}"
        yield f"  flags = {ninja_words(flags)}"
    yield f"build {ninja_path(built)}: {'nvlink' if kind == 'cuda' else 'link'} {' '.join(objects)} bindings_{kind}.o"


def ninja_words(words):
    return shlex.join(words).replace("$", "$$")


def ninja_path(path):
    return re.sub(r"([$ :])", r"$\1", str(path))


class NinjaBuild(build_ext):
    """Compiles all modules with one ninja run, in a folder that later builds reuse."""

    def run(self):
        import ninja
        import pybind11

        python = Path(sysconfig.get_paths()["include"])
        if not (python / "Python.h").is_file():
            sys.exit(f"hypenet: {python / 'Python.h'} is missing: {NO_HEADERS}")
        cxx, nvcc = find_compiler(os.environ), find_nvcc(os.environ)
        targets = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_TARGETS
        with_cuda, reason = cuda_decision(os.environ, nvcc)
        print("hypenet:", f"CUDA kernels for {targets} by" if with_cuda else "CPU kernels only:", reason, flush=True)
        build = Path(self.get_finalized_command("build").build_base, sys.implementation.cache_tag).absolute()
        # An isolated build has pybind11 in a new folder each time; through a link the commands stay the same.
        link = build / f"pybind11-{pybind11.__version__}"
        build.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(pybind11.get_include())

        lines = list(ninja_rules(os.environ, cxx, nvcc if with_cuda else None, targets))
        for kind in ("cpu", "cuda"):
            flags = ["-O1", f"-DHYPENET_CUDA={int(kind == 'cuda')}", f"-isystem{link.name}", f"-isystem{python}"]
            lines += [f"build bindings_{kind}.o: cxx {ninja_path(ROOT / BINDINGS)}"]
            lines += [f"  flags = {ninja_words(flags)}"]
        for extension in self.extensions:
            built = Path(self.get_ext_fullpath(extension.name)).absolute()
            built.parent.mkdir(parents=True, exist_ok=True)
            module = extension.name.split(".")[-1]
            if module == "_cuda" and not with_cuda:
                built.unlink(missing_ok=True)
            else:
                lines += ninja_module(module, extension.sources[1:], extension.extra_compile_args, built)
                lines += [f"default {ninja_path(built)}"]
        (build / "build.ninja").write_text("\n".join(lines) + "\n")
        memory_gb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        jobs = num_jobs(os.environ, len(os.sched_getaffinity(0)), memory_gb)
        if subprocess.run([Path(ninja.BIN_DIR, "ninja"), "-C", build, "-j", str(jobs)]).returncode:
            sys.exit("hypenet: compilation failed, see above" + " (HYPENET_SKIP_CUDA_BUILD=1 omits CUDA)" * with_cuda)
        info = {"compiler": " ".join(cxx), "cuda_targets": targets if with_cuda else None, "cuda": reason}
        (built.parent / "_build.json").write_text(json.dumps(info) + "\n")


def extensions():
    cpu = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/cpu/*.cpp"))]
    cuda = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/cuda/*.cu"))]
    yield Extension("hypenet_kernels._cuda", [BINDINGS, *cuda])
    for level, flags in LEVELS.items():
        yield Extension(f"hypenet_kernels._cpu_{level}", [BINDINGS, *cpu], extra_compile_args=flags)


if __name__ == "__main__":
    setup(ext_modules=list(extensions()), cmdclass={"build_ext": NinjaBuild})
