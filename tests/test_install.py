"""The decisions of setup.py, and its results: the sdist is complete, the wheel runs from any directory."""

import contextlib
import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("hypenet_kernels", "hypenet", "halo")
_spec = importlib.util.spec_from_file_location("hypenet_setup", ROOT / "setup.py")
setup = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(setup)


TINY_BINDINGS = """
#include <Python.h>
int number();
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "m", nullptr, -1, nullptr};
static PyObject* make() { return number() == 1 ? PyModule_Create(&module) : nullptr; }
PyMODINIT_FUNC PyInit__cpu_baseline() { return make(); }
PyMODINIT_FUNC PyInit__cpu_v3() { return make(); }
PyMODINIT_FUNC PyInit__cpu_v4() { return make(); }
PyMODINIT_FUNC PyInit__cpu_v4_bf16() { return make(); }
PyMODINIT_FUNC PyInit__cuda() { return make(); }
PyMODINIT_FUNC PyInit__cuda_rtc() { return make(); }
"""


@contextlib.contextmanager
def only_builder():
    """Keep other test processes from building in the checkout's build folder."""
    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def executable(path, text="#!/bin/sh\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_nvcc_is_found_in_this_order(tmp_path):
    env = {"CUDA_HOME": f"{tmp_path}/home", "CUDA_PATH": f"{tmp_path}/path", "PATH": f"{tmp_path}/empty:{tmp_path}/bin"}
    places = ("home/bin/nvcc", "path/bin/nvcc", "bin/nvcc", "usual/bin/nvcc", "site/nvidia/cuda_nvcc/bin/nvcc")
    for place in places:
        executable(tmp_path / place)
    for place in places:
        found = setup.find_nvcc(env, usual=f"{tmp_path}/usual", site_packages=[str(tmp_path / "site")])
        assert found == str(tmp_path / place)
        (tmp_path / place).unlink()
    assert setup.find_nvcc(env, usual=f"{tmp_path}/usual", site_packages=[str(tmp_path / "site")]) is None


def test_cuda_is_built_if_nvcc_is_found_and_never_skipped_silently():
    assert setup.cuda_decision({}, "/opt/cuda/bin/nvcc") == (True, "/opt/cuda/bin/nvcc")
    build, why = setup.cuda_decision({}, None)
    assert not build and "no nvcc" in why
    build, why = setup.cuda_decision({"HYPENET_SKIP_CUDA_BUILD": "1", "FORCE_CUDA": "1"}, "/opt/cuda/bin/nvcc")
    assert not build and "HYPENET_SKIP_CUDA_BUILD" in why
    assert setup.cuda_decision({"HYPENET_SKIP_CUDA_BUILD": "0"}, "nvcc")[0]
    with pytest.raises(SystemExit, match="FORCE_CUDA is set, but there is no nvcc"):
        setup.cuda_decision({"FORCE_CUDA": "1"}, None)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("8.0", ["arch=compute_80,code=sm_80"]),
        ("8.0;9.0a", ["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a"]),
        ("8.6 12.0", ["arch=compute_86,code=sm_86", "arch=compute_120,code=sm_120"]),
        ("9.0+PTX", ["arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90"]),
        ("9.0a+PTX", ["arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90"]),
    ],
)
def test_arch_list(targets, expected):
    assert setup.gencode(targets) == [f"-gencode={flag}" for flag in expected]


@pytest.mark.parametrize("targets", ["7.5", "Hopper", "sm_90", "9"])
def test_unsupported_arch_list(targets):
    with pytest.raises(SystemExit, match=f"TORCH_CUDA_ARCH_LIST must name targets .* got '{targets}'"):
        setup.gencode(targets)


def test_jobs():
    assert setup.num_jobs({"MAX_JOBS": "3"}, cores=2, memory_gb=1) == 3
    assert setup.num_jobs({}, cores=2, memory_gb=6) == 2
    assert setup.num_jobs({}, cores=64, memory_gb=6) == 4
    assert setup.num_jobs({"MAX_JOBS": ""}, cores=4, memory_gb=0.5) == 1


def test_commands_quote_and_take_the_usual_variables():
    env = {"CXXFLAGS": "-g '-DX=a b'", "LDFLAGS": "-s", "NVCC_THREADS": "2"}
    commands = setup.commands(env, ["ccache", "g++"], "/opt/my cuda/bin/nvcc", "9.0a")
    assert "-g '-DX=a b'" in commands["cxx"] and commands["cxx"].startswith("ccache g++ ")
    assert commands["link"].endswith("-s $in -o $out -ldl")
    assert commands["nvcc"].startswith("'/opt/my cuda/bin/nvcc' -ccbin=g++ --threads=2 ")
    # Another version of nvcc may spill: a warning for users, a failure of test_cuda_build.py.
    assert "--warn-on-spills" in commands["nvcc"] and "warning-as-error" not in commands["nvcc"]
    assert "fast_math" not in commands["nvcc"]
    assert "-cudart=static" in commands["nvlink"]
    assert set(setup.commands(env, ["g++"], None, "9.0a")) == {"cxx", "link"}


def test_no_compiler_names_what_to_install(tmp_path):
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler .* apt install build-essential"):
        setup.find_compiler({"PATH": str(tmp_path)})
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler \(clang\+\+-99\) was found"):
        setup.find_compiler({"PATH": os.environ["PATH"], "CXX": "clang++-99"})


def test_old_compiler_names_what_to_install(tmp_path):
    executable(tmp_path / "g++", "#!/bin/sh\necho unrecognized option -std=c++20 >&2\nexit 1\n")
    with pytest.raises(SystemExit, match=r"(?s)g\+\+ lacks C\+\+20 .* g\+\+ >= 12 .*unrecognized option"):
        setup.find_compiler({"PATH": str(tmp_path)})


