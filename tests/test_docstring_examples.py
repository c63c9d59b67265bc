"""The examples in the docstrings of hypenet_kernels and hypenet run and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import hypenet
import hypenet_kernels

KERNELS = ("activation", "attention", "convolution", "gated_delta", "normalization", "simple_gla", "states")
WITH_EXAMPLES = {
    f"{package}.{name}"
    for package, names in {
        "hypenet_kernels": KERNELS,
        "hypenet": ("cache", "configuration_hypenet", "context", "conversion", "layers", "modeling_hypenet", "session"),
    }.items()
    for name in names
}
MODULES = [
    f"{package.__name__}.{module.name}"
    for package in (hypenet_kernels, hypenet)
    for module in pkgutil.iter_modules(package.__path__)
    if module.name != "__main__" and not module.name.startswith(("_cpu", "_cuda", "triton"))
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    failed, tried = doctest.testmod(importlib.import_module(name), raise_on_error=False)
    assert failed == 0 and (tried > 0) == (name in WITH_EXAMPLES)
