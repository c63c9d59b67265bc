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


@pytest.fixture(scope="module")
def tokenizer():
    """Return the small tokenizer of the conversion's tests."""
    from halo_tiny import tiny_tokenizer  # here, so that tests of kernels need none of halo's packages

    return tiny_tokenizer()


@pytest.fixture(scope="module")
def text_directory(tmp_path_factory):
    """Return a directory of sixty text files."""
    from halo_text import write_texts
    from halo_tiny import documents

    return write_texts(tmp_path_factory.mktemp("some text"), documents())
