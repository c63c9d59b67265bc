"""transformers' own common tests of models, run against four HypeNets.

    TRANSFORMERS_CHECKOUT=folder python -m pytest -o addopts= tests/transformers_common.py

folder: a checkout of transformers at the tag of the installed version, or its unpacked source distribution
(`pip download transformers==... --no-deps --no-binary :all:`), which lacks the tests of generation and of export: these
are then left out. What is known to fail is in FAILING, with the reason; a test of it that passes is an error.
"""

import contextlib
import os
import sys
import types
import unittest
import unittest.mock
from pathlib import Path

import pytest
import torch
import transformers

import hypenet

CHECKOUT = os.environ.get("TRANSFORMERS_CHECKOUT")
if CHECKOUT is None:
    pytest.skip("TRANSFORMERS_CHECKOUT must name a checkout of transformers", allow_module_level=True)
TESTS = Path(CHECKOUT) / "tests"
# Modules that a source distribution of transformers lacks, with empty replacements.
ABSENT = {
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "utils.test_configuration_utils": {"config_common_kwargs": {}},
}
HYPENETS = {
    "Attention": ["attn", "attn"],
    "Lightning": ["lightning", "attn"],
    "GatedDelta": ["gdn", "attn"],
    "Mamba2": ["mamba2", "attn"],
}
# test -> (of which HypeNets, why it fails)
FAILING = {
    "test_retain_grad_hidden_states_attentions": (
        tuple(HYPENETS),
        "hidden states of a padded batch are copies that the output does not depend on: layers see no padding",
    ),
    "test_keep_in_fp32_modules_exist": (
        tuple(HYPENETS),
        "the class lists the decays of all mixers, and none of these HypeNets has all",
    ),
    "test_reverse_loading_mapping": (
        ("Attention", "Lightning"),
        "the renamings of the class are for Gated DeltaNet and Mamba2",
    ),
}


def import_tests():
    """Import transformers' test modules as the package `tests` of the checkout; what it lacks is empty."""
    package = types.ModuleType("transformers_tests")
    package.__path__ = [str(TESTS)]
    sys.modules["transformers_tests"] = package
    for module, names in ABSENT.items():
        if not TESTS.joinpath(*module.split(".")).with_suffix(".py").is_file():
            folder = module.partition(".")[0]
            sys.modules[f"transformers_tests.{folder}"] = types.ModuleType(folder)
            sys.modules[f"transformers_tests.{module}"] = types.SimpleNamespace(**names)
    # The tests of a configuration import transformers a second time, from the folder that they are in.
    with unittest.mock.patch("transformers.utils.direct_transformers_import", lambda folder: transformers):
        from transformers_tests import test_configuration_common, test_modeling_common

    return test_configuration_common, test_modeling_common


configurations, modeling = import_tests()


class HypeNetTester:
    """The small model and its inputs; the names are those that transformers' tests ask for."""

    batch_size, seq_length, is_training = 3, 7, True
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads, num_labels = 99, 32, 2, 4, 3
    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def __init__(self, parent, mixer_types):
        self.parent, self.mixer_types = parent, mixer_types

    def get_config(self):
        recurrent = self.mixer_types[0] != "attn"
        return hypenet.HypeNetConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=48,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            head_dim=8,
            mixer_types=self.mixer_types,
            attn_use_rope=not recurrent,
            attn_logits_scaling="hype 100" if recurrent else None,
            pad_token_id=self.pad_token_id,
            bos_token_id=self.bos_token_id,
            eos_token_id=self.eos_token_id,
        )

    def prepare_config_and_inputs(self):
        input_ids = modeling.ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 3) + 3
        mask = torch.tril(torch.ones(self.batch_size, self.seq_length, dtype=torch.long)).roll(4, dims=1)
        mask[:, -self.batch_size :] = 1  # left padding of several lengths
        return self.get_config(), {"input_ids": input_ids, "attention_mask": mask.cummax(dim=1).values}

    prepare_config_and_inputs_for_common = prepare_config_and_inputs


class CommonTests(modeling.ModelTesterMixin, modeling.GenerationTesterMixin):
    """The tests of one HypeNet; `mixer_types` says which."""

    mixer_types = ("attn",)
    all_model_classes = (
        hypenet.HypeNetModel,
        hypenet.HypeNetForCausalLM,
        hypenet.HypeNetForSequenceClassification,
        hypenet.HypeNetForTokenClassification,
        hypenet.HypeNetForQuestionAnswering,
    )
    has_generation = hasattr(modeling.GenerationTesterMixin, "test_greedy_generate")
    all_generative_model_classes = (hypenet.HypeNetForCausalLM,) if has_generation else ()
    test_torch_exportable = False
    is_encoder_decoder = False
    has_attentions = False  # no mixer has attention weights that could be returned

    def setUp(self):
        self.model_tester = HypeNetTester(self, self.mixer_types)
        self.config_tester = configurations.ConfigTester(self, config_class=hypenet.HypeNetConfig, hidden_size=32)

    def test_generation_tester_mixin_inheritance(self):
        if not self.has_generation:
            self.skipTest("the source distribution lacks the tests of generation")
        super().test_generation_tester_mixin_inheritance()

    def test_config(self):
        self.config_tester.run_common_tests()


def known_to_fail(test, reason):
    """Return a test that is skipped for this reason if `test` fails, and fails if it passes."""
    original = getattr(modeling.ModelTesterMixin, test)

    def run(self):
        self.subTest = lambda *args, **kwargs: contextlib.nullcontext()  # so that the first failure ends the test
        with self.assertRaises(AssertionError):
            original(self)
        self.skipTest(reason)

    return run


# Which heads have a loss, and what their labels are, the tests know from these tables.
for table in ("", "CAUSAL_LM", "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING"):
    names = getattr(modeling, f"MODEL_FOR_{table}_MAPPING_NAMES" if table else "MODEL_MAPPING_NAMES")
    head = "For" + table.title().replace("_", "").replace("CausalLm", "CausalLM") if table else "Model"
    names["hypenet"] = f"HypeNet{head}"

for name, mixers in HYPENETS.items():
    failing = {test: known_to_fail(test, why) for test, (hypenets, why) in FAILING.items() if name in hypenets}
    globals()[f"{name}Test"] = type(f"{name}Test", (CommonTests, unittest.TestCase), failing | {"mixer_types": mixers})


def test_the_versions_agree():
    found = [path for path in (Path(CHECKOUT) / "src" / "transformers").glob("__init__.py")]
    assert f'__version__ = "{transformers.__version__}"' in found[0].read_text()
