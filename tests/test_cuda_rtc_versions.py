"""The oldest NVRTC that is supported, and the last of CUDA 12, compile the kernels on which they failed once.

Each is installed into a virtual environment of its own, which needs a package index.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

FOUND = """
import re, sys
from concurrent.futures import ThreadPoolExecutor
import every_op
from hypenet_kernels import _nvrtc, _warmup

kernels = [k for k in _warmup.collect((9, 0), [lambda: every_op.run("cpu")]) if re.search(sys.argv[1], k[1])]
jobs = [(*kernel, target) for kernel in kernels for target in ("sm_80", "sm_90a")]
with ThreadPoolExecutor(2) as pool:
    logs = [cubin.log for cubin in pool.map(lambda job: _nvrtc.build(*job), jobs)]
bad = [job for job, log in zip(jobs, logs) if re.search(r"[1-9]\\d* bytes (stack|spill)", log)]
print(*_nvrtc.version(), len(jobs), bad)
"""
# With CUDA 12.6 and 12.8 the first spilled registers, and NVRTC crashed on the others.
ONCE_BROKEN = r"bwd_scan_kernel<.*(fp16, 64, \(.*Rule\)0|bf16, 256)|hype_attention_bwd_.*<.*bf16|chain_kernel"


@pytest.mark.slow
@pytest.mark.parametrize("version", ["12.6", "12.9"])
def test_kernels_compile_with(version, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path), "platbase": str(tmp_path)}))
    packages = ("cuda-bindings>=12.6,<13", "cuda-pathfinder", f"nvidia-cuda-nvrtc-cu12=={version}.*")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, *packages]
    installed = subprocess.run(install, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"not installed: {installed.stderr.strip().splitlines()[-1]}")
    (site / "zz.pth").write_text(sysconfig.get_path("purelib"))  # last: torch, and none of these packages
    folder = Path(__file__).parent
    ran = subprocess.run(
        [tmp_path / "bin" / "python", "-c", FOUND, ONCE_BROKEN],
        env={"PYTHONPATH": f"{folder}:{folder.parent}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    major, minor, count, bad = ran.stdout.split(maxsplit=3)
    assert (major, minor) == tuple(version.split(".")) and int(count) > 20 and bad.strip() == "[]", ran.stdout
