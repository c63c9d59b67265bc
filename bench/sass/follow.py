"""The instructions that a warp issues: its integers and predicates are computed, and its branches followed.

Control flow of these kernels depends on the params, on block and thread index, and on integers in device memory that
the caller names. It is computed for lane 0 of a warp. Tensors count as zero, results of floating-point arithmetic as
unknown; a branch on an unknown value is an error.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.sass.arithmetic import COMPUTE, WORD
from bench.sass.listing import Instruction

PARAMS = 0x210  # where the params begin in constant bank 0 (sm_90)
BLOCK_DIM = 0x0  # of the block and then of the grid, three words each
MOST_INSTRUCTIONS = 1_000_000

Registers = list[Any]  # R0 to R254, RZ, UR0 to UR62, URZ, P0 to P6, PT, UP0 to UP6, UPT; None: unknown
Read = Callable[[Registers], Any]
_RZ, _UR, _URZ, _P, _PT, _UP, _UPT, _COUNT = 255, 256, 319, 320, 327, 328, 335, 336
_CONSTANTS = {"RZ": _RZ, "URZ": _URZ, "PT": _PT, "UPT": _UPT}
_LOADS = ("LDG", "LDS", "LDSM")
_NO_RESULT = ("BAR", "BRA", "BREAK", "BSSY", "BSYNC", "CALL", "DEPBAR", "EXIT", "NANOSLEEP", "NOP", "RET", "WARPSYNC")


@dataclass(frozen=True)
class Launch:
    """Grid and params of a kernel, and the words of device memory on which its control flow depends, by address."""

    num_blocks: int
    num_threads: int
    params: bytes
    memory: Mapping[int, int] = field(default_factory=dict)


class CannotFollow(RuntimeError):
    """A branch on an unknown value, or an instruction that is not understood."""


class Follower:
    """A kernel and a launch of it: every instruction becomes a function of the registers."""

    def __init__(self, program: Sequence[Instruction], launch: Launch) -> None:
        bank = bytearray(PARAMS) + launch.params + bytes(8)
        struct.pack_into("<6I", bank, BLOCK_DIM, launch.num_threads, 1, 1, launch.num_blocks, 1, 1)
        self._bank, self._memory, self._num_warps = bytes(bank), launch.memory, launch.num_threads // 32
        self._special: dict[str, int] = {}
        self._shared: dict[int, Any] = {}
        self._index = {instruction.address: i for i, instruction in enumerate(program)}
        self._steps = [self._compile(instruction) for instruction in program]

    def traces(self, block: int) -> list[list[int]]:
        """Return for every warp of a block the indices of the instructions that it issues, up to its exit.

        Warps run one after another, so that what one leaves in shared memory is there for those of a larger index.

        Raises:
            CannotFollow: if a branch depends on an unknown value, or a warp does not end.
        """
        self._shared.clear()
        return [self._trace(block, warp) for warp in range(self._num_warps)]

    def _trace(self, block: int, warp: int) -> list[int]:
        self._special |= {"SR_CTAID.X": block, "SR_TID.X": 32 * warp}
        # ptxas collects flags in a register that it never clears as a whole: any initial value will do.
        r: Registers = [0] * _P + [False] * (_COUNT - _P)
        r[_PT] = r[_UPT] = True
        issued, i = list[int](), 0
        while i >= 0:
            issued.append(i)
            target = self._steps[i](r)
            i = i + 1 if target is None else target
            if len(issued) == MOST_INSTRUCTIONS:
                raise CannotFollow(f"a warp issues more than {MOST_INSTRUCTIONS:,} instructions")
        return issued

    def _compile(self, x: Instruction) -> Callable[[Registers], int | None]:
        """Return a function that executes an instruction; it returns the next one's index, None for the one behind."""
        if x.base in ("BRA", "EXIT") and x.opcode != "BRA.DIV":  # which only warps take that have diverged
            return self._jump(x)
        guard = self._source(x.guard or "PT")
        predicates, register, sources = _split(x)
        predicates = [p for p in predicates if p not in (_PT, _UPT)]
        registers = [] if register in (None, _RZ, _URZ) else list(range(register, register + _num_words(x)))
        kind = _kind(x)
        if kind == "IMAD" and ("WIDE" in x.opcode or "HI" in x.opcode):
            reads = [self._source(name, wide=i == 2) for i, name in enumerate(sources)]
        else:
            reads = [self._source(name, wide=kind == "LDC" and ".64" in x.opcode) for name in sources]
        if kind in _LOADS:
            evaluate = self._load(x, len(registers))
        elif x.base == "STS":
            evaluate = self._store(x)
        elif kind in COMPUTE and _is_understood(x):
            evaluate = _computation(x, COMPUTE[kind], reads)
        elif x.base in ("CALL", "RET", "BRX", "JMP"):
            evaluate = _refusal(x)
        else:
            evaluate = lambda r: None  # noqa: E731

        def step(r: Registers) -> None:
            active = guard(r)
            if active is False:
                return
            found = evaluate(r) if active else None
            if found is None:
                for i in (*registers, *predicates):
                    r[i] = None
                return
            value, flags = found
            for i in registers:
                r[i] = value % WORD
                value >>= 32
            for i, flag in zip(predicates, flags, strict=False):
                r[i] = flag

        return step

    def _jump(self, x: Instruction) -> Callable[[Registers], int | None]:
        target = -1 if x.base == "EXIT" else self._index[int(x.operands[-1], 16)]
        names = [x.guard or "PT", *(x.operands[:-1] if x.base == "BRA" else ())]
        conditions = [self._source(name) for name in names]

        def step(r: Registers) -> int | None:
            values = [condition(r) for condition in conditions]
            if False in values:
                return None
            if None in values:
                raise CannotFollow(f"{x.opcode} at {x.address:#x} depends on a value that is not known")
            return target

        return step

    def _load(self, x: Instruction, count: int) -> Read:
        """Words that were stored in shared memory or are given by `launch.memory`, zero elsewhere."""
        address = self._sum(x.operands[-1].rpartition("[")[2].rstrip("]"))
        words: Mapping[int, Any] = self._memory if x.base == "LDG" else self._shared

        def evaluate(r: Registers) -> tuple[int, tuple[()]] | None:
            if (first := address(r)) is None:
                return None
            values = [words.get(first % WORD**2 + 4 * i, 0) for i in range(count)]
            return None if None in values else (sum(value << 32 * i for i, value in enumerate(values)), ())

        return evaluate

    def _store(self, x: Instruction) -> Read:
        address = self._sum(x.operands[0].strip("[]"))
        register, count = _register(x.operands[1]), _num_words(x)
        assert register is not None

        def evaluate(r: Registers) -> None:
            if (first := address(r)) is not None:
                for i in range(count):
                    self._shared[first + 4 * i] = 0 if register == _RZ else r[register + i]

        return evaluate

    def _source(self, name: str, wide: bool = False) -> Read:
        """Return a function that reads an operand; `wide`: 64 bits, from two registers."""
        if name[0] == "!":
            read = self._source(name[1:])
            return lambda r: None if (x := read(r)) is None else not x
        if name[0] == "|":
            read = self._source(name[1:-1])
            return lambda r: None if (x := read(r)) is None else min(x, WORD - x)
        if name[0] in "-~" and not name[1].isdigit() and name[1:] != "INF":
            read, least = self._source(name[1:], wide), (WORD**2 if wide else WORD) - (name[0] == "~")
            return lambda r: None if (x := read(r)) is None else least - x
        if (register := _register(name)) is not None:
            if wide and register not in (_RZ, _URZ):
                return lambda r: None if None in (pair := r[register : register + 2]) else pair[1] * WORD + pair[0]
            return lambda r: r[register]
        if name == "PR":
            return lambda r: r[_P:_PT]
        if name.startswith("SR"):
            return lambda r: self._special.get(name, 0)
        if name.startswith("c[0x0]["):
            offset, num_bytes = self._sum(name[7:-1]), 8 if wide else 4
            return lambda r: (
                None if (at := offset(r)) is None else int.from_bytes(self._bank[at:][:num_bytes], "little")
            )
        value = _literal(name)
        return lambda r: value

    def _sum(self, address: str) -> Read:
        """Return a function that computes "R2.64+UR6+0x8"."""
        parts = address.split("+")
        reads = [self._source(part.removesuffix(".64"), wide=part.endswith(".64")) for part in parts]
        return lambda r: None if None in (values := [read(r) for read in reads]) else sum(values)


