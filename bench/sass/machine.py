"""A model of one SM of an H100 that replays ptxas's control codes: in-order issue, pipes, scoreboards, barriers.

Every cycle each of four partitions issues one instruction of one of its warps: the first, from the one that issued last
on, whose stall count has passed, whose scoreboards are released, and whose pipe is free. Warps of a block are spread
over the partitions, which share the pipe to shared memory. Not modelled: caches, DRAM, bank conflicts, fetching.
"""

import math
from collections import Counter
from collections.abc import Sequence

from bench.sass.listing import NO_BARRIER, Instruction

PARTITIONS = 4
# HMMA.16816 every 6.4 cycles of a partition: 62.9 % of the rate of wgmma, 4.0, as measured (arXiv 2402.13499, mma.sync
# on H800); ptxas puts them 6 apart.
TENSOR_CYCLES = 6.4
# 16 lanes a cycle: integer and conversion instructions, and separately IMAD. MUFU has 4 lanes (CUDA programming guide,
# arithmetic throughput: 64 and 16 results per cycle and SM).
HALF_RATE_CYCLES = 2
MUFU_CYCLES = 8
MUFU_QUEUE = 16  # cycles of work that the queues in front of the pipes take
SHARED_QUEUE = 64
# Latencies in cycles, from issue or from the end of the transfer (arXiv 1804.06826 and arXiv 2402.13499: 29 to 33 for
# shared memory, 22 for MUFU); LDG's and COPY_LATENCY are those of a loaded DRAM.
ALU_LATENCY = 4
LATENCY = {"LDSM": 33, "LDS": 29, "MUFU": 22, "MOVM": 33, "SHFL": 25, "LDG": 600, "STG": 20, "VOTE": 12}
SHARED_LATENCY = 30  # other instructions of the shared-memory pipe
COPY_LATENCY = 900  # LDGSTS, until its group is complete
READ_LATENCY = 10  # until operands are read
BARRIER_LATENCY = 20  # from the last warp's arrival
BLOCK_START = 200  # until a block replaces one that ends
_TENSOR, _SHARED, _MUFU, _FP32, _IMAD, _ALU, _NONE = range(7)
_PIPES = {"HMMA": _TENSOR, "MUFU": _MUFU, "FADD": _FP32, "FMUL": _FP32, "FFMA": _FP32, "IMAD": _IMAD}
_PIPES |= dict.fromkeys(("LDSM", "LDS", "STS", "LDG", "STG", "LDGSTS", "SHFL", "MOVM", "LDGDEPBAR", "ATOMS"), _SHARED)
_PIPES |= dict.fromkeys(("BRA", "BAR", "NOP", "BSSY", "BSYNC", "WARPSYNC", "DEPBAR", "EXIT", "VOTE"), _NONE)
_PIPES |= dict.fromkeys(("UMOV", "ULDC", "UIADD3", "ULEA", "R2UR", "S2UR"), _NONE)


def shared_cycles(x: Instruction) -> int:
    """Return the cycles of the SM's shared-memory pipe, 128 bytes each, that a warp's instruction takes."""
    modifiers = x.opcode.split(".")
    if x.base == "LDSM":
        return int(modifiers[-1]) if modifiers[-1] in ("2", "4") else 1
    if x.base in ("SHFL", "MOVM"):
        return 2
    if "128" in modifiers:
        return 4
    return 2 if x.base == "LDG" or ("64" in modifiers and x.base in ("LDS", "STS", "STG")) else 1


class _Cost:
    """An instruction as the model sees it."""

    __slots__ = ("base", "cycles", "latency", "pending", "pipe", "read", "scoreboards", "stall", "write")

    def __init__(self, x: Instruction) -> None:
        self.base, self.stall = x.base, max(1, x.stall)
        self.pipe = _PIPES.get(x.base, _ALU)
        self.cycles = shared_cycles(x) if self.pipe == _SHARED else 0
        self.latency = LATENCY.get(x.base, SHARED_LATENCY if self.pipe == _SHARED else ALU_LATENCY)
        self.write = x.write_barrier if x.write_barrier != NO_BARRIER else None
        self.read = x.read_barrier if x.read_barrier != NO_BARRIER else None
        self.scoreboards = [i for i in range(6) if x.waits >> i & 1]
        self.pending = int(x.operands[1], 16) if x.base == "DEPBAR" else None  # groups of copies that may be in flight


def work(program: Sequence[Instruction], counts: Counter[int]) -> dict[str, float]:
    """Return the cycles that each resource of an SM needs; `counts`: how often an instruction, by index, is issued."""
    issued: Counter[int] = Counter()
    shared = 0
    for i, count in counts.items():
        pipe = _PIPES.get(program[i].base, _ALU)
        issued[pipe] += count
        shared += count * shared_cycles(program[i]) if pipe == _SHARED else 0
    return {
        "issue": counts.total() / PARTITIONS,
        "tensor cores": issued[_TENSOR] * TENSOR_CYCLES / PARTITIONS,
        "shared memory": shared,
        "MUFU": issued[_MUFU] * MUFU_CYCLES / PARTITIONS,
        "ALU": issued[_ALU] * HALF_RATE_CYCLES / PARTITIONS,
        "IMAD": issued[_IMAD] * HALF_RATE_CYCLES / PARTITIONS,
    }


