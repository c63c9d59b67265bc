"""The cycle model of bench/sass: parser, control flow and scheduler, on snippets whose cycles are counted by hand."""

import struct
from collections import Counter

import pytest

from bench.sass import machine
from bench.sass.arithmetic import COMPUTE
from bench.sass.follow import CannotFollow, Follower, Launch
from bench.sass.listing import Instruction, parse
from bench.sass.predict import _makespan

LISTING = """
.text.kernel:
.L_x_0:
        /*0000*/                   LDSM.16.M88.4 R4, [R12.reuse+0x10] ;  /* 0x000000000c04783b */
                                                                         /* 0x004e620000000200 */
.L_x_1:
        /*0010*/              @!P0 BRA `(.L_x_0) ;                       /* 0x0000000c00148947 */
                                                                         /* 0x002fea0003800000 */
        /*0020*/                   EXIT ;                                /* 0x000000000000794d */
                                                                         /* 0x000fea0003800000 */
"""


def test_parser():
    load, branch, end = parse(LISTING)
    assert (load.address, load.guard, load.opcode) == (0, "", "LDSM.16.M88.4")
    assert load.base == "LDSM" and load.operands == ("R4", "[R12+0x10]")
    # 0x004e62 = wait mask 000100, no read barrier, write barrier 1, no yield, stall 1 (in bits 41 to 57)
    assert (load.stall, load.write_barrier, load.read_barrier, load.waits) == (1, 1, 7, 0b100)
    assert (branch.guard, branch.operands, branch.stall, branch.waits) == ("!P0", ("0x0",), 5, 0b10)
    assert end.operands == () and end.write_barrier == 7


def program(*lines):
    """Instructions from "opcode operands", with a stall of 1, or from pairs of that and the control code's fields."""
    found = []
    for i, line in enumerate(lines):
        text, control = (line, {}) if isinstance(line, str) else line
        guard, text = text[1:].split(None, 1) if text.startswith("@") else ("", text)
        opcode, _, rest = text.partition(" ")
        operands = tuple(rest.split(", ")) if rest else ()
        found.append(Instruction(16 * i, guard, opcode, operands, **({"stall": 1} | control)))
    return found


def traces(code, params=b"", num_threads=32, memory=None, num_blocks=1, block=0):
    return Follower(code, Launch(num_blocks, num_threads, params, memory or {})).traces(block)


# ---- control flow


def test_a_loop_is_followed_as_often_as_the_params_say():
    code = program(
        "MOV R0, RZ",
        "IADD3 R0, R0, 0x1, RZ",  # 0x10
        "ISETP.LT.AND P0, PT, R0, c[0x0][0x218], PT",
        "@P0 BRA 0x10",
        "EXIT",
    )
    (issued,) = traces(code, struct.pack("<qi", 0, 3))
    assert issued == [0, 1, 2, 3, 1, 2, 3, 1, 2, 3, 4]


def test_warps_and_blocks_take_their_own_branches():
    code = program(
        "S2R R0, SR_TID.X",
        "S2UR UR4, SR_CTAID.X",
        "SHF.R.U32.HI R0, RZ, 0x5, R0",
        "ISETP.EQ.U32.AND P1, PT, R0, UR4, PT",
        "@P1 EXIT",
        "NOP",
        "EXIT",
    )
    assert [len(trace) for trace in traces(code, num_threads=96, block=1)] == [7, 5, 7]


def test_memory_decides_where_it_is_given():
    code = program("LDC.64 R2, c[0x0][0x210]", "LDG.E.64 R4, desc[UR4][R2.64+0x8]", "ISETP.NE.AND P0, PT, R5, RZ, PT")
    code += [Instruction(0x30 + i, "P0" if i == 0 else "", "EXIT", (), 1) for i in (0, 16)]
    params = struct.pack("<Q", 0x7F0012345678)
    assert len(traces(code, params, memory={0x7F0012345684: 7})[0]) == 4
    assert len(traces(code, params)[0]) == 5


def test_shared_memory_is_seen_by_later_warps():
    code = program(
        "S2R R0, SR_TID.X",
        "ISETP.NE.AND P0, PT, R0, RZ, PT",
        "MOV R2, 0x5",
        "@!P0 STS.64 [RZ+0x40], R2",
        "LDS R1, [RZ+0x40]",
        "ISETP.EQ.AND P1, PT, R1, 0x5, PT",
        "@P1 EXIT",
        "NOP",
        "EXIT",
    )
    assert [len(trace) for trace in traces(code, num_threads=64)] == [7, 7]


def test_a_branch_on_a_float_is_an_error():
    code = program("FADD R1, R2, R3", "FSETP.GT.AND P0, PT, R1, 1, PT", "@P0 BRA 0x0", "EXIT")
    with pytest.raises(CannotFollow, match="BRA at 0x20 depends on a value that is not known"):
        traces(code)


