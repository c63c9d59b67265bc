"""Seed every test alike, and fill newly allocated tensors with NaN, so that reading uninitialised memory shows."""

import pytest
import torch
from emulation import device  # noqa: F401, a fixture
from every_op import suppressed_where_a_gpu_is_too_small


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    with suppressed_where_a_gpu_is_too_small(then=pytest.skip):
        return (yield)


@pytest.fixture(autouse=True)
def seeded_and_poisoned():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
