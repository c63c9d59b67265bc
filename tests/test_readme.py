"""The Python examples of README.md and docs/: each compiles, and each runs, as printed, where what it loads is there.

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
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
BLOCKS = {page: re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) for page, text in PAGES.items()}
EXAMPLES = [
    pytest.param(page, block, id=f"{page} {number}") for page in BLOCKS for number, block in enumerate(BLOCKS[page], 1)
]
NEEDS = {
    "flash-linear-attention": importlib.util.find_spec("fla") is not None,
    "peft": importlib.util.find_spec("peft") is not None,
    "torchao": importlib.util.find_spec("torchao") is not None,
    "a server on port 8000": False,  # tests/test_hypenet_serve.py runs it
    "a GPU": torch.cuda.is_available(),
}


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


def test_there_are_examples():
    """For each kind of user in README.md, and on every page that has to do with Python."""
    assert len(BLOCKS["README.md"]) >= 3
    without = {page for page, blocks in BLOCKS.items() if not blocks}
    assert without == {"docs/README.md", "docs/benchmark.md"}
    assert all(len(BLOCKS[page]) == PAGES[page].count("```python") for page in PAGES)


@pytest.mark.parametrize(("page", "block"), EXAMPLES)
def test_example(page, block, folder):
    code = compile(block, page, "exec")
    if (needs := re.match(r"# needs: (.*)\n", block)) and not NEEDS[needs[1]]:
        pytest.skip(f"needs {needs[1]}")
    exec(code, {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page):
    prose = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", prose) if "://" not in target]
    assert [target for target in targets if not (ROOT / page).parent.joinpath(target).exists()] == []
    assert targets or page in ("docs/serve.md", "docs/use-the-model.md")


def test_the_index_names_every_page():
    named = set(re.findall(r"\]\(([\w-]+\.md)\)", PAGES["docs/README.md"]))
    assert named == {path.name for path in ROOT.glob("docs/*.md")} - {"README.md"}


def test_every_public_op_is_in_the_table():
    import hypenet_kernels

    ops = {name for name in hypenet_kernels.__all__ if re.match(r"(chunk|fused|gated|simple|hype|causal)_", name)}
    aliases = {"chunk_gdn", "fused_recurrent_gdn", "chunk_lightning_attn", "chunk_retention"}
    assert {name for name in ops - aliases if f"`{name}`" not in PAGES["docs/use-the-kernels.md"]} == set()
