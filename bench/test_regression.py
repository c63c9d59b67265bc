"""Speed that must not be lost, as ratios to peers of the same run, never as times: pytest bench --benchmark-only.

The bars stand well below what was measured (RESULTS.md), since machines differ.
"""

import pytest

from bench import cases, timing
from bench.peers import PEERS

SECONDS = 2.0
HEADS = {"H": 8, "K": 128, "V": 128}
BARS = [  # case, peer, at least so many times as fast
    (cases.Case("chunk_gated_delta_rule", {"B": 1, "T": 2048, **HEADS}), "transformers", 2.5),
    (cases.Case("chunk_gated_delta_rule", {"B": 1, "T": 2048, **HEADS}, backward=True), "transformers", 2.5),
    (cases.Case("chunk_gated_delta_rule", {"B": 1, "T": 128, "H": 2, "K": 32, "V": 32}), "transformers", 1.0),
    # Steps run from memory: a small batch waits for it and for Python, a large one for memory alone.
    (cases.Case("gated_delta_step", {"B": 4, **HEADS}), "transformers", 1.5),
    (cases.Case("gated_delta_step", {"B": 16, "H": 32, "K": 128, "V": 128}), "transformers", 4.0),
    (cases.Case("hype_attention", {"B": 1, "T": 1024, "H": 16, "HK": 4, "D": 128}), "torch SDPA", 1.0),
    (cases.Case("hype_attention", {"B": 1, "T": 1024, "H": 16, "HK": 4, "D": 128}, backward=True), "torch SDPA", 1.0),
]


@pytest.mark.parametrize(("case", "peer", "bar"), BARS, ids=[f"{case.name}, {peer}" for case, peer, _ in BARS])
def test_faster_than(benchmark, case, peer, bar):
    workload = cases.build(case, "cpu")
    theirs = PEERS[peer](case, workload.tensors)
    times = timing.measure({"ours": workload.run, peer: theirs}, "cpu", SECONDS)
    benchmark.extra_info["ratio"] = times[peer].median / times["ours"].median
    benchmark(workload.run)
    assert benchmark.extra_info["ratio"] >= bar
