"""Predicted cycles of a kernel's loop, what limits it, and the milliseconds of an op on an H100 and an H200."""

import heapq
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

from bench import records
from bench.sass import follow, kernels, listing, machine
from bench.sass.kernels import Case, Kernel
from bench.sass.occupancy import blocks_per_sm
from hypenet_kernels import _nvrtc, _warmup
from hypenet_kernels._warmup import Launch

RECORD = records.RESULTS / "sass.json"
TARGET, NUM_SMS, SHARED_BYTES = "sm_90a", 132, 227 * 1024
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}  # bytes a second (NVIDIA's data sheets)
REACHABLE = 0.9  # of the bandwidth
CLOCK, IDLE_CLOCK = 1.755e9, 1.9e9  # Hz, with most SMs busy, and with fewer blocks than three for four SMs
LIMITING = 2 / 3  # a resource that is busy for this part of the cycles limits the kernel, else latency does
RULES = {"chunk_gated_delta_rule": ", delta rule", "chunk_simple_gla": ", simple GLA"}
ROUNDS = 4  # that a block measured as a whole is replaced


Program = Sequence[listing.Instruction]


class KernelRow(TypedDict):
    """A kernel with `resident` blocks on an SM.

    `cycles`: per unit. Instructions: per unit and warp. `resources`: the cycles per unit that each would take alone.
    `limiter`: the one that takes most of the cycles, or latency.
    """

    kernel: str
    resident: int
    warps: int
    unit: str
    cycles: float
    instructions: float
    hmma: float
    ldsm: float
    limiter: str
    resources: dict[str, float]


class CaseRow(TypedDict):
    """Milliseconds by GPU, of the kernels that they are made of, and of peers as published."""

    case: str
    ms: dict[str, float]
    kernels: dict[str, dict[str, float]]
    peers: dict[str, float]


class SassRecord(TypedDict):
    """sass.json. `tflops`: HyPE's forward as predicted, beside FlashAttention-2's, of the same design, as measured."""

    kind: str
    stamp: records.Stamp
    compiler: str
    kernels: list[KernelRow]
    cases: list[CaseRow]
    tflops: dict[str, float]


@dataclass(frozen=True)
class Loop:
    """A block of n iterations takes `fixed` + n row["cycles"], with as many blocks on the SM as the row says."""

    row: KernelRow
    fixed: float

    def block_cycles(self, iterations: float) -> float:
        return self.fixed + iterations * self.row["cycles"]


