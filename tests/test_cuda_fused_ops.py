"""The fused ops on a GPU, where they are Triton kernels."""

import pytest
import torch
from test_fused_ops import CASES, DTYPES, SHAPES, assert_correct, make_case


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_on_cuda(name, dtype):
    with torch.device("cuda"):
        for shape in (*SHAPES, (1, 5000, 8, 128), (2, 300, 1, 4096)):
            assert_correct(*make_case(name, dtype, shape))