class _Warp:
    __slots__ = ("block", "copies", "done", "groups", "next", "ready", "scoreboards", "trace", "waiting")

    def __init__(self, block: int, trace: Sequence[int], start: float) -> None:
        self.block, self.trace, self.next, self.ready = block, trace, 0, start
        self.scoreboards, self.groups, self.copies = [0.0] * 6, list[float](), 0.0
        self.waiting = self.done = False


def simulate(
    program: Sequence[Instruction], traces: Sequence[Sequence[int]], resident: int, blocks: int | None = None
) -> list[int]:
    """Return the cycles at which the blocks of an SM end, in this order.

    Args:
        program: the kernel.
        traces: of the warps of a block, as indices in `program`.
        resident: blocks on the SM at a time, all alike.
        blocks: in all: one that ends is replaced until so many have started; default: `resident`.

    Raises:
        RuntimeError: if warps wait for a barrier at which others do not arrive.
    """
    costs = [_Cost(x) for x in program]
    blocks, size = blocks or resident, len(traces)
    warps = [_Warp(block, trace, 0.0) for block in range(resident) for trace in traces]
    partitions = [[w for i, w in enumerate(warps) if i % PARTITIONS == p] for p in range(PARTITIONS)]
    last = [0] * PARTITIONS
    free = [[0.0] * 7 for _ in range(PARTITIONS)]  # cycle from which a pipe takes an instruction
    shared_free = 0.0
    arrived, running, started, ends = [0] * resident, [size] * resident, resident, list[int]()
    cycle = 0

    def release(block: int) -> None:
        if arrived[block] and arrived[block] >= running[block]:
            arrived[block] = 0
            for w in warps[block * size : (block + 1) * size]:
                if w.waiting:
                    w.waiting, w.ready = False, max(w.ready, cycle + BARRIER_LATENCY)

    while len(ends) < blocks:
        issued, soonest = False, math.inf
        for p, mine in enumerate(partitions):
            pipes, count = free[p], len(mine)
            for k in range(count):
                place = (last[p] + k) % count
                w = mine[place]
                if w.waiting or w.done:
                    continue
                c = costs[w.trace[w.next]]
                when = max(w.ready, shared_free - SHARED_QUEUE if c.pipe == _SHARED else pipes[c.pipe])
                if when > cycle:
                    soonest = min(soonest, when)
                    continue
                break
            else:
                continue
            issued, last[p] = True, place
            end: float = cycle + c.latency
            read = end
            if c.pipe == _SHARED:
                shared_free = read = max(shared_free, cycle) + c.cycles
                end = shared_free + c.latency - c.cycles
            elif c.pipe == _TENSOR:
                busy = pipes[_TENSOR] > cycle - 1  # up to within this cycle
                pipes[_TENSOR] = (pipes[_TENSOR] if busy else cycle) + TENSOR_CYCLES
            elif c.pipe in (_ALU, _IMAD):
                pipes[c.pipe] = cycle + HALF_RATE_CYCLES
            elif c.pipe == _MUFU:
                begin = max(pipes[_MUFU] + MUFU_QUEUE, cycle)
                pipes[_MUFU] = begin + MUFU_CYCLES - MUFU_QUEUE
                end = read = begin + c.latency
            if c.base == "LDGSTS":
                w.copies = cycle + COPY_LATENCY
            elif c.base == "LDGDEPBAR":
                w.groups.append(w.copies)
            if c.write is not None:
                w.scoreboards[c.write] = max(w.scoreboards[c.write], end)
            if c.read is not None:
                w.scoreboards[c.read] = max(w.scoreboards[c.read], read + READ_LATENCY)
            w.next += 1
            if w.next == len(w.trace):
                w.done = True
                running[w.block] -= 1
                if running[w.block] == 0:
                    ends.append(cycle)
                    if started < blocks:
                        started += 1
                        running[w.block] = size
                        for other in warps[w.block * size : (w.block + 1) * size]:
                            other.__init__(w.block, other.trace, cycle + BLOCK_START)  # type: ignore[misc]
                else:
                    release(w.block)
                continue
            following = costs[w.trace[w.next]]
            w.ready = max([cycle + c.stall, *(w.scoreboards[i] for i in following.scoreboards)])
            if following.pending is not None and len(w.groups) > following.pending:
                w.ready = max(w.ready, w.groups[-1 - following.pending])
            if c.base == "BAR":
                w.waiting = True
                arrived[w.block] += 1
                release(w.block)
        if issued:
            cycle += 1
        elif soonest == math.inf:
            raise RuntimeError("bench sass: warps wait for a barrier at which others do not arrive")
        else:
            cycle = math.ceil(soonest)
    return ends
