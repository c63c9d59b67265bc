"""Writes this installation as a repository for the Hugging Face hub, as the library `kernels` loads them.

A repository has one folder a build variant, build/<variant>: the package itself, which `kernels` imports under a name
of its own (so that several versions can be loaded in one process), and metadata.json. The native modules are linked
with no torch, so that the variants of all torch versions hold the same files; they are made for one Python version
each, and running this again with another Python adds its modules.
"""

import hashlib
import importlib.machinery
import json
import platform
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from hypenet_kernels._installation import __version__
from hypenet_kernels._native import build_info

PACKAGE = Path(__file__).parent
LEFT_OUT = ("__main__.py", "_hub.py", "_selftest.py", "_warmup.py")  # of the command line
VARIANT = re.compile(r"torch\d{2,}(-cxx11)?-(cpu|cu\d{3})-(x86_64|aarch64)-linux")


def this_variant() -> str:
    """Return the build variant of this machine and this torch, like "torch213-cxx11-cu130-x86_64-linux"."""
    major, minor = torch.__version__.split(".")[:2]
    backend = "cpu" if torch.version.cuda is None else f"cu{torch.version.cuda.replace('.', '')}"
    return f"torch{major}{minor}-cxx11-{backend}-{platform.machine()}-linux"


def write(folder: Path, variants: Sequence[str] = (), version: int = 1) -> list[Path]:
    """Write the package as a kernel repository, or add this Python's native modules to one.

    Args:
        folder: The repository.
        variants: Build variants as the hub names them; default: the one of this machine and this torch.
        version: The repository's version, which users name in `get_kernel(..., version=1)`.

    Returns:
        The folders of the variants.

    Raises:
        FileNotFoundError: If the native modules are not built.
        ValueError: If a variant is not of Linux with CPU or CUDA and this machine's processor.
    """
    modules = _modules("_cpu_")
    if not modules:
        raise FileNotFoundError(f"hub: the native modules must be built, got none in {PACKAGE}")
    written = []
    for variant in variants or [this_variant()]:
        match = VARIANT.fullmatch(variant)
        if match is None or match[3] != platform.machine():
            rule = f"torch<version>-cxx11-<cpu or cu<version>>-{platform.machine()}-linux"
            raise ValueError(f"hub: variant must be {rule}, got {variant}")
        target = folder / "build" / variant
        target.mkdir(parents=True, exist_ok=True)
        on_cuda = match[2] != "cpu"
        digest = _write_sources(target)
        for module in modules + (_modules("_cuda") if on_cuda else []):
            shutil.copy2(module, target)
        if on_cuda:  # what NVRTC compiles
            shutil.copytree(PACKAGE / "csrc", target / "csrc", dirs_exist_ok=True)
        backend = {"type": "cuda", "archs": ["8.0+PTX"]} if on_cuda else {"type": "cpu"}
        facts = {
            "name": "hypenet-kernels",
            "id": f"hypenet_kernels_{match[2]}_{digest}",
            "version": version,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": backend,
        }
        (target / "metadata.json").write_text(json.dumps(facts, indent=2) + "\n")
        written.append(target)
    (folder / "README.md").write_text(CARD.format(version=version, release=__version__))
    return written


def _modules(prefix: str) -> list[Path]:
    """Return this Python's native modules whose names begin so."""
    suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    return sorted(path for path in PACKAGE.glob(f"{prefix}*") if path.name.endswith(suffixes))


def _write_sources(target: Path) -> str:
    """Copy the Python files, which import each other relatively there; return a digest of them."""
    hashed = hashlib.sha256()
    for path in sorted(PACKAGE.glob("*.py")):
        if path.name in LEFT_OUT:
            continue
        text = re.sub(r"^(\s*)from hypenet_kernels import", r"\1from . import", path.read_text(), flags=re.M)
        text = re.sub(r"^(\s*)from hypenet_kernels\.", r"\1from .", text, flags=re.M)
        (target / path.name).write_text(text)
        hashed.update(text.encode())
    (target / "_build.json").write_text(json.dumps(build_info() | {"version": __version__}) + "\n")
    (target / "py.typed").touch()
    return hashed.hexdigest()[:12]


CARD = """---
license: apache-2.0
tags:
- kernels
---

# hypenet-kernels

Kernels for hybrid linear-attention language models: chunked gated delta rule and simple GLA, HyPE attention, recurrent
decode and causal convolution, on CPU and CUDA. Written by hypenet {release}.

```python
from kernels import get_kernel

hypenet_kernels = get_kernel("<this repository>", version={version})
o, final_state = hypenet_kernels.chunk_gated_delta_rule(q, k, v, g, beta, output_final_state=True)
```
"""