class Model:
    """Compiles and simulates each kernel once."""

    def __init__(self) -> None:
        self._programs: dict[str, tuple[Program, int]] = {}
        self._loops: dict[str, Loop] = {}

    def rows(self) -> list[KernelRow]:
        """Return what was measured so far."""
        return [loop.row for _, loop in sorted(self._loops.items())]

    def loops(self, case: Case) -> list[tuple[Kernel, Launch, Loop]]:
        """Return the kernels of an op that the model covers, of a backward pass without the forward's."""
        run, words = kernels.inputs(case)
        launches = [(_kernel(launch), launch) for launch in _launches(run)]
        return [
            (kernel, launch, self._loop(case, kernel, launch, words))
            for kernel, launch in launches
            if kernel is not None and kernel.backward == case.backward
        ]

    def predict(self, case: Case) -> CaseRow:
        """Return the predicted times of an op, which are the sums of those of its kernels."""
        parts: dict[str, dict[str, float]] = {}
        for kernel, launch, loop in self.loops(case):
            cycles = _makespan(_block_cycles(case, kernel, launch, loop), NUM_SMS * loop.row["resident"])
            seconds = cycles / (IDLE_CLOCK if 4 * launch.num_blocks < 3 * NUM_SMS else CLOCK)
            num_bytes = kernel.num_bytes(case)
            parts[kernel.name] = {
                gpu: 1e3 * max(seconds, num_bytes / (REACHABLE * rate)) for gpu, rate in BANDWIDTH.items()
            }
        ms = {gpu: sum(part[gpu] for part in parts.values()) for gpu in BANDWIDTH}
        return {"case": case.name, "ms": ms, "kernels": parts, "peers": case.peers}

    def _loop(self, case: Case, kernel: Kernel, launch: Launch, words: dict[int, int]) -> Loop:
        program, registers = self._program(launch)
        most = blocks_per_sm(TARGET, registers, launch.num_threads, launch.shared_bytes)
        resident = min(most, -(-launch.num_blocks // NUM_SMS))
        rule = RULES.get(case.op, "")
        name = f"{kernel.name}{rule}, {resident} x {launch.num_threads // 32} warps"
        if name not in self._loops:
            if kernel.lengths is None:
                self._loops[name] = _whole_block(name, program, kernel, launch, words, resident)
            else:
                self._loops[name] = _iterations(name, program, case, kernel, launch, resident)
        return self._loops[name]

    def _program(self, launch: Launch) -> tuple[Program, int]:
        """Return a kernel's instructions and registers per thread."""
        if launch.expression not in self._programs:
            cubin = _nvrtc.build(launch.source, launch.expression, TARGET)
            said = cubin.log.partition(f"'{cubin.symbol}'")[2]
            registers = re.search(r"Used (\d+) registers", said)
            assert registers is not None, cubin.log
            self._programs[launch.expression] = listing.disassemble(cubin.code, cubin.symbol), int(registers[1])
        return self._programs[launch.expression]


def run(on_case: Callable[[int, int, str], None]) -> SassRecord:
    """Predict all cases; `on_case(index, count, name)` is called before each."""
    model, rows = Model(), list[CaseRow]()
    for i, case in enumerate(kernels.CASES):
        on_case(i, len(kernels.CASES), case.name)
        rows.append(model.predict(case))
    (forward,) = [case for case in kernels.CASES if case.op == "hype_attention" and not case.backward]
    (ms,) = [row["ms"]["H100"] for row in rows if row["case"] == forward.name]
    flops = 2.0 * forward.B * forward.H * forward.T**2 * kernels.D
    return {
        "kind": "sass",
        "stamp": records.stamp("cpu") | {"device": "model of an H100 and an H200", "threads": None, "level": "none"},
        "compiler": compiler(),
        "kernels": model.rows(),
        "cases": rows,
        "tflops": {"predicted": flops / ms / 1e9, "measured": kernels.FLASH_ATTENTION_2},
    }


def compiler() -> str:
    """Return the compiler's name and version."""
    return "NVRTC {}.{}".format(*_nvrtc.version())


def _launches(run: Callable[[], object]) -> list[Launch]:
    return _warmup.launches(NUM_SMS, SHARED_BYTES, run)


def _kernel(launch: Launch) -> Kernel | None:
    function = launch.expression.partition("<")[0].rpartition("::")[2]
    return next((kernel for kernel in kernels.KERNELS if kernel.function == function), None)


def _traces(program: Program, launch: Launch, words: dict[int, int]) -> list[list[int]]:
    """Return the traces of the warps of the first block; causal kernels begin with the longest."""
    return follow.Follower(program, follow.Launch(launch.num_blocks, launch.num_threads, launch.params, words)).traces(
        0
    )


def _whole_block(
    name: str, program: Program, kernel: Kernel, launch: Launch, words: dict[int, int], resident: int
) -> Loop:
    """Measure blocks that are replaced as they end."""
    traces = _traces(program, launch, words)
    ends = machine.simulate(program, traces, resident, ROUNDS * resident)
    cycles = resident * (ends[-1] - ends[resident - 1]) / (len(ends) - resident)
    return Loop(_row(name, kernel, program, _counts(traces), 1, len(traces), resident, cycles), 0.0)


def _iterations(name: str, program: Program, case: Case, kernel: Kernel, launch: Launch, resident: int) -> Loop:
    """Measure a short and a long block; the difference is the loop's."""
    measured = []
    for T in kernel.lengths or ():
        shorter = replace(case, T=T)
        call, words = kernels.inputs(shorter)
        shortened = next(found for found in _launches(call) if found.expression == launch.expression)
        traces = _traces(program, shortened, words)
        measured.append((kernel.iterations(shorter), _counts(traces), machine.simulate(program, traces, resident)[-1]))
    (few, fewer, short), (many, more, long) = measured
    cycles = (long - short) / (many - few)
    row = _row(name, kernel, program, more - fewer, many - few, launch.num_threads // 32, resident, cycles)
    return Loop(row, short - few * cycles)


def _counts(traces: Sequence[Sequence[int]]) -> Counter[int]:
    """Return how often each instruction is issued, by index."""
    return sum((Counter(trace) for trace in traces), Counter())


def _row(
    name: str,
    kernel: Kernel,
    program: Program,
    counts: Counter[int],
    units: int,
    warps: int,
    resident: int,
    cycles: float,
) -> KernelRow:
    """Return the row for `counts` of instructions of `units` iterations of a block."""
    bases = Counter[str]()
    for i, count in counts.items():
        bases[program[i].base] += count
    work = machine.work(program, counts)
    resources = {what: busy * resident / units for what, busy in work.items()}
    most = max(resources, key=lambda what: resources[what])
    return {
        "kernel": name,
        "resident": resident,
        "warps": warps,
        "unit": kernel.unit,
        "cycles": round(cycles, 1),
        "instructions": round(counts.total() / units / warps, 1),
        "hmma": round(bases["HMMA"] / units / warps, 1),
        "ldsm": round(bases["LDSM"] / units / warps, 1),
        "limiter": most if resources[most] >= LIMITING * cycles else "latency",
        "resources": {what: round(busy, 1) for what, busy in resources.items()},
    }


def _block_cycles(case: Case, kernel: Kernel, launch: Launch, loop: Loop) -> list[float]:
    """Return the cycles of every block of a launch, in the order of their start."""
    longest = kernel.iterations(case)
    if not kernel.causal:
        return [loop.block_cycles(longest)] * launch.num_blocks
    heads = case.H if kernel.iterations(case) == case.T // 64 else case.HV
    lengths = launch.num_blocks // (heads * case.B)
    return [loop.block_cycles(longest * n / lengths) for n in range(lengths, 0, -1) for _ in range(heads * case.B)]


def _makespan(block_cycles: Sequence[float], places: int) -> float:
    """Return when the last block ends, if each starts where one ends first."""
    ends = [0.0] * min(places, len(block_cycles))
    for cycles in block_cycles:
        heapq.heapreplace(ends, ends[0] + cycles)
    return max(ends)
