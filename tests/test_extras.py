"""What each extra installs, and the one line that names it when a package is missing."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

import halo
import hypenet
from halo import extras
from halo.extras import PACKAGES, SPIN_COUNT, bound_spinning, require

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORTED_AS = {"pyyaml": "yaml", "lm-eval": "lm_eval"}
# Third-party packages that each of ours may import: those that its extra installs.
CORE = {"torch", "numpy"}
OURS = {"hypenet_kernels", "hypenet", "halo"}
ALLOWED = {
    "hypenet_kernels": CORE,
    "hypenet": CORE | set(PACKAGES["model"]),
    # tokenizers comes with transformers, pyarrow with datasets, huggingface_hub with both, and jinja2 with torch
    "halo": CORE | set(PACKAGES["halo"]) | {"tokenizers", "pyarrow", "huggingface_hub", "jinja2"},
}
# which the user of an integration has, imported by the function that needs it
INTEGRATED = {"transformers", "fla", "vllm"}
# of the extras eval and cuda, imported where they are needed, in one file each
HARNESS = {"harness.py": {"lm_eval"}, "triton_kernels.py": {"triton"}}
HEAVY = ("torch", "transformers", "datasets", "matplotlib")


def requirements(extra):
    """Import names of what an extra installs, the extras that it includes followed."""
    names = set()
    for requirement in PROJECT["optional-dependencies"][extra]:
        if included := re.match(r"hypenet\[(\w+)\]", requirement):
            names |= requirements(included[1])
        else:
            name = re.match(r"[\w-]+", requirement)[0]
            names.add(IMPORTED_AS.get(name, name))
    return names


def run(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def command(name, *arguments, hide=()):
    """Run a command in a process in which the packages `hide` cannot be imported."""
    main = {"hypenet": "hypenet", "halo": "main"}[name]
    hidden = "".join(f"sys.modules[{package!r}] = None; " for package in hide)
    return run(f"import sys; {hidden}from halo.__main__ import {main}; sys.argv = {[name, *arguments]!r}; {main}()")


def test_only_torch_and_numpy_are_always_installed():
    assert {re.match(r"\w+", requirement)[0] for requirement in PROJECT["dependencies"]} == CORE


@pytest.mark.parametrize("extra", PACKAGES)
def test_table_of_packages_is_that_of_pyproject(extra):
    assert set(PACKAGES[extra]) == requirements(extra)


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_are_covered_by_the_extra(package):
    for path in (ROOT / package).rglob("*.py"):
        allowed = ALLOWED[package] | (INTEGRATED if path.parent.name == "integrations" else set())
        allowed |= HARNESS.get(path.name, set())
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in {name.split(".")[0] for name in names} - OURS:
                assert name in sys.stdlib_module_names or name in allowed, f"{path}: {name}"


@pytest.mark.parametrize("package", PACKAGES["halo"])
def test_halo_names_a_missing_package(package, tmp_path):
    result = command("halo", "convert", "--config", "demo", "--out", str(tmp_path / "out"), hide=[package])
    assert result.returncode == 1
    assert result.stderr == f'halo: needs {package}; install with: pip install "hypenet[halo]"\n'
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", PACKAGES["model"])
def test_hypenet_names_a_missing_package(package):
    result = command("hypenet", "info", ".", hide=[package])
    assert result.returncode == 1
    assert result.stderr == f'hypenet: needs {package}; install with: pip install "hypenet[model]"\n'


def test_all_missing_packages_are_named_at_once():
    result = command("halo", "report", ".", hide=["datasets", "matplotlib"])
    assert result.stderr == 'halo: needs datasets, matplotlib; install with: pip install "hypenet[halo]"\n'


@pytest.mark.parametrize("package", ["transformers", "safetensors"])
def test_importing_hypenet_names_a_missing_package(package):
    result = run(f"import sys; sys.modules[{package!r}] = None; import hypenet")
    line = f'ModuleNotFoundError: hypenet: needs {package}; install with: pip install "hypenet[model]"'
    assert result.returncode == 1 and result.stderr.splitlines()[-1] == line


def test_training_the_demo_teacher_names_a_missing_package():
    result = run("import sys; sys.modules['transformers'] = None; import halo.demo.train_teacher")
    line = 'halo.demo.train_teacher: needs transformers; install with: pip install "hypenet[halo]"'
    assert result.returncode == 1 and result.stderr.splitlines()[-1] == f"ModuleNotFoundError: {line}"


def test_kernels_need_none_of_the_extras():
    hidden = "".join(f"sys.modules[{package!r}] = None; " for package in PACKAGES["halo"])
    result = run(f"import sys; {hidden}import hypenet_kernels; print(hypenet_kernels.report()['version'])")
    assert result.returncode == 0, result.stderr


def test_require_accepts_what_is_installed():
    for extra in PACKAGES.keys() - {"eval"}:  # which the extra for tests leaves out
        require("test", extra)
    with pytest.raises(
        ModuleNotFoundError, match=r'^test: needs no_such; install with: pip install "hypenet\[halo\]"$'
    ):
        require("test", "halo", "yaml", "no_such")


def test_version():
    installed = importlib.metadata.version("hypenet")
    assert hypenet.__version__ == halo.__version__ == installed
    for name in ("hypenet", "halo"):
        assert command(name, "--version").stdout == f"{name} {installed}\n"


@pytest.mark.parametrize(
    "arguments",
    [("hypenet", "--help"), ("hypenet", "generate", "--help"), ("halo", "--help"), ("halo", "convert", "--help")],
)
def test_help_imports_nothing_that_takes_seconds(arguments):
    name, *rest = arguments
    main = {"hypenet": "hypenet", "halo": "main"}[name]
    code = (
        f"import sys; from halo.__main__ import {main}; sys.argv = {[name, *rest]!r}\n"
        f"try: {main}()\nfinally: print('loaded', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout and result.stdout.rstrip().endswith("loaded []")


def test_a_mistake_in_the_configuration_is_found_without_torch(tmp_path):
    result = command("halo", "convert", "--config", str(tmp_path / "none.yaml"), hide=[])
    assert result.returncode == 2 and result.stderr.startswith(f"halo: {tmp_path}/none.yaml: must be an existing file")


@pytest.mark.parametrize("chosen", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}, {"KMP_BLOCKTIME": "1"}])
@pytest.mark.parametrize("busy", [0.2, 1.0])
def test_threads_sleep_soon_on_a_busy_machine_unless_the_user_decides(monkeypatch, chosen, busy):
    monkeypatch.setattr(extras, "busy_cores", lambda: busy)
    environment = dict(chosen)
    bound_spinning(environment)
    assert environment == (chosen or ({"GOMP_SPINCOUNT": SPIN_COUNT} if busy > 0.5 else {}))


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs /proc/stat")
def test_busy_cores_sees_a_busy_process():
    """Other processes may come and go meanwhile, so that only what this test adds is certain."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            time.sleep(0.5)
            assert extras.busy_cores(0.5) > 0.4
        finally:
            process.kill()
    assert 0 <= extras.busy_cores(0.1) <= len(os.sched_getaffinity(0))


def test_busy_cores_where_the_system_does_not_say(monkeypatch):
    monkeypatch.setattr(extras, "_idle_seconds", lambda cores: int("not a number"))
    assert extras.busy_cores() == 0.0
