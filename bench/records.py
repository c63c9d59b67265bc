"""Results on disk: JSON, stamped with device, versions, commit and date, in bench/results/<device>/."""

import csv
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch

import hypenet_kernels

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("torch", "transformers", "triton", "flash-linear-attention", "flashinfer-python", "flash-attn", "flash-qla")


class Stamp(TypedDict):
    """The circumstances of a measurement. `changed`: the checkout had uncommitted changes."""

    device: str
    threads: int | None
    level: str
    versions: dict[str, str]
    commit: str
    changed: bool
    date: str


class Times(TypedDict):
    """A timing.Timing: milliseconds per call."""

    median: float
    low: float
    high: float
    rounds: int
    latency: float | None
    note: str | None
    gpu: NotRequired[dict[str, Any] | None]


class PeerTimes(Times, total=False):
    """Times of a peer and its `ratio` to ours, or only the `error` because of which it was not timed.

    `lost`: the peer ended the process, or left the GPU unusable.
    """

    ratio: float
    error: str
    lost: bool


class Row(TypedDict):
    """A case: its fields, times of ours and of the peers, and the roof.

    `failure`: why ours was not timed. `unfinished`: the case was interrupted. `fraction`: the roof's time over ours, of
    the resource named by `bound` ("compute" or "memory"). `memory`: bytes per second measured beside this case.
    """

    name: str
    op: str
    sizes: dict[str, int]
    dtype: str
    backward: bool
    quick: bool
    ours: Times | None
    peers: dict[str, PeerTimes]
    failure: str | None
    unfinished: NotRequired[bool]
    flops: NotRequired[float]
    bytes: NotRequired[float]
    bound: NotRequired[str]
    fraction: NotRequired[float]
    memory: NotRequired[dict[str, float]]


class OpsRecord(TypedDict):
    """ops.json.

    `roofs`: a roofline.Roofs. `checks`: name of a shrunk case -> None, or how it differs from the reference.
    """

    kind: str
    stamp: Stamp
    roofs: dict[str, Any]
    checks: dict[str, str | None]
    rows: list[Row]


class ModelRow(TypedDict):
    """One model at one context length. `prefill_s` is None where no prompt of the length was read."""

    model: str
    dtype: str
    length: int
    prefill_s: float | None
    decode_ms: float
    decode_low_ms: float
    decode_high_ms: float
    cache_bytes: int
    peak_bytes: int | None


class ModelRecord(TypedDict):
    """model.json."""

    kind: str
    stamp: Stamp
    layers: int
    widths: dict[str, int]
    name: str  # the model whose sizes these are
    filled: bool  # whether caches were filled with random numbers for decode, not by reading a prompt
    import_s: NotRequired[dict[str, float]]  # of a new process that imports the model's class, by package
    rows: list[ModelRow]


class FamilyRow(TypedDict):
    """A model of transformers, or a function that it calls, with and without patch_transformers.

    `phase`: "prefill" or "decode". `part`: "model", or the function's name. `failure`: why nothing was timed.
    """

    family: str
    dtype: str
    phase: str
    part: str
    without: NotRequired[Times]
    patched: NotRequired[Times]
    ratio: NotRequired[float]
    failure: NotRequired[str]


class FamiliesRecord(TypedDict):
    """families.json. `sizes`: tokens of the prefill, rows of a decode step, width of the models, and the like."""

    kind: str
    stamp: Stamp
    sizes: dict[str, int]
    rows: list[FamilyRow]


def stamp(device: str | torch.device) -> Stamp:
    """Return device, versions, commit and date of a measurement made now."""
    report = hypenet_kernels.report()
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads() if torch.device(device).type == "cpu" else None,
        "level": report["level"],
        "versions": {"python": platform.python_version()} | _versions(),
        "commit": os.environ.get("COMMIT") or _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def device_name(device: str | torch.device) -> str:
    """Return the model name of the GPU or of the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    name: str = hypenet_kernels.report()["processor"]
    return name


def folder(device: str | torch.device) -> Path:
    """Return bench/results/<device>, letters, digits and dashes; a CPU's with its instruction set and threads."""
    name = device_name(device)
    if torch.device(device).type == "cpu":
        name += f" {hypenet_kernels.report()['level']} {torch.get_num_threads()} threads"
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def save(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as JSON, atomically: if the process dies during the write, the previous record remains."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(path.name + ".new")
    written.write_text(json.dumps(record, indent=1) + "\n")
    written.replace(path)


def save_csv(path: Path, rows: Iterable[Row]) -> None:
    """Write one line per case and implementation."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "implementation", "median_ms", "low_ms", "high_ms", "ratio", "fraction_of_roof"])
        for row in rows:
            if row["ours"] is None:
                continue
            ours = row["ours"]
            writer.writerow([row["name"], "ours", ours["median"], ours["low"], ours["high"], 1, row["fraction"]])
            for name, peer in row["peers"].items():
                if "median" in peer:
                    writer.writerow([row["name"], name, peer["median"], peer["low"], peer["high"], peer["ratio"], ""])


def load(path: str | Path) -> Any:
    """Read a record: an OpsRecord or a ModelRecord, as its "kind" says."""
    return json.loads(Path(path).read_text())


def one_line(error: BaseException) -> str:
    """Return the type and the first line of an error, as records keep it."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def _git(*arguments: str) -> str:
    """Return git's output, or "" without git or outside a repository (there, set COMMIT to name the commit)."""
    try:
        result = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True)
    except OSError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
