"""Build the native modules, without PyTorch: one per CPU level, CUDA for NVRTC, and if nvcc is found CUDA by nvcc."""

import glob
import json
import os
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
X86 = {"baseline": "", "v3": "-march=x86-64-v3", "v4": "-march=x86-64-v4", "v4_bf16": "-march=x86-64-v4 -mavx512bf16"}
LEVELS = X86 if os.uname().machine in ("x86_64", "AMD64") else {"baseline": ""}
CXX_FLAGS = shlex.split("-std=c++20 -O3 -fPIC -fopenmp -fvisibility=hidden -fno-math-errno -Wall -Wextra")
NVCC_FLAGS = shlex.split("-std=c++20 -O1 -Xcompiler=-fPIC -Xptxas=-v,--warn-on-spills")
NVCC_LOG = ">$out.log 2>&1 || { cat $out.log; exit 1; }; grep -i warning $out.log; times >>$out.log"  # from ptxas -v
NVLINK_FLAGS = ["-shared", "-cudart=static", "-Xlinker=--exclude-libs=ALL"]  # bound to no other runtime of the process
CUDA_TARGETS = "8.0;9.0+PTX"  # no kernel needs 9.0a; of one target, machine code and PTX share the compiler's front
MACROS = {"cpu": "-DHYPENET_CUDA=0", "cuda": "-DHYPENET_CUDA=1", "cuda_rtc": "-DHYPENET_CUDA=1 -DHYPENET_RTC=1"}
NO_CXX = "install g++ >= 12 (Debian, Ubuntu: apt install build-essential; Fedora: dnf install gcc-c++), or set CXX"
CXX20_PROBE = "#include <bit>\n#include <concepts>\n#include <omp.h>\nint main() { return std::bit_cast<int>(1.0f); }\n"


def find_compiler(env):
    """Return a C++ compiler with C++20 and OpenMP, as words; exit with what to install if there is none."""
    usual = [name for name in ("g++", "c++", "clang++") if shutil.which(name, path=env.get("PATH"))]
    cxx = shlex.split(env.get("CXX", "")) or usual[:1]
    if not cxx or not shutil.which(cxx[0], path=env.get("PATH")):
        sys.exit(f"hypenet: no C++ compiler ({' '.join(cxx) or 'g++, c++, clang++'}) was found: {NO_CXX}")
    probe = [*cxx, "-std=c++20", "-fopenmp", "-fsyntax-only", "-x", "c++", "-"]
    trial = subprocess.run(probe, input=CXX20_PROBE, env=env, text=True, capture_output=True)
    if trial.returncode:
        sys.exit(f"hypenet: {' '.join(cxx)} lacks C++20 or OpenMP: {NO_CXX}\n{trial.stderr}")
    return cxx