def test_an_unknown_instruction_makes_its_result_unknown():
    code = program("BRA.DIV UR4, 0x0", "NEW.OP UR5, UR6", "ISETP.EQ.AND P0, PT, RZ, UR4, PT", "@P0 BRA 0x50", "EXIT")
    code += [Instruction(0x50, "", "MOV", ("R1", "UR5"), 1), Instruction(0x60, "", "EXIT", (), 1)]
    assert traces(code) == [[0, 1, 2, 3, 5, 6]]
    code[2] = Instruction(0x20, "", "ISETP.EQ.AND", ("P0", "PT", "RZ", "UR5", "PT"), 1)
    with pytest.raises(CannotFollow, match="BRA at 0x30"):
        traces(code)


@pytest.mark.parametrize(
    ("opcode", "sources", "expected"),
    [
        ("IADD3", (0xFFFFFFFF, 1, 0), (0, (True, False))),
        ("IADD3", (5, 2**32 - 0, 0), (5, (True, False))),  # 5 - 0 does not borrow
        ("IADD3.X", (1, 2, 3, True, True), (8, (False, False))),
        ("IMAD.WIDE.U32", (0xFFFFFFFF, 2, 3), (0x200000001, (False,))),
        ("IMAD.WIDE", (0xFFFFFFFF, 2, 3), (1, (False,))),
        ("IMAD.HI.U32", (0x80000000, 6, 0), (3, ())),
        ("LEA", (3, 0x100, 4), (0x130, (False, False))),
        ("LEA.HI", (0x80000000, 5, 0, 1), (6, (False, False))),
        ("LEA.HI.X", (0x80000000, 5, 1, 1, True), (9, (False, False))),
        ("LEA.HI.X.SX32", (0xFFFFFFFE, 0, 1, False), (0xFFFFFFFF, (False, False))),
        ("SHF.R.S32.HI", (0, 31, 0x80000000), (0xFFFFFFFF, ())),
        ("SHF.R.U64", (0, 4, 0x12), (0x20000000, ())),
        ("SHF.L.U64.HI", (0x80000000, 1, 1), (3, ())),
        ("ISETP.LT.AND", (0xFFFFFFFF, 0, True), (0, (True, False))),
        ("ISETP.LT.U32.AND", (0xFFFFFFFF, 0, True), (0, (False, True))),
        ("ISETP.GE.AND.EX", (4, 4, True, False), (0, (False, True))),
        ("ISETP.NE.AND.EX", (0, 0, True, True), (0, (True, False))),
        ("LOP3.LUT", (0xF0, 0x3C, 0, 0xC0, False), (0x30, (True,))),
        ("LOP3.LUT", (0xF0, 0x3C, 0, 0x3C, False), (0xCC, (True,))),
        ("PLOP3.LUT", (True, True, True, 0x80, 0), (0, (True, False))),
        ("PRMT", (0x11223344, 0x5410, 0xAABBCCDD), (0xCCDD3344, ())),
        ("VIADDMNMX", (0xFFFFFFFF, 2, 0x40, True), (1, ())),
        ("HFMA2.MMA", (0, 0, 0.0, 1.0), (0x3C00, ())),
        ("P2R", ([True, None, True], 0, 0x5), (0x5, ())),
        ("P2R", ([True, None, True], 0, 0x7), None),
    ],
)
def test_arithmetic(opcode, sources, expected):
    parts = opcode.split(".")
    assert COMPUTE[parts[0]](parts, *sources) == expected


@pytest.mark.parametrize(("a", "b"), [(7, 2), (262143, 3), (2**31 + 5, 7), (12, 12), (5, 9)])
def test_division_as_ptxas_writes_it(a, b):
    code = program(
        f"MOV R6, {a:#x}",
        f"MOV R4, {b:#x}",
        "I2F.U32.RP R0, R4",
        "MUFU.RCP R0, R0",
        "VIADD R2, R0, 0xffffffe",
        "F2I.FTZ.U32.TRUNC.NTZ R3, R2",
        "IMAD.MOV.U32 R2, RZ, RZ, RZ",
        "IMAD.MOV R5, RZ, RZ, -R3",
        "IMAD R5, R5, R4, RZ",
        "IMAD.HI.U32 R3, R3, R5, R2",
        "IMAD.HI.U32 R7, R3, R6, RZ",
        "IMAD.MOV R3, RZ, RZ, -R7",
        "IMAD R3, R4, R3, R6",
        "ISETP.GE.U32.AND P0, PT, R3, R4, PT",
        "@P0 IMAD.IADD R3, R3, 0x1, -R4",
        "@P0 VIADD R7, R7, 0x1",
        "ISETP.GE.U32.AND P1, PT, R3, R4, PT",
        "@P1 IADD3 R7, R7, 0x1, RZ",
        f"ISETP.EQ.AND P0, PT, R7, {a // b:#x}, PT",
        "@P0 EXIT",
        "NOP",
        "EXIT",
    )
    assert len(traces(code)[0]) == 20


