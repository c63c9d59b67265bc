"""Measure the resources of every CUDA kernel, and write the table that tests/test_cuda_build.py compares with.

    python tests/cuda_resources.py        # compiles what changed and writes tests/cuda_resources.json

For every instantiation and target: registers, static shared memory, stack and spills are from ptxas; threads and
dynamic shared memory from launches of every op on the emulator; blocks per SM are computed from these; the use of
tensor cores is from the disassembly.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import emulation
import every_op
from test_install import only_builder, setup

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # for bench, where this file is run as a script
from bench.sass.occupancy import blocks_per_sm  # noqa: E402

SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
BUILD = ROOT / "build" / sys.implementation.cache_tag
TABLE = Path(__file__).with_suffix(".json")
REWRITE = f"python {Path(__file__).relative_to(ROOT)}"
COMMITTED = ("registers", "shared", "threads", "blocks", "tensor_cores")
TENSOR_CORES, LOCAL_MEMORY = re.compile(r"(?<![\w.])[HGI]+MMA\b"), re.compile(r"\b(?:LDL|STL)\b")
# Some launchers choose a kernel by the number of SMs, or by the bytes of shared memory that a block can have.
EMULATED_DEVICES = (*((sms, 227 * 1024) for sms in (1, 3, 6, 132)), (3, 99 * 1024), (132, 99 * 1024))


def compile_all():
    """Compile changed sources as setup.py does, into the same folder; return source stem -> compiler log."""
    import ninja

    cxx = setup.find_compiler(os.environ)
    rules = setup.commands(os.environ, cxx, setup.find_nvcc(os.environ), setup.CUDA_TARGETS)
    folder = BUILD if os.environ.get("TORCH_CUDA_ARCH_LIST") in (None, "", setup.CUDA_TARGETS) else BUILD / "default"
    folder.mkdir(parents=True, exist_ok=True)
    with only_builder():
        with open(folder / "resources.ninja", "w") as file:
            writer = ninja.ninja_syntax.Writer(file, width=10**6)
            writer.rule("nvcc", rules["nvcc"], depfile="$out.d", deps="gcc")
            for source in SOURCES:
                writer.build(f"_cuda/{source.stem}.o", "nvcc", str(source), variables={"flags": ""})
        command = [Path(ninja.BIN_DIR, "ninja"), "-C", folder, "-f", "resources.ninja", "-j2", "--quiet"]
        ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"the CUDA sources do not compile:\n{ran.stdout[-8000:]}{ran.stderr[-2000:]}")
    return {source.stem: (folder / f"_cuda/{source.stem}.o.log").read_text() for source in SOURCES}


def objects():
    folder = BUILD if (BUILD / "resources.ninja").is_file() else BUILD / "default"
    return [folder / f"_cuda/{source.stem}.o" for source in SOURCES]


def seconds(log):
    """Return the CPU time of a compilation, from the last line of the shell's `times` (its child processes)."""
    minutes = re.findall(r"(\d+)m([\d.]+)s", log.splitlines()[-1])
    return sum(60 * int(m) + float(s) for m, s in minutes)


def demangled(names):
    """Return kernel names as in the source, without namespaces and parameters."""
    ran = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [_short(name) for name in ran.stdout.splitlines()]


def _short(name):
    name, template, _ = name.removeprefix("void ").partition(">(")  # of a template; else "(" begins the parameters
    return re.sub(r"\w+::", "", f"{name}>" if template else name.partition("(")[0])


def from_ptxas(log):
    """Return (target, kernel) -> registers, static_shared, stack and spills, from the output of `ptxas -v`."""
    found = {}
    blocks = re.split(r"Compiling entry function '(\S+)' for '(\w+)'", log)[1:]
    names = demangled(blocks[0::3])
    for name, target, text in zip(names, blocks[1::3], blocks[2::3], strict=True):
        spills = [int(number) for number in re.findall(r"(\d+) bytes spill", text)]
        row = {"registers": _number(r"Used (\d+) registers", text), "static_shared": _number(r"(\d+) bytes smem", text)}
        found[target, name] = row | {"stack": _number(r"(\d+) bytes stack frame", text), "spills": sum(spills)}
    return found


def _number(pattern, text):
    match = re.search(pattern, text)
    return int(match[1]) if match else 0


