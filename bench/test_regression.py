"""Regression tests of speed, as ratios to peers in the same run: pytest bench --benchmark-only.

The bounds are well below the measured ratios (RESULTS.md), because machines differ.
"""

from typing import Any

import pytest

from bench import cases, timing
from bench.peers import PEERS

SECONDS = 2.0
HEADS = {"H": 8, "K": 128, "V": 128}
BOUNDS = [  # case, peer, least speedup over it
    (cases.Case("chunk_gated_delta_rule", {"B": 1, "T": 2048, **HEADS}), "transformers", 2.5),
    (cases.Case("chunk_gated_delta_rule", {"B": 1, "T": 2048, **HEADS}, backward=True), "transformers", 2.5),
    (cases.Case("chunk_gated_delta_rule", {"B": 1, "T": 128, "H": 2, "K": 32, "V": 32}), "transformers", 1.0),
    # Steps read their state from memory. With a small batch, Python overhead counts too.
    (cases.Case("gated_delta_step", {"B": 4, **HEADS}), "transformers", 1.5),
    (cases.Case("gated_delta_step", {"B": 16, "H": 32, "K": 128, "V": 128}), "transformers", 4.0),
    (cases.Case("hype_attention", {"B": 1, "T": 1024, "H": 16, "HK": 4, "D": 128}), "torch SDPA", 1.0),
    (cases.Case("hype_attention", {"B": 1, "T": 1024, "H": 16, "HK": 4, "D": 128}, backward=True), "torch SDPA", 1.0),
]


@pytest.mark.parametrize(("case", "peer", "bound"), BOUNDS, ids=[f"{case.name}, {peer}" for case, peer, _ in BOUNDS])
def test_speedup_over_peer(benchmark: Any, case: cases.Case, peer: str, bound: float) -> None:
    workload = cases.build(case, "cpu")
    theirs = PEERS[peer](case, workload.tensors)
    assert theirs is not None
    times = timing.measure({"ours": workload.run, peer: theirs}, "cpu", SECONDS)
    benchmark.extra_info["ratio"] = times[peer].median / times["ours"].median
    benchmark(workload.run)
    assert benchmark.extra_info["ratio"] >= bound
