"""Results on disk: JSON, stamped with device, versions, commit and date, in bench/results/<device>/."""

import csv
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import hypenet_kernels

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("torch", "transformers", "triton", "flash-linear-attention", "flashinfer-python", "flash-attn", "flash-qla")


def stamp(device):
    """What a number needs beside it."""
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


def device_name(device):
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return hypenet_kernels.report()["processor"]


def folder(device):
    """bench/results/<device>, in letters, digits and dashes."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    if torch.device(device).type == "cpu":
        name += f"-{torch.get_num_threads()}-threads"
    return RESULTS / name


def save(path, record):
    """In one piece: what ends the process while it writes leaves the record before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(path.name + ".new")
    written.write_text(json.dumps(record, indent=1) + "\n")
    written.replace(path)


def save_csv(path, rows):
    """One line per case and implementation."""
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


def load(path):
    return json.loads(Path(path).read_text())


def _versions():
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def _git(*arguments):
    """What git says; "" without git, or outside a repository (then the variable COMMIT can say which commit it is)."""
    try:
        result = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True)
    except OSError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
