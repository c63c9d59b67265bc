"""The repository for the hub's library `kernels`: written, loaded beside the installed package, and added to."""

import json
import os
import platform
import subprocess
import sys

import pytest

from hypenet_kernels import __main__ as command_line
from hypenet_kernels import _hub

# As kernels.importer does: the folder is a module by the id of its metadata.
LOAD = """
import importlib.util, json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
name = json.loads((folder / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
copy = importlib.util.module_from_spec(spec)
sys.modules[name] = copy
spec.loader.exec_module(copy)
"""
COMPARE = """
import torch, hypenet_kernels
from torch.nn import functional as F
q, k, v = (torch.randn(1, 70, 2, 64, requires_grad=True) for _ in range(3))
g, beta = F.logsigmoid(torch.randn(1, 70, 2)), torch.rand(1, 70, 2)
results = []
for package in (copy, hypenet_kernels):
    o, state = package.chunk_gated_delta_rule(q, k, v, g, beta, output_final_state=True, use_qk_l2norm_in_kernel=True)
    results.append((o, state, *torch.autograd.grad(o.square().sum(), (q, k, v))))
assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
assert copy.__version__ == hypenet_kernels.__version__ and copy.report()["folder"] == str(folder)
assert sys.modules[f"{name}._ops"].NAMESPACE == name and hasattr(getattr(torch.ops, name), "gated_delta_step")
"""


def run(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    _hub.write(folder, [_hub.this_variant(), f"torch213-cxx11-cu130-{platform.machine()}-linux"], version=2)
    return folder


def test_a_copy_runs_beside_the_installed_package(repository):
    ran = run(LOAD + COMPARE, repository / "build" / _hub.this_variant())
    assert ran.returncode == 0, ran.stderr


def test_a_copy_needs_no_installed_package(repository, tmp_path):
    code = f"import sys; sys.modules['hypenet_kernels'] = None{LOAD}import torch\n"
    code += "x, g, state = torch.ones(1, 1, 2, 64), torch.zeros(1, 1, 2), torch.zeros(1, 2, 64, 64)\n"
    code += "print(copy.simple_gla_step(x, x, x, g, state, scale=1.0).sum())"
    ran = run(code, repository / "build" / _hub.this_variant())
    assert ran.returncode == 0 and "8192" in ran.stdout, ran.stderr


def test_cuda_variant_has_what_nvrtc_compiles(repository):
    folder = repository / "build" / f"torch213-cxx11-cu130-{platform.machine()}-linux"
    facts = json.loads((folder / "metadata.json").read_text())
    assert facts["backend"] == {"type": "cuda", "archs": ["8.0+PTX"]} and facts["version"] == 2
    assert (folder / "csrc" / "cuda" / "gated_delta_scan.cuh").is_file() and list(folder.glob("_cuda_rtc*"))
    assert not list((repository / "build" / _hub.this_variant()).glob("_cuda*"))


def test_modules_of_another_python_are_kept(repository):
    folder = repository / "build" / _hub.this_variant()
    other = folder / "_cpu_v3.cpython-399-x86_64-linux-gnu.so"
    other.touch()
    assert command_line.main(["hub", str(repository)]) == 0 and other.is_file()


@pytest.mark.parametrize("variant", ["torch-cpu", "torch213-cxx11-rocm70-x86_64-linux", "torch213-cpu-sparc-linux"])
def test_variants_that_are_not_ours_are_refused(variant, tmp_path):
    with pytest.raises(ValueError, match=f"^hub: variant must be torch.*, got {variant}$"):
        _hub.write(tmp_path, [variant])
    with pytest.raises(SystemExit, match=r"^hub: variant must be"):
        command_line.main(["hub", str(tmp_path), "--variants", variant])
    assert not os.listdir(tmp_path)


def test_loaded_by_the_library_itself(repository):
    pytest.importorskip("kernels")
    code = "from pathlib import Path\nfrom kernels import get_local_kernel\nimport sys\n"
    code += "copy = get_local_kernel(Path(sys.argv[1]), backend='cpu')\nprint(copy.__name__, copy.report()['level'])"
    ran = run(code, repository)
    assert ran.returncode == 0 and ran.stdout.startswith("hypenet_kernels_cpu_"), ran.stderr
