"""Machine code as instructions: nvdisasm's listing of a cubin, with ptxas's control codes."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

NO_BARRIER = 7
_CODE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x([0-9a-f]{16}) \*/")
_UPPER_HALF = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
_LABEL = re.compile(r"^\s*(\.L_\w+):")


@dataclass(frozen=True)
class Instruction:
    """One instruction of SASS and its control code.

    Attributes:
        address: in bytes from the kernel's start.
        guard: the predicate without "@", "!P0"; "" if there is none.
        opcode: with modifiers, "IMAD.WIDE.U32".
        operands: destinations first; the target of a branch is a hexadecimal address.
        stall: cycles until the warp's next instruction may issue.
        write_barrier: scoreboard that is released when the result is there; 7 for none.
        read_barrier: scoreboard that is released when the operands are read; 7 for none.
        waits: bit i: issue only after scoreboard i is released.
    """

    address: int
    guard: str
    opcode: str
    operands: tuple[str, ...]
    stall: int
    write_barrier: int = NO_BARRIER
    read_barrier: int = NO_BARRIER
    waits: int = 0

    @property
    def base(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]


def parse(listing: str) -> list[Instruction]:
    """Return the instructions of a listing of one kernel by `nvdisasm -hex`.

    The control code is in bits 41 to 57 of the upper half of an instruction's 128 bits: stall (4 bits), yield (1),
    write barrier (3), read barrier (3), wait mask (6). Source: Jia et al., "Dissecting the NVIDIA Volta GPU
    architecture via microbenchmarking", arXiv 1804.06826, 2.1; unchanged up to sm_90.
    """
    labels: dict[str, int] = {}
    found: list[tuple[int, str, int]] = []
    pending: tuple[int, str] | None = None
    unplaced: list[str] = []
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            unplaced.append(label[1])
        elif code := _CODE.search(line):
            pending = int(code[1], 16), code[2]
            labels |= dict.fromkeys(unplaced, pending[0])
            unplaced = []
        elif pending and (upper := _UPPER_HALF.match(line)):
            found.append((*pending, int(upper[1], 16) >> 41))
            pending = None
    return [_instruction(address, text, control, labels) for address, text, control in found]


def _instruction(address: int, text: str, control: int, labels: dict[str, int]) -> Instruction:
    guard = ""
    if text.startswith("@"):
        guard, text = text[1:].split(None, 1)
    opcode, _, rest = text.partition(" ")
    rest = re.sub(r"`\((\.L_\w+)\)", lambda match: hex(labels[match[1]]), rest.replace(".reuse", ""))
    operands = tuple(operand.strip() for operand in rest.split(",")) if rest.strip() else ()
    stall, write, read, waits = control & 15, control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
    return Instruction(address, guard, opcode, operands, stall, write, read, waits)


def disassembler() -> str | None:
    """Return the path of nvdisasm, from PATH, a CUDA toolkit or NVIDIA's packages on PyPI; None if there is none."""
    folders = [*os.environ.get("PATH", "").split(os.pathsep), "/usr/local/cuda/bin"]
    for root in map(Path, sys.path):
        folders += [str(path) for path in root.glob("nvidia/*/bin")]
    return shutil.which("nvdisasm", path=os.pathsep.join(folders))


def disassemble(cubin: bytes, symbol: str) -> list[Instruction]:
    """Return the instructions of a kernel in a cubin.

    Raises:
        RuntimeError: if there is no nvdisasm, if it does not know the cubin, or if the kernel is not there.
    """
    tool = disassembler()
    if tool is None:
        raise RuntimeError("bench sass: needs nvdisasm; install with: pip install nvidia-cuda-nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        ran = subprocess.run([tool, "-c", "-hex", file.name], capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"bench sass: nvdisasm: {ran.stderr.strip()}")
    _, found, listing = ran.stdout.partition(f"\n.text.{symbol}:\n")
    if not found:
        raise RuntimeError(f"bench sass: no {symbol} in the cubin")
    return parse(listing.partition("\n\t.section")[0])
