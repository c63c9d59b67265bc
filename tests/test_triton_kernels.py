"""The Triton kernels, in Triton's interpreter, and compiled for NVIDIA GPUs without one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

HERE = Path(__file__).parent


def run(*command, **env):
    """Run a command in a process of its own, since Triton reads its environment when it is imported."""
    command = [sys.executable, *command]
    done = subprocess.run(command, cwd=HERE.parent, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return done.stdout


def test_in_the_interpreter():
    printed = run("-m", "pytest", "-p", "no:cacheprovider", "-n0", "tests/triton_cases.py", TRITON_INTERPRET="1")
    assert " passed" in printed and "skipped" not in printed
