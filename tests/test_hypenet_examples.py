"""The examples in the docstrings of hypenet run and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import hypenet

WITH_EXAMPLES = {"cache", "configuration_hypenet", "context", "conversion", "modeling_hypenet"}
MODULES = sorted(module.name for module in pkgutil.iter_modules(hypenet.__path__))


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    failed, tried = doctest.testmod(importlib.import_module(f"hypenet.{name}"), raise_on_error=False)
    assert failed == 0 and (tried > 0) == (name in WITH_EXAMPLES)
