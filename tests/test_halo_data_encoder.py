"""Tokens are those of the tokenizer, in every process, and come back from a shard."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from halo_tiny import documents

from halo.data.encoder import Encoder
from halo.data.shards import Header, Shard, open_shard, read_header, write_shard

ROOT = Path(__file__).resolve().parents[1]


def test_a_shard_comes_back(tmp_path):
    shard = Shard(
        np.array([1, 2**32 - 1, 7], np.uint32), np.array([1, 3], np.uint64), np.array([5, 2**64 - 1], np.uint64)
    )
    written = write_shard(
        tmp_path / "0.tokens", shard, Header(0, 0, None, [["a", 1], 0], 0.5, True, {"records": 2}, "")
    )
    assert read_header(tmp_path / "0.tokens") == written and (written.tokens, written.documents) == (3, 2)
    again = open_shard(tmp_path / "0.tokens")
    for name in ("tokens", "offsets", "keys"):
        assert np.array_equal(getattr(again, name), getattr(shard, name))
        assert getattr(again, name).dtype == getattr(shard, name).dtype
    assert isinstance(again.tokens, np.memmap) and again.tokens.ctypes.data % 4 == 0


@pytest.mark.parametrize("fast", [True, False])
def test_encoder_gives_the_tokens_of_the_tokenizer(tokenizer, fast, monkeypatch):
    texts = [
        *documents(3),
        "",
        " ",
        "\n\n a  b\t",
        "caf\xe9 \u4f60\u597d \U0001f600",
        f"a {tokenizer.eos_token} b",
        "x" * 5000,
    ]
    tokenizer(texts, truncation=True, padding=True, max_length=8)  # leaves its settings in the tokenizer
    if not fast:
        monkeypatch.setattr(type(tokenizer), "is_fast", False)
    encode = Encoder(tokenizer)
    rows = pickle.loads(pickle.dumps(encode))(texts)
    for text, row in zip(texts, rows, strict=True):
        assert row.dtype == np.uint32
        assert row.tolist() == [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert encode([]) == []


def test_workers_import_neither_torch_nor_transformers():
    code = "import sys, halo.data.workers; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"
