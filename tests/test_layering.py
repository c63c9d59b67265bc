"""The one direction of flow, csrc -> hypenet_kernels -> hypenet -> halo, and what keeps files readable."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES, MAX_PARAMETERS = 600, 8
FORBIDDEN = {  # package -> what it must not import
    "hypenet_kernels": ("hypenet", "halo", "bench", "tests", "transformers"),
    "hypenet": ("halo", "bench", "tests", "hypenet_kernels._native", "hypenet_kernels._c"),
    "halo": ("bench", "tests", "hypenet_kernels"),
}
# Inside functions alone.
ALLOWED = {(f"hypenet_kernels/integrations/{name}.py", "transformers") for name in ("_attention", "_transformers")}
NATIVE = [path for path in (ROOT / "csrc").rglob("*.*") if path.is_file()]
PYTHON = [path for package in (*FORBIDDEN, "bench", "tests") for path in (ROOT / package).rglob("*.py")]


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(module, forbidden):
    """Return whether `module` is `forbidden` or inside it; 'hypenet_kernels._c' matches all native modules."""
    return module == forbidden or module.startswith(forbidden + ("" if forbidden.endswith("._c") else "."))


def test_there_is_something_to_check():
    assert len(NATIVE) > 10 and len(PYTHON) > 20


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_one_way(package):
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in (ROOT / package).rglob("*.py")
        for module in imported_modules(path)
        if any(within(module, forbidden) for forbidden in FORBIDDEN[package])
        and (path.relative_to(ROOT).as_posix(), module.split(".")[0]) not in ALLOWED
    ]
    assert not wrong


def test_native_code_knows_neither_torch_nor_python():
    allowed = {"bind.h", "bindings.cpp", "module.h"}
    for path in NATIVE:
        headers = re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text())
        assert not [h for h in headers if h.split("/")[0] in ("torch", "ATen", "c10")], path
        assert path.name in allowed or not [h for h in headers if h == "Python.h" or h.startswith("pybind11")], path


def test_files_are_short():
    long = {path.relative_to(ROOT): text.count("\n") for path in NATIVE + PYTHON if (text := path.read_text())}
    assert not {path: lines for path, lines in long.items() if lines > MAX_LINES}
    assert (ROOT / "setup.py").read_text().count("\n") <= 150


def test_file_names_state_a_purpose():
    vague = {"utils", "helpers", "common", "misc"}
    assert not [path for path in NATIVE + PYTHON if path.stem in vague]


def test_ptx_and_launches_are_in_one_place():
    for path in (ROOT / "csrc" / "cuda").rglob("*.cu*"):
        code = re.sub(r"//.*", "", path.read_text())
        if path.parent.name != "arch":
            assert not re.search(r"\basm\b|__shfl|__syncthreads|threadIdx|blockIdx|extern __shared__", code), path
        assert "<<<" not in code and not re.search(r"cuda\w*Synchronize|cudaMalloc|\bprintf\b|\bexit\b", code), path


def test_internal_functions_take_few_arguments():
    """A longer list invites swapped arguments. Public functions and integrations have the lists of other libraries."""
    for path in (ROOT / "hypenet_kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            internal = isinstance(node, ast.FunctionDef) and (node.name.startswith("_") or path.name.startswith("_"))
            if internal and path.name != "reference.py":
                count = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
                assert count <= MAX_PARAMETERS, f"{path}: {node.name} takes {count}"
