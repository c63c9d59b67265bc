"""What the integer and predicate instructions of SASS compute.

COMPUTE: opcode without modifiers -> function(modifiers, *sources) that returns (word or words as one number, values of
the destination predicates). Uniform instructions (UIADD3) are those without the U. Sources are non-negative numbers; a
negated word -x is given as 2^32 - x, which is 2^32 for x = 0, as the carry of a subtraction needs it.

NVIDIA documents names alone (CUDA binary utilities, instruction set reference); the meanings here follow from code that
ptxas generates for known sources.
"""

import math
import operator
import struct
from collections.abc import Callable
from typing import Any

WORD, SIGN = 1 << 32, 1 << 31
Result = tuple[int, tuple[bool, ...]]
_COMPARE = {
    "EQ": operator.eq,
    "NE": operator.ne,
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "NEU": operator.ne,
    "GEU": operator.ge,
}


def signed(x: int) -> int:
    """Return a word as a signed integer."""
    return (x + SIGN) % WORD - SIGN


def to_float(x: int) -> float:
    """Return a word as the float of its bits."""
    value: float = struct.unpack("<f", struct.pack("<I", x % WORD))[0]
    return value


def from_float(x: float) -> int:
    """Return the bits of a float."""
    try:
        bits: int = struct.unpack("<I", struct.pack("<f", x))[0]
    except OverflowError:
        return from_float(math.copysign(math.inf, x))
    return bits


def _sum(total: int) -> Result:
    carries = total // WORD
    return total % WORD, (carries >= 1, carries >= 2)


def _iadd3(op: list[str], a: int, b: int, c: int, *carries: bool) -> Result:
    return _sum(a + b + c + sum(carries))


def _imad(op: list[str], a: int, b: int, c: int, *carries: bool) -> Result:
    wide = "WIDE" in op or "HI" in op
    if wide and "U32" not in op:
        a, b = signed(a), signed(b)
    total = a * b + c + sum(carries)
    if "HI" in op:
        return (total >> 32) % WORD, ()
    return (total % WORD**2, (total >= WORD**2,)) if wide else _sum(a % WORD * (b % WORD) % WORD + c + sum(carries))


def _lea(op: list[str], a: int, b: int, *rest: int) -> Result:
    """LEA: (a << s) + b. LEA.HI: the upper word of a, continued by c or its sign, << s, plus b."""
    if "HI" not in op:
        shift, *carries = rest
        return _sum((a << shift) % WORD + b + sum(carries))
    if "SX32" in op:
        value, shift, *carries = signed(a), *rest
    else:
        upper, shift, *carries = rest
        value = upper * WORD + a % WORD
    return _sum(((value << shift) >> 32) % WORD + b + sum(carries))


def _shf(op: list[str], low: int, shift: int, high: int) -> Result:
    """Shift high:low; .L.U32 and .R of one word by "RZ" in the other place."""
    value = high * WORD + low
    if "S32" in op or "S64" in op:
        value = signed(high) * WORD + low
    if op[1] == "L":
        shifted = (value if "HI" in op else low) << shift
        return (shifted >> 32 if "HI" in op else shifted) % WORD, ()
    return (value >> shift >> (32 if "HI" in op else 0)) % WORD, ()


def _setp(op: list[str], a: float, b: float, first: bool, second: bool | None = None) -> Result:
    """Compare (.EX: upper words, after the lower ones) and combine with a predicate; the contrary likewise."""
    holds = _COMPARE[op[1]](a, b)
    if "EX" in op:
        assert second is not None
        lower = second
        holds = holds and lower if op[1] == "EQ" else holds or lower if op[1] == "NE" else lower if a == b else holds
    both = (holds and first, not holds and first) if "AND" in op else (holds or first, not holds or first)
    return 0, both


def _isetp(op: list[str], a: int, b: int, first: bool, second: bool | None = None) -> Result:
    read = (lambda x: x % WORD) if "U32" in op else signed
    return _setp(op, read(a), read(b), first, second)