def find_nvcc(env, usual="/usr/local/cuda", site_packages=tuple(sys.path)):
    """Return the path of nvcc from CUDA_HOME, CUDA_PATH, PATH, the usual folder or pip's nvidia packages, or None."""
    candidates = [Path(env[name], "bin/nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if env.get(name)]
    candidates += [Path(f, "nvcc") for f in (*env.get("PATH", "").split(os.pathsep), f"{usual}/bin") if f]
    for folder in site_packages:
        candidates += sorted(Path(folder).glob("nvidia/*/bin/nvcc"), reverse=True)
    return next((str(path) for path in candidates if path.is_file()), None)


def cuda_decision(env, nvcc):
    """Return (whether to build the CUDA module, why), from the environment and nvcc, never from a visible GPU."""
    if env.get("HYPENET_SKIP_CUDA_BUILD", "0") not in ("", "0"):
        return False, "HYPENET_SKIP_CUDA_BUILD is set"
    reason = nvcc or "no nvcc in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda"
    if nvcc is None and env.get("FORCE_CUDA", "0") not in ("", "0"):
        sys.exit(f"hypenet: FORCE_CUDA is set, but there is {reason}")
    return nvcc is not None, reason


def gencode(targets):
    """Return nvcc's flags for a TORCH_CUDA_ARCH_LIST; PTX is for 9.0, since PTX of 9.0a runs on no later GPU."""
    flags = []
    for target in targets.replace(";", " ").split():
        parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", target)
        if not parts or int(parts[1]) < 8:
            sys.exit(f"hypenet: TORCH_CUDA_ARCH_LIST must name targets >= 8.0, like '{CUDA_TARGETS}', got '{target}'")
        number, kind = parts[1] + parts[2], parts[3]
        flags.append(f"-gencode=arch=compute_{number}{kind},code=sm_{number}{kind}")
        flags += [f"-gencode=arch=compute_{number},code=compute_{number}"] if parts[4] else []
    return flags


def num_jobs(env, cores, memory_gb, gb_per_job=1.5):
    """Return the number of parallel compiler processes: MAX_JOBS, or what cores and memory allow."""
    return int(env.get("MAX_JOBS") or max(1, min(cores, memory_gb / gb_per_job)))


def commands(env, cxx, nvcc, targets):
    """Return the ninja command of each compiler and linker rule; `nvcc` is None without CUDA."""
    rules = {"cxx": [*cxx, *CXX_FLAGS, *shlex.split(env.get("CXXFLAGS", ""))]}
    rules["link"] = [*cxx, "-shared", "-fopenmp", *shlex.split(env.get("LDFLAGS", ""))]
    if nvcc:
        nvcc = [nvcc, f"-ccbin={cxx[-1]}", f"--threads={env.get('NVCC_THREADS') or 1}"]
        rules |= {"nvcc": [*nvcc, *NVCC_FLAGS, *gencode(targets)], "nvlink": [*nvcc, *NVLINK_FLAGS]}
    compile = "-MMD -MF $out.d -c $flags $in -o $out"
    files = {"cxx": compile, "nvcc": f"{compile} {NVCC_LOG}", "link": "$in -o $out -ldl", "nvlink": "$in -o $out"}
    return {rule: f"{shlex.join(words).replace('$', '$$')} {files[rule]}" for rule, words in rules.items()}


class NinjaBuild(build_ext):
    """Compile all modules in one ninja run, in a folder that later builds reuse."""

    def run(self):
        import ninja

        python = Path(sysconfig.get_paths()["include"])
        if not (python / "Python.h").is_file():
            sys.exit(f"hypenet: {python}/Python.h is missing: install python3-dev (Fedora: python3-devel)")
        cxx, nvcc = find_compiler(os.environ), find_nvcc(os.environ)
        targets = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_TARGETS
        with_cuda, reason = cuda_decision(os.environ, nvcc)
        print("hypenet:", f"CUDA kernels for {targets} by" if with_cuda else "CUDA at run time:", reason, flush=True)
        build = Path(self.get_finalized_command("build").build_base, sys.implementation.cache_tag).absolute()
        build.mkdir(parents=True, exist_ok=True)
        with open(build / "build.ninja", "w") as file:
            writer = ninja.ninja_syntax.Writer(file, width=10**6)
            folder = self.write_ninja(writer, build, python, commands(os.environ, cxx, with_cuda and nvcc, targets))
        jobs = num_jobs(os.environ, len(os.sched_getaffinity(0)), os.sysconf("SC_PHYS_PAGES") / 2**18)  # of 4 KB
        if subprocess.run([Path(ninja.BIN_DIR, "ninja"), "-C", build, "-j", str(jobs)]).returncode:
            sys.exit("hypenet: compilation failed, see above" + " (HYPENET_SKIP_CUDA_BUILD=1 omits nvcc)" * with_cuda)
        info = {"compiler": " ".join(cxx), "cuda_targets": targets if with_cuda else None, "cuda": reason}
        Path(folder, "_build.json").write_text(json.dumps(info) + "\n")

    def write_ninja(self, writer, build, python, rules):
        """Write the build rules and targets; return the folder of the built modules."""
        import pybind11

        # An isolated build has pybind11 in a new folder each time; a link keeps the compile commands the same.
        link = build / f"pybind11-{pybind11.__version__}"
        link.unlink(missing_ok=True)
        link.symlink_to(pybind11.get_include())
        for rule, command in rules.items():
            writer.rule(rule, command, **({} if "link" in rule else {"depfile": "$out.d", "deps": "gcc"}))
        for kind in (kind for kind in MACROS if kind != "cuda" or "nvcc" in rules):
            flags = f"-O1 {MACROS[kind]} -isystem{link.name} {shlex.quote(f'-isystem{python}')}"
            writer.build(f"bindings_{kind}.o", "cxx", f"{ROOT}/csrc/bindings.cpp", variables={"flags": flags})
        for extension in self.extensions:
            module, built = extension.name.split(".")[-1], Path(self.get_ext_fullpath(extension.name)).absolute()
            compiler, linker = ("nvcc", "nvlink") if module == "_cuda" else ("cxx", "link")
            built.parent.mkdir(parents=True, exist_ok=True)
            if compiler not in rules:
                built.unlink(missing_ok=True)
                continue
            objects, flags = [], {"flags": shlex.join(extension.extra_compile_args)}
            for x in extension.sources:
                objects += writer.build(f"{module}/{Path(x).stem}.o", compiler, str(ROOT / x), variables=flags)
            writer.build(str(built), linker, [*objects, f"bindings_{'cpu' if 'cpu' in module else module[1:]}.o"])
        return built.parent


if __name__ == "__main__":
    cpu, cuda, rtc = (sorted(glob.glob(f"csrc/{x}", root_dir=ROOT)) for x in ("cpu/*.cpp", "cuda/*.cu", "cuda/*/*.cpp"))
    if not LEVELS.keys() >= {*(levels := (os.environ.get("HYPENET_CPU_LEVELS") or ",".join(LEVELS)).split(","))}:
        sys.exit(f"hypenet: HYPENET_CPU_LEVELS must name some of {','.join(LEVELS)}, got {','.join(levels)}")
    modules = [Extension(f"hypenet_kernels._cpu_{n}", cpu, extra_compile_args=LEVELS[n].split()) for n in levels]
    modules += [Extension("hypenet_kernels._cuda", cuda), Extension("hypenet_kernels._cuda_rtc", cuda + rtc)]
    modules[-1].extra_compile_args = ["-xc++", "-Wno-unknown-pragmas"]
    setup(ext_modules=modules, cmdclass={"build_ext": NinjaBuild})