# ---- the scheduler


def cycles(code, warps=1, resident=1, blocks=None):
    return machine.simulate(code, [range(len(code))] * warps, resident, blocks)


def test_stall_counts_are_the_distance_of_instructions():
    code = program(("FADD R0, R0, R1", {"stall": 4}), ("FADD R0, R0, R1", {"stall": 5}), "EXIT")
    assert cycles(code) == [9]


def test_a_scoreboard_holds_back_the_reader():
    # The load is issued at 0 and complete after 29 cycles.
    code = program(("LDS R0, [RZ]", {"write_barrier": 2}), ("EXIT", {"waits": 0b100}))
    assert cycles(code) == [29]
    code = program(("LDS R0, [RZ]", {"write_barrier": 2}), ("EXIT", {"waits": 0b010}))
    assert cycles(code) == [1]


def test_a_read_barrier_holds_back_the_writer():
    code = program(("STS [RZ], R0", {"read_barrier": 0}), ("EXIT", {"waits": 1}))
    assert cycles(code) == [1 + machine.READ_LATENCY]


def test_half_rate_instructions_of_two_warps_alternate():
    # Five warps: two of them share a partition. FADD: one a cycle; IADD3: one every second cycle.
    assert cycles(program(*["FADD R0, R0, R1"] * 10, "EXIT"), warps=5) == [21]
    assert cycles(program(*["IADD3 R0, R0, R1, RZ"] * 10, "EXIT"), warps=5) == [39]  # the 20th begins at 38


def test_tensor_cores_take_an_hmma_every_6_4_cycles():
    # The 11th begins at 64, the first cycle at which ten have had their 6.4.
    assert cycles(program(*["HMMA.16816.F32.BF16 R0, R4, R8, R0"] * 11, "EXIT")) == [65]
    assert cycles(program(*["HMMA.16816.F32.BF16 R0, R4, R8, R0"] * 11, "EXIT"), warps=4) == [65]


def test_the_shared_memory_pipe_is_one_for_the_sm():
    # 4 warps of 40 LDSM.x4: 640 cycles of the pipe, and then the rest of the last one's latency.
    lines = ["LDSM.16.M88.4 R0, [R4]"] * 39 + [("LDSM.16.M88.4 R0, [R4]", {"write_barrier": 0})]
    (end,) = cycles(program(*lines, ("EXIT", {"waits": 1})), warps=4)
    assert end == 640 + machine.LATENCY["LDSM"] - 4


def test_copies_are_waited_for_by_group():
    copies = ["LDGSTS.E.BYPASS.128 [R0], desc[UR4][R2.64]", "LDGDEPBAR"] * 2
    (all_of_them,) = cycles(program(*copies, "DEPBAR.LE SB0, 0x0", "EXIT"))
    (first,) = cycles(program(*copies, "DEPBAR.LE SB0, 0x1", "EXIT"))
    assert (first, all_of_them) == (machine.COPY_LATENCY + 1, machine.COPY_LATENCY + 3)


def test_a_barrier_waits_for_the_last_warp_of_its_block():
    slow = program(("FADD R0, R0, R1", {"stall": 15}), "FADD R0, R0, R1", "BAR.SYNC.DEFER_BLOCKING 0x0", "EXIT")
    ends = machine.simulate(slow, [[2, 3], [0, 1, 2, 3]], resident=1)
    assert ends == [16 + machine.BARRIER_LATENCY]
    assert machine.simulate(slow, [[2, 3], [3]], resident=1) == [
        machine.BARRIER_LATENCY
    ]  # one that left is not awaited


def test_blocks_are_replaced():
    code = program(("FADD R0, R0, R1", {"stall": 10}), "EXIT")
    assert cycles(code, resident=2, blocks=3) == [10, 10, 10 + machine.BLOCK_START + 10]


def test_work_is_what_each_resource_takes():
    code = program("HMMA.16816.F32.BF16 R0, R4, R8, R0", "LDSM.16.M88.4 R0, [R4]", "MUFU.EX2 R0, R0", "LDS.64 R0, [R4]")
    work = machine.work(code, Counter({0: 40, 1: 8, 2: 4, 3: 12}))
    assert work == {"issue": 16, "tensor cores": 64, "shared memory": 56, "MUFU": 8, "ALU": 0, "IMAD": 0}


def test_makespan():
    assert _makespan([3, 3, 2, 2], 2) == 5
    assert _makespan([4, 1], 5) == 4