def _fsetp(op: list[str], a: float, b: float, first: bool) -> Result:
    x, y = (to_float(v) if isinstance(v, int) else v for v in (a, b))
    return _setp(op, x, y, first)


def _lop3(op: list[str], a: int, b: int, c: int, table: int, *_: bool) -> Result:
    """Bit i of the table is the result for a, b, c = the bits of i."""
    result = 0
    for i in range(8):
        if table >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result % WORD, (result % WORD != 0,)


def _plop3(op: list[str], a: bool, b: bool, c: bool, table: int, other: int) -> Result:
    i = 4 * a + 2 * b + c
    return 0, (bool(table >> i & 1), bool(other >> i & 1))


def _p2r(op: list[str], predicates: list[bool | None], word: int, mask: int) -> Result | None:
    """Put the predicates of the mask in a word; some of the others may be unknown."""
    wanted = {i: p for i, p in enumerate(predicates) if mask >> i & 1}
    if None in wanted.values():
        return None
    return word & ~mask | sum(bool(p) << i for i, p in wanted.items()), ()


def _prmt(op: list[str], a: int, selector: int, b: int) -> Result:
    """Bytes of b:a; selector bit 3 repeats the sign of the byte."""
    source, result = (b % WORD) * WORD + a % WORD, 0
    for i in range(4):
        which = selector >> 4 * i & 15
        byte = source >> 8 * (which & 7) & 255
        result |= (255 * (byte >> 7) if which & 8 else byte) << 8 * i
    return result, ()


def _minmax(op: list[str], a: int, b: int, least: bool) -> Result:
    read = (lambda x: x % WORD) if "U32" in op else signed
    return (min if least else max)(read(a), read(b)) % WORD, ()


def _i2f(op: list[str], a: int) -> Result:
    """Integer to float; .RP rounds up."""
    value = a if "U32" in op else signed(a)
    bits = from_float(float(value))
    if "RP" in op and to_float(bits) < value:
        bits += 1
    return bits, ()


def _f2i(op: list[str], a: int) -> Result:
    return max(0, min(WORD - 1, int(to_float(a)))), ()


def _rcp(op: list[str], a: int) -> Result:
    x = to_float(a)
    return from_float(1 / x if x else math.inf), ()


def _hfma2(op: list[str], a: int, b: int, low: float, high: float) -> Result:
    """0 * 0 + two constants, as ptxas writes constants."""
    (bits,) = struct.unpack("<I", struct.pack("<ee", high, low))
    return bits, ()


def _word(op: list[str], a: int, *_: Any) -> Result:
    return a & 0xFF if "U8" in op else a, ()


COMPUTE: dict[str, Callable[..., Result | None]] = {
    "CS2R": _word,
    "F2I": _f2i,
    "FSETP": _fsetp,
    "HFMA2": _hfma2,
    "I2F": _i2f,
    "I2FP": _i2f,
    "IABS": lambda op, a: (abs(signed(a)), ()),
    "IADD3": _iadd3,
    "IMAD": _imad,
    "IMNMX": _minmax,
    "ISETP": _isetp,
    "LDC": _word,
    "LEA": _lea,
    "LOP3": _lop3,
    "MOV": _word,
    "MUFU": _rcp,
    "P2R": _p2r,
    "PLOP3": _plop3,
    "PRMT": _prmt,
    "R2UR": _word,
    "S2R": _word,
    "S2UR": _word,
    "SEL": lambda op, a, b, first: (a if first else b, ()),
    "SHF": _shf,
    "SHFL": lambda op, a, *_: (a, (True,)),  # every lane has lane 0's
    "VIADD": lambda op, a, b: _sum(a + b),
    "VIADDMNMX": lambda op, a, b, c, least: _minmax(op, a + b, c, least),
    "VIMNMX": _minmax,
    "VOTE": lambda op, *a: (WORD - 1 if a[-1] else 0, (a[-1],)),
}
