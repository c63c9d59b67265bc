"""Write RESULTS.md from the records under bench/results, and the remarks in bench/results/facts.md."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import plot, records, tables, targets
from bench.records import FamiliesRecord, ModelRecord, OpsRecord, Stamp
from bench.sass.predict import SassRecord

OUT = records.ROOT / "RESULTS.md"
INTRODUCTION = """# Results

Written by `python -m bench report` from the records under [bench/results](bench/results).

- **time**: the median; **spread**: half the interquartile range.
- **roof**: the least time that the work can take on this machine, given the memory bandwidth and the rate of torch's
  matrix product, both measured in the same run. A kernel that is faster than torch's product exceeds 100 %. On the
  CPU, bandwidth is measured just before and after every case that it bounds.
- **rate**: FLOPs or bytes of the mathematics, over the time.
- **speedup over peers**: a peer's time over ours. Peers run on the same tensors in the same run, and only after their
  results agreed with ours.
"""


def write(results: Path | None = None, out: Path = OUT) -> Path:
    """Write RESULTS.md and the figures; returns its path."""
    results = results or records.RESULTS
    sections = [INTRODUCTION]
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        sections += _device(folder, out.parent)
    if (results / "sass.json").is_file():
        sections += _sass(records.load(results / "sass.json"))
    sections += _conversions(results / "conversions")
    facts = results / "facts.md"
    if facts.is_file():
        sections.append(facts.read_text().strip())
    out.write_text("\n\n".join(section.strip() for section in sections) + "\n")
    plot.draw_overview(results)
    return out


def _device(folder: Path, root: Path) -> list[str]:
    kinds: dict[str, tuple[str, Callable[[Any], str]]] = {
        "ops": ("Ops", _ops),
        "model": ("Whole model", _model),
        "families": ("transformers' models", _families),
    }
    paths = [path for kind in kinds if (path := folder / f"{kind}.json").is_file()]
    if not paths:
        return []
    drawn = any(path.stem != "families" for path in paths)
    pictures, sections = plot.draw(folder) if drawn else [], list[str]()
    for path in paths:
        record = records.load(path)
        if not sections:
            level = record["stamp"]["level"]
            on_cpu = record["stamp"]["threads"] is not None
            sections.append(f"## {record['stamp']['device']}" + (f", {level}" if on_cpu else ""))
        title, write_section = kinds[record["kind"]]
        sections += [f"### {title}", _stamp(record["stamp"]), write_section(record)]
    return [*sections, *(f"![{path.stem}]({path.relative_to(root)})" for path in pictures)]


def _sass(record: SassRecord) -> list[str]:
    tflops = record["tflops"]
    return [
        "## CUDA kernels: PREDICTION of a model",
        f"{_stamp(record['stamp'])} Kernels compiled by {record['compiler']} for sm_90a.",
        "**No hardware was involved: nothing here is a measurement.** `python -m bench sass` replays the machine code "
        "of every kernel, with the compiler's own control codes, in a model of one SM (`bench/sass/machine.py`), for "
        "K = V = D = 128 and bfloat16. Caches, contention for DRAM and launch overhead are not modelled, and small "
        "kernels are left out. The model's one check: HyPE's forward has the design of FlashAttention-2. It is "
        f"predicted at {tflops['predicted']:.0f} TFLOP/s; FlashAttention-2 was measured at {tflops['measured']:.0f} "
        "(arXiv 2407.08608: H100, causal, D = 128, 8k tokens). Expect errors of 20 %.",
        "Cycles of an SM per iteration of a kernel's loop, or per round of whole blocks; instructions per warp. The "
        "limiter is the resource that is busy for more than two thirds of the cycles, else latency.",
        tables.markdown(tables.KERNEL_HEADER, [tables.kernel_cells(row) for row in record["kernels"]]),
        "Times follow from cycles and grid, or from 90 % of the memory bandwidth where that takes longer; the backward "
        "is without the forward. Times of others are as published: of the gated delta rule on an H200, of attention on "
        "an H100 (sources: `bench/sass/kernels.py`).",
        tables.markdown(tables.PREDICTED_HEADER, [tables.predicted_cells(row) for row in record["cases"]]),
    ]


def _conversions(folder: Path) -> list[str]:
    """Return a section for each record of `python -m bench conversion`."""
    sections: list[str] = []
    for path in sorted(folder.glob("*.json")):
        record = records.load(path)
        lines = [f"## Conversion: {path.stem}", _stamp(record["stamp"])]
        kills = ", ".join(
            f"{kill['stage']}" + (f" (after step {kill['continued_after_step']})" if len(kill) > 2 else "")
            for kill in record["kills"]
        )
        killed = f" It was killed and continued in: {kills}." if kills else ""
        tokens = sum(stage.get("tokens", 0) for stage in record["stages"].values())
        lines.append(
            f"Teacher {record['config']['teacher']}, {record['config']['mixer']} layers, {tokens:,} tokens of training "
            f"in all, {record['seconds'] / 60:.0f} minutes.{killed} Softmax attention in "
            f"layers {record['layers']}, scale base {record['scale']}."
        )
        table = ["| stage | tokens | first loss | last loss | seconds |", "|---|---:|---:|---:|---:|"]
        for name, stage in record["stages"].items():
            if "tokens" in stage:
                table.append(
                    f"| {name} | {stage['tokens']:,} | {stage['first_loss']:.3f} | {stage['last_loss']:.3f} | "
                    f"{stage['training_seconds']:.0f} |"
                )
        lengths = sorted({row["length"] for row in record["rows"]})
        rows = [f"| model | {' | '.join(f'{length} tokens' for length in lengths)} |"]
        rows.append("|---|" + "---:|" * len(lengths))
        for model in dict.fromkeys(row["model"] for row in record["rows"]):
            cells = [
                f"recall {row['recall']:.2f}, {row['bits_per_byte']:.3f} bits per byte"
                for row in record["rows"]
                if row["model"] == model
            ]
            rows.append(f"| {model} | {' | '.join(cells)} |")
        sections += [*lines, "\n".join(table), "\n".join(rows)]
    return sections


def _stamp(stamp: Stamp) -> str:
    threads = f", {stamp['threads']} threads, {stamp['level']}" if stamp["threads"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in stamp["versions"].items())
    changed = " with uncommitted changes" if stamp["changed"] else ""
    return f"Commit {stamp['commit'][:12]}{changed}, {stamp['date']}{threads}; {versions}."


def _ops(record: OpsRecord) -> str:
    roofs = record["roofs"]
    rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in roofs["matmul"].items())
    memory = f"copy {roofs['copy'] / 1e9:.1f} GB/s, read {roofs['read'] / 1e9:.1f} GB/s"
    sections = [
        f"Roofs: {memory}; matrix product {rates}.",
        tables.markdown(tables.OPS_HEADER, [tables.op_cells(row) for row in record["rows"]]),
    ]
    if aims := targets.cells(record):
        sections += [
            "Measured against the targets, several cases in the given order (both: forward and backward):",
            tables.markdown(targets.HEADER, aims),
        ]
    return "\n\n".join(sections)


def _model(record: ModelRecord) -> str:
    ratios = tables.markdown(tables.STUDENT_HEADER, tables.student_cells(record))
    table = tables.markdown(tables.MODEL_HEADER, [tables.model_cells(row) for row in record["rows"]])
    what = (
        f"Random weights of {record['name']}'s widths, {record['layers']} layers, batch 1. HypeNet (one layer in four "
        "is softmax attention) against Qwen3 of transformers, each in the fastest dtype that was measured:"
    )
    steps = "Decode steps follow a prompt of the length."
    if record["filled"]:
        steps = "Decode steps run on caches with random contents; where no prefill is given, no prompt was read."
    if "import_s" in record:
        ours, theirs = (record["import_s"][package] for package in ("hypenet", "transformers"))
        steps += f" A process that imports HypeNet's class takes {ours} s, one that imports Qwen3's {theirs} s."
    return f"{what}\n\n{ratios}\n\n{steps}\n\n{table}"


def _families(record: FamiliesRecord) -> str:
    sizes = record["sizes"]
    what = (
        "Speedup of transformers' models by `patch_transformers()`: random weights, 4 layers of width "
        f"{sizes['hidden']}, prefill of {sizes['prefill']} tokens, decode at batch {sizes['decode_batch']}. The "
        "recurrence is the function that is replaced, timed alone on the model's tensors."
    )
    return f"{what}\n\n{tables.markdown(tables.SPEEDUP_HEADER, tables.speedup_cells(record))}"
