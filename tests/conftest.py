"""Seed every test alike, and fill newly allocated tensors with NaN, so that reading uninitialised memory shows.

The whole default suite runs in two processes, each with one thread; named files, `--pdb` and CUDA tests in one.
"""

import os
import sys

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from emulation import device  # noqa: F401, a fixture
from every_op import suppressed_where_a_gpu_is_too_small


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads its options
def pytest_cmdline_main(config):
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and "not cuda" in config.option.markexpr
    given = config.getoption("numprocesses", 0) is not None  # also without pytest-xdist, and in its own processes
    if whole and not given and not config.option.usepdb and not hasattr(config, "workerinput"):
        config.option.numprocesses, config.option.dist = 2, "worksteal"


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
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()  # or functions that several tests compile would reach dynamo's limit of recompilations


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
