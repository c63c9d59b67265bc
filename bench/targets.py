"""The speeds that the CPU kernels aim at, as ratios within one record, to print beside what was measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.cases import Case
from bench.records import OpsRecord, Row

HEADER = ["what", "target", "measured", "met"]
HEADS = {"H": 32, "K": 128, "V": 128}
ATTENTION = {"H": 32, "HK": 8, "D": 128}
DELTA, GLA, HYPE = "chunk_gated_delta_rule", "chunk_simple_gla", "hype_attention"


@dataclass(frozen=True)
class Target:
    """For each of `cases`, `measure` of its row, or of the row and that of the case in `against`, is at least `least`.

    `measure` returns None if the row lacks what it needs, for example the peer.
    """

    what: str
    cases: Sequence[Case]
    least: float
    unit: str
    measure: Callable[..., float | None]
    against: Sequence[Case] = ()

    def cells(self, rows: dict[str, Row]) -> list[str]:
        """Return the cells of HEADER; `rows`: the timed rows of a record by name."""
        values = []
        for names in zip(
            *([case.name for case in cases] for cases in (self.cases, self.against) if cases), strict=True
        ):
            values.append(self.measure(*(rows[name] for name in names)) if rows.keys() >= {*names} else None)
        measured = ", ".join("not measured" if value is None else f"{value:.3g}" for value in values)
        met = sum(value is not None and value >= self.least for value in values)
        every = "yes" if met == len(values) else "no" if met == 0 else f"{met} of {len(values)}"
        return [self.what, f"{self.least:g} {self.unit}", measured, every]


def cells(record: OpsRecord) -> list[list[str]]:
    """Return the cells of HEADER for every target; none for a GPU's record."""
    rows = {row["name"]: row for row in record["rows"] if row["ours"] is not None}
    return [] if record["stamp"]["threads"] is None else [target.cells(rows) for target in TARGETS]


def _over(peer: str) -> Callable[[Row], float | None]:
    return lambda row: row["peers"][peer].get("ratio") if peer in row["peers"] else None


def _speedup(row: Row, other: Row) -> float | None:
    assert row["ours"] is not None and other["ours"] is not None
    return other["ours"]["median"] / row["ours"]["median"]


def _of_product(row: Row) -> float | None:
    return 100 * row["fraction"]


def _of_copy(row: Row) -> float | None:
    """Bytes per second as a percentage of those of a copy measured beside the case."""
    assert row["ours"] is not None
    return 1e5 * row["bytes"] / row["ours"]["median"] / row["memory"]["copy"] if "memory" in row else None


def _targets() -> list[Target]:
    def chunk(op: str, backward: bool = False) -> list[Case]:
        return [Case(op, {"B": 1, "T": T, **HEADS}, backward=backward) for T in (1024, 4096)]

    def attention(backward: bool = False) -> list[Case]:
        return [Case(HYPE, {"B": 1, "T": T, **ATTENTION}, backward=backward) for T in (1024, 4096)]

    def prefill(dtype: str) -> list[Case]:
        sizes = {"B": 1, "T": 1024}
        return [Case(op, sizes | heads, dtype) for op, heads in ((DELTA, HEADS), (GLA, HEADS), (HYPE, ATTENTION))]

    def decode(dtype: str) -> list[Case]:
        return [Case("hype_attention_decode", {"B": B, "S": 32768, **ATTENTION}, dtype) for B in (1, 8)]

    def small(op: str, **sizes: int) -> list[Case]:
        heads = (("D",), {"HK": 1}) if op == HYPE else (("K", "V"), {})
        return [
            Case(op, {"B": 1, "T": T, "H": 2, **heads[1], **dict.fromkeys(heads[0], D), **sizes}, backward=backward)
            for T, D in ((16, 16), (128, 64))
            for backward in (False, True)
        ]

    steps = [Case("gated_delta_step", {"B": B, **HEADS}) for B in (1, 16)]
    cached = [Case("gated_delta_step", {"B": 1, **HEADS, "cached": 1})]
    transformers, ggml, sdpa = "x transformers", "x ggml", "x torch SDPA"
    lengths = "T = 1024, 4096"
    small_lengths = "T = 16 forward, T = 16 both, T = 128 forward, T = 128 both"
    delta_step = "gated delta step from memory, batch 1, 16"
    return [
        Target(f"gated delta rule, forward, {lengths}", chunk(DELTA), 5, transformers, _over("transformers")),
        Target(f"gated delta rule, forward, {lengths}", chunk(DELTA), 3, ggml, _over("ggml")),
        Target(f"gated delta rule, forward, {lengths}", chunk(DELTA), 70, "% of the matrix product", _of_product),
        Target(f"gated delta rule, both, {lengths}", chunk(DELTA, True), 5, transformers, _over("transformers")),
        Target(f"simple GLA, forward, {lengths}", chunk(GLA), 1.3, "x gated delta rule", _speedup, chunk(DELTA)),
        Target(
            f"simple GLA, both, {lengths}", chunk(GLA, True), 1.3, "x gated delta rule", _speedup, chunk(DELTA, True)
        ),
        Target(delta_step, steps, 10, transformers, _over("transformers")),
        Target(delta_step, steps, 2, ggml, _over("ggml")),
        Target(delta_step, steps, 70, "% of a copy", _of_copy),
        Target("gated delta step from cache, batch 1", cached, 10, transformers, _over("transformers")),
        Target("gated delta step from cache, batch 1", cached, 2, ggml, _over("ggml")),
        Target(f"HyPE attention, forward, {lengths}", attention(), 1.2, sdpa, _over("torch SDPA")),
        Target(f"HyPE attention, both, {lengths}", attention(True), 1, sdpa, _over("torch SDPA")),
        Target("HyPE decode, 32k keys, batch 1, 8", decode("float32"), 80, "% of a copy", _of_copy),
        Target(
            "bfloat16, forward, T = 1024: gated delta rule, simple GLA, HyPE attention; HyPE decode, batch 1, 8",
            [*prefill("bfloat16"), *decode("bfloat16")],
            1,
            "x float32",
            _speedup,
            [*prefill("float32"), *decode("float32")],
        ),
        Target(f"gated delta rule, {small_lengths}", small(DELTA), 1, transformers, _over("transformers")),
        Target(f"HyPE attention, {small_lengths}", small(HYPE), 1, sdpa, _over("torch SDPA")),
        Target(f"HyPE attention with gate, {small_lengths}", small(HYPE, gated=1), 1, sdpa, _over("torch SDPA")),
    ]


TARGETS = _targets()
