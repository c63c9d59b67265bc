"""python -m bench families: a record of a tiny model, and its tables."""

import json

import pytest
import torch

from bench import families, family_models, records, report, tables
from hypenet_kernels.integrations import _call_sites


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(families, "GATED_DELTA", family_models.TINY)
    monkeypatch.setattr(families, "MAMBA2", family_models.TINY)
    monkeypatch.setattr(families, "WIDTHS", families.WIDTHS | {"vocabulary": 96})
    monkeypatch.setattr(families, "PREFILL_TOKENS", 65)
    monkeypatch.setattr(families, "CONTEXT", 5)
    monkeypatch.setattr(families, "MIN_ROUNDS", 2)


def record(*names):
    seen = []
    result = families.run("cpu", list(names), False, 0.0, lambda *progress: seen.append(progress))
    assert len(seen) == len({(row["family"], row["dtype"]) for row in result["rows"]})
    return json.loads(json.dumps(result))


def test_a_record_and_its_tables():
    result = record("qwen3_5_text", "mamba2")
    parts = {(row["family"], row["phase"], row["part"]) for row in result["rows"]}
    assert parts == {
        (family, phase, part)
        for family, functions in (
            ("qwen3_5_text", ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")),
            ("mamba2", ("mamba2_chunk_scan", "mamba2_selective_state_update")),
        )
        for phase, function, conv in zip(
            ("prefill", "decode"), functions, ("causal_conv1d_fn", "causal_conv1d_update"), strict=True
        )
        for part in ("model", function, conv)
    }
    assert all(row["ratio"] == row["without"]["median"] / row["patched"]["median"] for row in result["rows"])
    assert len(tables.speedup_cells(result)) == 4 and all(all(cells) for cells in tables.speedup_cells(result))
    assert all(len(tables.family_cells(row)) == len(tables.FAMILY_HEADER) for row in result["rows"])


def test_results_show_a_record(tmp_path):
    result = record("mamba2")
    records.save(tmp_path / "results" / "some-cpu" / "families.json", result)
    text = report.write(tmp_path / "results", tmp_path / "RESULTS.md").read_text()
    ratio = next(row["ratio"] for row in result["rows"] if row["part"] == "mamba2_selective_state_update")
    assert "### transformers' models" in text and text.count("| mamba2 |") == 2 and f"| {ratio:.2f} |" in text


def test_a_wrong_model_is_not_timed(monkeypatch):
    scan = _call_sites.hypenet_kernels.chunk_simple_gla
    monkeypatch.setattr(
        _call_sites.hypenet_kernels,
        "chunk_simple_gla",
        lambda **arguments: tuple(x if x is None else 10 * x for x in scan(**arguments)),
    )
    result = record("mamba2")
    assert [(row["part"], row["dtype"]) for row in result["rows"]] == [("model", "float32")]
    assert all("allowed" in row["failure"] for row in result["rows"])
    assert all("allowed" in tables.family_cells(row)[-1] for row in result["rows"])
    assert torch.is_grad_enabled()


def test_an_unknown_family_is_named():
    with pytest.raises(ValueError, match=r"families must be of .*, got llama"):
        record("llama")
