"""CUDA without a GPU: every source compiles for every target without spills; the module imports without a driver."""

import os
import subprocess
import sys
from pathlib import Path

import cuda_resources
import pytest
import torch
from test_install import setup

from bench.sass.occupancy import blocks_per_sm
from hypenet_kernels import _native

REGISTERS_TO_SPARE = 8  # tolerance for other compiler versions
WITHOUT_TENSOR_CORES = (  # name prefixes of kernels without matrix products
    "causal_conv1d_",
    "commit_states_kernel",
    "gated_delta_step_kernel",
    "gated_delta_fill_kernel",
    "gated_delta_decays_kernel",
    "gated_delta_map_kernel",
    "gated_delta_chain_kernel<Chain<128, (Rule)1,",  # simple GLA
    "gated_delta_chain_kernel<Chain<256, (Rule)1,",
    "gated_delta_chain_kernel<Chain<64, (Rule)1,",
    "hype_attention_bwd_prepare_kernel",
    "hype_attention_decode_combine_kernel",
)
NVCC = setup.find_nvcc(os.environ)
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda")
needs_module = pytest.mark.skipif(
    _native.build_info()["cuda_targets"] is None, reason=f"no CUDA module: {_native.build_info()['cuda']}"
)


@pytest.fixture(scope="module")
def measured():
    if NVCC is None:
        pytest.skip("no nvcc in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda")
    return cuda_resources.measure()


def test_nothing_is_kept_in_local_memory(measured):
    """No spills (they fail the build) and no stack: every array is in registers."""
    assert {target for target, _ in measured} == {"sm_80", "sm_90"}
    assert not {kernel: row for kernel, row in measured.items() if row["stack"] or row["spills"]}
    assert not [kernel for kernel, (_, local_memory) in cuda_resources.disassembled().items() if local_memory]


def test_every_kernel_is_launched_by_some_op(measured):
    idle = {name for (_, name), row in measured.items() if row["threads"] is None}
    assert not idle, "compiled for nothing, or tests/every_op.py does not reach it"


def test_resources_are_those_of_the_table(measured):
    """More registers or fewer blocks per SM than in the table must be intended."""
    table = cuda_resources.read_table()
    problems = [f"{kernel}: not in the table" for kernel in measured.keys() - table.keys()]
    problems += [f"{kernel}: in the table, but no kernel" for kernel in table.keys() - measured.keys()]
    for kernel in measured.keys() & table.keys():
        now, then = measured[kernel], table[kernel]
        if now["registers"] > then["registers"] + REGISTERS_TO_SPARE:
            problems.append(f"{kernel}: {now['registers']} registers, {then['registers']} in the table")
        if now["blocks"] != then["blocks"] and (now["blocks"] or 0) < (then["blocks"] or 0):
            problems.append(f"{kernel}: {now['blocks']} blocks per SM, {then['blocks']} in the table")
        if now["tensor_cores"] not in (None, then["tensor_cores"]):
            problems.append(f"{kernel}: tensor cores {now['tensor_cores']}, {then['tensor_cores']} in the table")
    fix = f"if that is intended, commit what `{cuda_resources.REWRITE}` writes"
    assert not problems, "\n".join([*sorted(problems), fix])


def test_products_run_on_tensor_cores():
    table = cuda_resources.read_table()
    # Without a block on any SM of the target, the kernel is compiled empty.
    without = {name for (_, name), row in table.items() if row["blocks"] and not row["tensor_cores"]}
    assert not {name for name in without if not name.startswith(WITHOUT_TENSOR_CORES)}


@needs_nvcc
def test_whole_cuda_build_takes_less_than_four_minutes_on_two_cores():
    """CPU time from the logs of the last compilations; wall time would depend on what else runs."""
    taken = {stem: cuda_resources.seconds(log) for stem, log in cuda_resources.compile_all().items()}
    assert all(taken.values()) and sum(taken.values()) / 2 < 240, taken


@pytest.mark.parametrize(
    ("target", "registers", "threads", "shared", "blocks"),
    [
        ("sm_80", 255, 128, 0, 2),
        ("sm_80", 128, 128, 0, 4),
        ("sm_80", 129, 128, 0, 3),
        ("sm_80", 32, 1024, 0, 2),
        ("sm_80", 16, 32, 0, 32),
        ("sm_80", 128, 128, 163 * 1024, 1),
        ("sm_80", 64, 128, 81 * 1024, 2),
        ("sm_90a", 64, 128, 81 * 1024, 2),
        ("sm_90a", 64, 128, 75 * 1024, 3),
        ("sm_90a", 168, 384, 200 * 1024, 1),
        ("sm_90a", 255, 512, 0, 0),
    ],
)
def test_blocks_per_sm(target, registers, threads, shared, blocks):
    """Values of NVIDIA's occupancy calculator."""
    assert blocks_per_sm(target, registers, threads, shared) == blocks


@needs_module
def test_imports_without_torch_and_without_a_driver():
    code = "import sys, hypenet_kernels._cuda as cuda; print(sorted(n for n in dir(cuda) if not n.startswith('_')))"
    hide_torch = "import sys, types; sys.modules['hypenet_kernels'] = package = types.ModuleType('hypenet_kernels'); "
    hide_torch += f"package.__path__ = [{str(Path(_native.__file__).parent)!r}]; "
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run([sys.executable, "-c", hide_torch + code], env=env, capture_output=True, text=True)
    assert ran.returncode == 0 and "gated_delta_step" in ran.stdout, ran.stderr


@needs_module
def test_links_the_runtime_statically_and_hidden():
    module = _native.cuda().__file__
    needed = subprocess.run(["ldd", module], capture_output=True, text=True, check=True).stdout
    assert "libcudart" not in needed and "libcuda" not in needed


@needs_module
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_launch_without_a_gpu_is_an_error_with_the_ops_name():
    fields = {name: 1 for name in ("B", "T", "H", "HV", "K", "V", "num_slots", "num_threads")}
    fields |= {"dtype": 1, "delta": True, "use_qk_l2norm": False, "gates_in_dtype": False, "scale": 1.0}
    fields |= {"beta_limit": 0.0, "A_log": 0, "dt_bias": 0, "state_indices": (0, False), "state": 0, "o": 0}
    fields |= {name: _native.ABSENT for name in ("q", "k", "v", "g", "beta")}
    with pytest.raises(RuntimeError, match=r"gated_delta_step: .*(CUDA|device)"):
        _native.cuda().gated_delta_step(fields, (0, 0))
    assert _native.cuda().gated_delta_step(fields | {"B": 0}, (0, 0)) is None
    with pytest.raises(TypeError, match=r"gated_delta_step\(\): incompatible function arguments"):
        _native.cuda().gated_delta_step(fields)
    with pytest.raises(RuntimeError, match="gated_delta_step: dtype is not built for CUDA"):
        _native.cuda().gated_delta_step(fields | {"dtype": 0}, (0, 0))
    with pytest.raises(RuntimeError, match="gated_delta_step: K is larger"):
        _native.cuda().gated_delta_step(fields | {"K": _native.cuda().STEP_MAX_KEY_DIM + 1}, (0, 0))