def test_compiler_here():
    assert setup.find_compiler({"PATH": os.environ["PATH"]})
    assert setup.find_compiler({"PATH": os.environ["PATH"], "CXX": "g++ -m64"}) == ["g++", "-m64"]


LINKED = ("CONTRIBUTING.md", "RESULTS.md", "CHANGELOG.md")  # from README.md and docs/


def test_sdist_holds_all_that_a_build_needs(tmp_path):
    egg_info, sdist = ["egg_info", "--egg-base", str(tmp_path)], ["sdist", "--dist-dir", str(tmp_path)]
    subprocess.run([sys.executable, "setup.py", "--quiet", *egg_info, *sdist], cwd=ROOT, check=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    needed = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    needed += [path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py")]
    needed += [ROOT / folder / "py.typed" for folder in PACKAGES]
    needed += [ROOT / name for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md", *LINKED)]
    needed += (ROOT / "docs").glob("*.md")
    needed += [*(ROOT / "halo" / "configs").glob("*.yaml"), *(ROOT / "halo" / "demo" / "teacher").glob("*")]
    assert not {str(path.relative_to(ROOT)) for path in needed} - names


def test_wheel_builds_without_torch_and_runs_from_anywhere(tmp_path):
    """What `pip install .` runs, with torch hidden; reuses objects from the build folder if there are any."""
    build = (
        "import sys; sys.modules['torch'] = None; from setuptools.build_meta import build_wheel as b; b(sys.argv[1])"
    )
    with only_builder():
        subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "with space")
        names = wheel.namelist()
    assert not [name for name in names if name.split("/")[0] in ("tests", "bench", "csrc")]
    assert {f"halo/configs/{path.name}" for path in (ROOT / "halo" / "configs").glob("*.yaml")} <= set(names)
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    for folder in ("", "arch/", "rtc/include/"):  # what NVRTC reads
        packed = {Path(name).name for name in names if name.startswith(f"hypenet_kernels/csrc/cuda/{folder}")}
        needed = (path.name for path in (ROOT / "csrc" / "cuda" / folder).iterdir() if path.is_file())
        assert {name for name in needed if not name.endswith(".cu")} <= packed
    assert "hypenet_kernels/csrc/params.h" in names
    entry_points = next((tmp_path / "with space").glob("*/entry_points.txt")).read_text()
    assert "hypenet = halo.__main__:hypenet" in entry_points and "halo = halo.__main__:main" in entry_points
    metadata = next((tmp_path / "with space").glob("*/METADATA")).read_text()
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert needed == ["Requires-Dist: torch>=2.9", "Requires-Dist: numpy"]
    env = os.environ | {"PYTHONPATH": str(tmp_path / "with space")}
    ran = subprocess.run(
        [sys.executable, "-m", "hypenet_kernels"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert ran.returncode == 0 and "all passed" in ran.stdout, ran.stdout + ran.stderr
    assert f"in {tmp_path}" in ran.stdout


def test_builds_in_a_folder_with_spaces(tmp_path, monkeypatch):
    """The build rules on trivial sources: modules, CPU levels, CUDA if nvcc is there, an incremental build."""
    root = tmp_path / "a folder"
    for folder in ("csrc/cpu", "csrc/cuda", "hypenet_kernels"):
        (root / folder).mkdir(parents=True)
    shutil.copy(ROOT / "setup.py", root)
    (root / "hypenet_kernels" / "__init__.py").touch()
    (root / "csrc" / "number.h").write_text("int number();\n")
    (root / "csrc" / "cpu" / "number.cpp").write_text('#include "../number.h"\nint number() { return 1; }\n')
    (root / "csrc" / "cuda" / "number.cu").write_text('#include "../number.h"\nint number() { return 1; }\n')
    (root / "csrc" / "bindings.cpp").write_text(TINY_BINDINGS)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    monkeypatch.delenv("HYPENET_SKIP_CUDA_BUILD", raising=False)
    first = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    modules = {path.name.split(".")[0] for path in (root / "hypenet_kernels").glob("*.so")}
    cuda = {"_cuda", "_cuda_rtc"} if setup.find_nvcc(os.environ) else {"_cuda_rtc"}
    assert modules == {f"_cpu_{level}" for level in setup.LEVELS} | cuda
    show = "import hypenet_kernels._cpu_baseline as b; print(b.__file__)"
    subprocess.run([sys.executable, "-c", show], cwd=root, check=True, capture_output=True)
    (root / "csrc" / "number.h").write_text("int number();  // changed\n")
    again = subprocess.run(command, cwd=root, capture_output=True, text=True).stdout
    assert "number.o" in again and "bindings_cpu.o -c" not in again
    assert "no work to do" in subprocess.run(command, cwd=root, capture_output=True, text=True).stdout


def test_source_tree_that_is_not_built_says_how_to_build(tmp_path):
    shutil.copytree(
        ROOT / "hypenet_kernels", tmp_path / "hypenet_kernels", ignore=shutil.ignore_patterns("*.so", "_build*")
    )
    # -S ignores the .pth file of an editable install, which would find the checkout's modules
    command, env = [sys.executable, "-S", "-m", "hypenet_kernels"], {"PYTHONPATH": sysconfig.get_path("purelib")}
    ran = subprocess.run(command, cwd=tmp_path, env=os.environ | env, capture_output=True, text=True)
    assert ran.returncode == 1 and "is not built in" in ran.stderr and "pip install -e ." in ran.stderr, ran.stderr
    assert "Traceback" not in ran.stderr