def _literal(name: str) -> int | float | None:
    try:
        return int(name, 16) % WORD if "0x" in name else float(name)
    except ValueError:
        return None


def _computation(x: Instruction, compute: Callable[..., Any], reads: Sequence[Read]) -> Read:
    modifiers = x.opcode.split(".")

    def evaluate(r: Registers) -> Any:
        values = [read(r) for read in reads]
        return None if None in values else compute(modifiers, *values)

    return evaluate


def _is_understood(x: Instruction) -> bool:
    """Whether COMPUTE is right for every form of an instruction."""
    forms = {"MUFU": x.opcode == "MUFU.RCP", "HFMA2": len(x.operands) == 5, "F2I": "U64" not in x.opcode}
    return forms.get(x.base, True)


def _refusal(x: Instruction) -> Read:
    def evaluate(r: Registers) -> None:
        raise CannotFollow(f"{x.opcode} at {x.address:#x} cannot be followed")

    return evaluate


def _kind(x: Instruction) -> str:
    """Return the opcode without modifiers, of uniform instructions that of the others."""
    plain = x.base[1:] if x.base.startswith("U") else x.base
    return plain if plain in COMPUTE else x.base


def _register(name: str) -> int | None:
    """Return the index of a register or predicate, None for other operands."""
    if name in _CONSTANTS:
        return _CONSTANTS[name]
    for prefix, first in (("UR", _UR), ("UP", _UP), ("R", 0), ("P", _P)):
        if name.startswith(prefix) and name[len(prefix) :].isdigit():
            return first + int(name[len(prefix) :])
    return None


