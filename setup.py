"""Builds the native modules: one CPU module per instruction-set level, and the CUDA module where nvcc is found."""

import os
import platform
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

CPU_SOURCES = ["csrc/bindings.cpp", *sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp"))]
CPU_LEVELS = {"baseline": [], "v3": ["-march=x86-64-v3"], "v4": ["-march=x86-64-v4"]}
if platform.machine() not in ("x86_64", "AMD64"):
    CPU_LEVELS = {"baseline": []}
CXX_FLAGS = "-std=c++20 -O3 -fPIC -fopenmp -fvisibility=hidden -fno-math-errno -Wall -Wextra".split()


class NinjaBuild(build_ext):
    """Compiles the objects of all modules with one ninja run."""

    def run(self):
        import pybind11

        include = [f"-I{p}" for p in (pybind11.get_include(), sysconfig.get_paths()["include"])]
        root, build = Path.cwd(), Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        cxx = os.environ.get("CXX", "g++")
        lines = [
            "rule cxx",
            f"  command = {cxx} -MMD -MF $out.d $flags -c $in -o $out",
            "  deps = gcc",
            "  depfile = $out.d",
            "rule link",
            f"  command = {cxx} -shared -fopenmp $in -o $out",
        ]
        for extension in self.extensions:
            module = extension.name.split(".")[-1]
            flags = " ".join([*CXX_FLAGS, *extension.extra_compile_args, *include, f"-DHYPENET_MODULE={module}"])
            objects = []
            for source in extension.sources:
                objects.append(f"{module}/{Path(source).stem}.o")
                lines += [f"build {objects[-1]}: cxx {_escape(root / source)}", f"  flags = {flags}"]
            target = Path(self.get_ext_fullpath(extension.name)).resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            lines.append(f"build {_escape(target)}: link {' '.join(objects)}")
        (build / "build.ninja").write_text("\n".join(lines) + "\n")
        subprocess.run(["ninja", "-C", str(build), *_jobs()], check=True)


def _escape(path):
    return str(path).replace(" ", "$ ")


def _jobs():
    return ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []


setup(
    name="hypenet",
    version="0.1.0",
    packages=find_packages(include=["hypenet_kernels*", "hypenet*", "halo*"]),
    ext_modules=[
        Extension(f"hypenet_kernels._cpu_{level}", CPU_SOURCES, extra_compile_args=flags)
        for level, flags in CPU_LEVELS.items()
    ],
    cmdclass={"build_ext": NinjaBuild},
)