def disassembler():
    """Return the path of a cuobjdump with nvdisasm in the same folder, from PATH, nvcc or pip packages, or None."""
    folders = [*os.environ.get("PATH", "").split(os.pathsep), Path(setup.find_nvcc(os.environ) or "").parent]
    for root in map(Path, sys.path):
        folders += [*root.glob("nvidia/*/bin"), *root.glob("triton/backends/nvidia/bin")]
    path = os.pathsep.join(map(str, folders))
    found = shutil.which("cuobjdump", path=path), shutil.which("nvdisasm", path=path)
    return found[0] if all(found) and Path(found[0]).parent == Path(found[1]).parent else None


@functools.cache
def disassembled():
    """Return (target, kernel) -> (tensor_cores, local_memory): whether it uses them; empty without a disassembler."""
    if disassembler() is None:
        return {}
    environment = os.environ | {"PATH": f"{Path(disassembler()).parent}{os.pathsep}{os.environ['PATH']}"}
    compile_all()
    found = {}
    for path in objects():
        command = [disassembler(), "-sass", str(path)]
        listing = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        blocks = re.split(r"code for (\w+)|Function : (\S+)", listing)[1:]
        target, bodies = None, {}
        for where, symbol, body in zip(blocks[0::3], blocks[1::3], blocks[2::3], strict=True):
            target = where or target
            if symbol:
                bodies[target, symbol] = body
        names = demangled([symbol for _, symbol in bodies])
        for (target, _), name, body in zip(bodies, names, bodies.values(), strict=True):
            found[target, name] = tuple(bool(pattern.search(body)) for pattern in (TENSOR_CORES, LOCAL_MEMORY))
    return found


def launches():
    """Return kernel -> (threads, dynamic shared memory), the largest of all launches of every op; nothing runs."""
    emulated = emulation.module()
    lines = subprocess.run(["nm", emulated.__file__], capture_output=True, text=True, check=True).stdout.splitlines()
    symbols = {int(words[0], 16): words[-1] for words in map(str.split, lines) if len(words) == 3}
    emulated.forget_launches()
    emulated.set_only_records(True)
    for sms, shared_bytes in EMULATED_DEVICES:
        emulated.set_num_processors(sms)
        emulated.set_max_shared_bytes(shared_bytes)
        with emulation.emulated():
            every_op.run("cpu", small=shared_bytes < every_op.LARGE)
    emulated.set_only_records(False)
    emulated.set_num_processors(4)
    emulated.set_max_shared_bytes(227 * 1024)
    records = emulated.launches()
    names = demangled([symbols[record["kernel"]] for record in records])
    found = defaultdict(lambda: (0, 0))
    for name, record in zip(names, records, strict=True):
        found[name] = max(found[name], (record["num_threads"], record["shared_bytes"]))
    return dict(found)


@functools.cache
def measure():
    """Return (target, kernel) -> resources from ptxas, threads, shared, blocks, tensor_cores; None if unknown."""
    launched, rows = launches(), {}
    for log in compile_all().values():
        for (target, name), row in from_ptxas(log).items():
            threads, shared, blocks = None, None, None
            if name in launched:
                threads, dynamic = launched[name]
                shared = row["static_shared"] + dynamic
                blocks = blocks_per_sm(target, row["registers"], threads, shared)
            tensor_cores = disassembled().get((target, name), (None,))[0]
            rows[target, name] = row | {
                "threads": threads,
                "shared": shared,
                "blocks": blocks,
                "tensor_cores": tensor_cores,
            }
    return rows


def read_table():
    """Return (target, kernel) -> the columns COMMITTED of the committed table."""
    rows = json.loads(TABLE.read_text()) if TABLE.is_file() else {}
    return {(target, name): row for target, named in rows.items() for name, row in named.items()}


def write_table(rows):
    """Write the table, one line per kernel and target."""
    targets = []
    for target in sorted({target for target, _ in rows}):
        kept = {name: row for (where, name), row in sorted(rows.items()) if where == target}
        lines = ",\n".join(
            f'    "{name}": {json.dumps({column: row[column] for column in COMMITTED})}' for name, row in kept.items()
        )
        targets.append(f'  "{target}": {{\n{lines}\n  }}')
    TABLE.write_text("{\n" + ",\n".join(targets) + "\n}\n")


if __name__ == "__main__":
    if disassembler() is None:
        sys.exit("needs cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    write_table(measure())
    print(f"{TABLE.relative_to(ROOT)}: {len(measure())} rows")
