"""The Python examples of README.md: each compiles, and each runs, as it is printed, in a folder that has what it loads.

A block whose first line is `# needs: X` runs only where X is there (NEEDS).
"""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from halo_tiny import tiny_tokenizer
from hypenet_models import small_model
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
NEEDS = {
    "flash-linear-attention": importlib.util.find_spec("fla") is not None,
    "a GPU": torch.cuda.is_available(),
}


def title(block):
    """Return the first line that says what a block is about."""
    return next(line for line in block.splitlines() if "hypenet" in line)


def save(model, folder):
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with small random models under the names that the examples load."""
    size = len(tiny_tokenizer())
    config = Qwen3NextConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    save(Qwen3NextForCausalLM(config), tmp_path / "Qwen" / "Qwen3-Next-80B-A3B-Instruct")
    save(small_model(dtype=torch.float32, vocab_size=size), tmp_path / "OUT" / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_is_an_example_for_each_kind_of_user():
    assert len(BLOCKS) == README.count("```python") >= 4
    assert len({title(block) for block in BLOCKS}) == len(BLOCKS)


@pytest.mark.parametrize("block", BLOCKS, ids=title)
def test_example(block, folder):
    code = compile(block, "README.md", "exec")
    if (needs := re.match(r"# needs: (.*)\n", block)) and not NEEDS[needs[1]]:
        pytest.skip(f"needs {needs[1]}")
    exec(code, {"__name__": "__main__"})


def test_links_and_pictures_exist():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets and all((ROOT / target).exists() for target in targets if "://" not in target)


def test_every_public_op_is_in_the_table():
    import hypenet_kernels

    ops = {name for name in hypenet_kernels.__all__ if re.match(r"(chunk|fused|gated|simple|hype|causal)_", name)}
    aliases = {"chunk_gdn", "fused_recurrent_gdn", "chunk_lightning_attn", "chunk_retention"}
    assert {name for name in ops - aliases if f"`{name}`" not in README} == set()
