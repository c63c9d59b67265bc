"""CUDA without a GPU: every source compiles for every target with no spill, the module imports without a driver."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_install import setup

from hypenet_kernels import native

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
NVCC = setup.find_nvcc(os.environ)
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda")
needs_module = pytest.mark.skipif(
    native.build_info()["cuda_targets"] is None, reason=f"no CUDA module: {native.build_info()['cuda']}"
)


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills(source, arch, tmp_path):
    flags = [*setup.NVCC_FLAGS, f"-arch={arch}", "-Xptxas=-v", "-cubin", "-o", str(tmp_path / "kernel.cubin")]
    ran = subprocess.run([NVCC, *flags, str(source)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", ran.stderr)
    assert spills and set(spills) == {("0", "0")}


@needs_module
def test_imports_without_torch_and_without_a_driver():
    code = "import sys, hypenet_kernels._cuda as cuda; print(sorted(n for n in dir(cuda) if not n.startswith('_')))"
    hide_torch = "import sys, types; sys.modules['hypenet_kernels'] = package = types.ModuleType('hypenet_kernels'); "
    hide_torch += f"package.__path__ = [{str(Path(native.__file__).parent)!r}]; "
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run([sys.executable, "-c", hide_torch + code], env=env, capture_output=True, text=True)
    assert ran.returncode == 0 and "gated_delta_step" in ran.stdout, ran.stderr


@needs_module
def test_links_the_runtime_statically_and_hidden():
    module = native.cuda().__file__
    needed = subprocess.run(["ldd", module], capture_output=True, text=True, check=True).stdout
    assert "libcudart" not in needed and "libcuda" not in needed


@needs_module
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_launch_without_a_gpu_is_an_error_with_the_ops_name():
    fields = {name: 1 for name in ("B", "T", "H", "HV", "K", "V", "num_slots", "num_threads")}
    fields |= {"dtype": 1, "delta": True, "use_qk_l2norm": False, "scale": 1.0, "state_indices": 0, "state": 0, "o": 0}
    fields |= {name: native.ABSENT for name in ("q", "k", "v", "g", "beta")}
    with pytest.raises(RuntimeError, match=r"gated_delta_step: .*(CUDA|device)"):
        native.cuda().gated_delta_step(**fields, stream=0)
    assert native.cuda().gated_delta_step(**fields | {"B": 0}, stream=0) is None
    with pytest.raises(TypeError, match="gated_delta_step: missing field stream"):
        native.cuda().gated_delta_step(**fields)
    with pytest.raises(RuntimeError, match="gated_delta_step: dtype is not built for CUDA"):
        native.cuda().gated_delta_step(**fields | {"dtype": 0}, stream=0)
    with pytest.raises(RuntimeError, match="gated_delta_step: K is larger"):
        native.cuda().gated_delta_step(**fields | {"K": native.cuda().STEP_MAX_KEY_DIM + 1}, stream=0)
