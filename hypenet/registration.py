"""Registration of model classes where transformers looks them up by name."""

import sys
from types import ModuleType

from transformers import PreTrainedModel


def register_architectures(*classes: type[PreTrainedModel]) -> None:
    """Make model classes attributes of the module transformers.

    `transformers serve` and pipelines take the class of a configuration's `architectures` from there. There can be two
    such modules: transformers loads itself a second time, and what was imported before that keeps the first one.
    """
    loaded = [module for name, module in sys.modules.copy().items() if name.split(".")[0] == "transformers"]
    held = [vars(module).get("transformers") for module in loaded]
    for package in [sys.modules["transformers"], *held]:
        if isinstance(package, ModuleType):
            for model_class in classes:
                setattr(package, model_class.__name__, model_class)
