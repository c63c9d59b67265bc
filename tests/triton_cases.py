"""The Triton kernels in Triton's interpreter; test_triton_kernels.py runs this file."""

import os

import pytest
import torch
from test_fused_ops import CASES, assert_correct, make_case

from hypenet_kernels import _native, triton_kernels

assert os.environ["TRITON_INTERPRET"] == "1"


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """Route the ops to Triton; hold that each test runs kernels of both passes."""
    names, launch = [], triton_kernels.launch
    monkeypatch.setattr(_native, "in_triton", lambda x: True)
    monkeypatch.setattr(triton_kernels, "launch", lambda name, fields: (names.append(name), launch(name, fields)))
    yield names
    assert {name[-3:] for name in names} == {"fwd", "bwd"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_forward_and_every_gradient(name, dtype):
    assert_correct(*make_case(name, dtype, (2, 9, 3, 12)))  # padded to a power of two, several rows in a tile


@pytest.mark.parametrize("name", CASES)
def test_many_tiles_in_a_program(name, monkeypatch):
    monkeypatch.setattr(triton_kernels, "MAX_PROGRAMS", 3)
    monkeypatch.setattr(triton_kernels, "TILE", 64)
    op, reference, inputs = make_case(name, torch.float32, (2, 9, 3, 12))
    fields = {
        "rows": 54,
        "D": 12,
        "eps": 0.0,
        "weight": None,
        "sum": inputs["x"],
        "dx": None,
        "dweight": torch.ones(12),
    }
    grid, arguments, _ = triton_kernels.plan_norm("add_rms_norm_bwd", fields)
    assert grid == (3,) and arguments["TILES"] == 5  # 14 tiles
    assert_correct(op, reference, inputs)