def _split(x: Instruction) -> tuple[list[int], int | None, tuple[str, ...]]:
    """Return destination predicates, destination register and sources."""
    if x.base in _NO_RESULT:
        return [], None, x.operands
    indices = [_register(name) for name in x.operands]
    kind = _kind(x)
    predicates, count = list[int](), 0
    register = None

    def is_predicate(i: int) -> bool:
        return i < len(indices) and (index := indices[i]) is not None and index >= _P

    if kind in ("ISETP", "FSETP", "PLOP3"):
        return [index for index in indices[:2] if index is not None], None, x.operands[2:]
    if is_predicate(0):
        predicates.append(indices[0])  # type: ignore[arg-type]
        count = 1
    if count < len(indices) and indices[count] is not None and not is_predicate(count):
        register = indices[count]
        count += 1
        while kind in ("IADD3", "IMAD", "LEA", "VIADD") and is_predicate(count):
            predicates.append(indices[count])  # type: ignore[arg-type]
            count += 1
    return predicates, register, x.operands[count:]


def _num_words(x: Instruction) -> int:
    """Return the number of registers that an instruction writes."""
    modifiers = x.opcode.split(".")
    if x.base == "HMMA":
        return 4
    if x.base == "LDSM":
        return int(modifiers[-1]) if modifiers[-1] in ("2", "4") else 1
    if x.base == "CS2R":
        return 1 if "32" in modifiers else 2
    if (
        "WIDE" in modifiers
        or (x.base in ("LDC", "ULDC", "STS", *_LOADS) and "64" in modifiers)
        or modifiers[1:2] == ["F64"]
    ):
        return 2
    return 4 if "128" in modifiers else 1
