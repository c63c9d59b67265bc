"""The emulator's sm_90a: each misuse of its asynchronous instructions is detected; correct kernels run, and compile."""

import os
import re
import subprocess

import cuda_resources
import pytest
import torch
from test_cuda_build import NVCC, needs_nvcc
from test_emulator import FOLDER, THREAD, kernels, run, seed  # noqa: F401, a fixture
from test_install import setup

RACE = "race: no barrier since the (read|write) by"
NOT_FENCED = (
    r"wgmma reads 16 bytes at shared \+ 0x\w+.*: written by thread .* through the generic proxy: "
    "no fence_async_proxy by it since"
)
UNDER_WAY = "an accumulator whose wgmma is under way: no wait_wgmma since"
STILL_READ = "wgmma of warpgroup 0 still reads it: no wait_wgmma since"
COPYING = "an asynchronous copy of thread .* is under way"
NOT_ALL = "(divergent: this thread exits, while others wait for it|deadlock: ).*: waiting at "

BAD = {  # kernel -> pattern of the message
    # the two proxies
    "missing_proxy_fence": NOT_FENCED,
    "proxy_fence_by_the_reader_only": NOT_FENCED,
    "proxy_fence_before_the_write": NOT_FENCED,
    "proxy_fence_without_barrier": "wgmma reads 16 bytes .*: race: no barrier since the write by thread",
    "proxy_fence_after_the_barrier": NOT_FENCED,
    "proxy_fence_by_one_lane": NOT_FENCED,
    "copies_fenced_before_they_land": NOT_FENCED,
    "copies_not_waited_for": f"wgmma reads 16 bytes .*: to which {COPYING}",
    "unwritten_operand": "wgmma reads 16 bytes at .*: which nobody wrote",
    # groups of wgmma
    "missing_wgmma_fence": "wgmma: no fence_wgmma before the first one of its group",
    "second_group_without_fence": "wgmma: no fence_wgmma before the first one of its group",
    "accumulator_set_after_the_fence": r"wgmma: thread 0 \(.*\) wrote the registers of D after fence_wgmma",
    "register_operand_loaded_after_the_fence": r"wgmma: thread 0 \(.*\) wrote the registers of A after fence_wgmma",
    "missing_wgmma_commit": "wait_wgmma: 1 wgmma are in no group: no commit_wgmma since",
    "missing_wgmma_wait": f"reads {UNDER_WAY}",
    "wait_for_too_few_groups": "wait_wgmma: waits for too few groups, that of this accumulator is under way",
    "accumulator_read_early": f"reads {UNDER_WAY}",
    "accumulator_written_early": f"writes {UNDER_WAY}",
    "accumulator_in_two_shapes": "wgmma: its accumulator overlaps one of another shape, which is under way",
    "register_operand_overwritten_early": "writes the registers of A, which a wgmma under way reads: no wait_wgmma",
    "register_operand_reloaded_early": "writes the registers of A, which a wgmma under way reads: no wait_wgmma",
    "shared_operand_stored_early": f"thread 70 .*: writes 2 bytes at shared .*: {STILL_READ}",
    "shared_operand_copied_over_early": f"thread 70 .*: writes 16 bytes at shared .*: {STILL_READ}",
    "shared_operand_bulk_copied_over_early": f"thread 70 .*: writes 64 bytes at shared .*: ({STILL_READ}|written by)",
    "exit_with_wgmma_under_way": "exits while its wgmma are under way: no wait_wgmma since",
    # descriptors
    "descriptor_misaligned": r"the descriptor 0x\w+ of A: misaligned, it starts at shared \+ 0x200, in row 4 of 8",
    "descriptor_out_of_its_tile": "of B: out of the tile, its rows of 32 bytes start 112 bytes into those of the tile",
    "descriptor_out_of_shared_memory": r"wgmma: B is out of bounds: element \(8, 0\) is at shared \+ 0x6000",
    "descriptor_of_global_memory": r"not an address in shared memory: a \+ 0 bytes",
    "descriptor_with_the_stride_of_a_row": "of B: misaligned, its stride offset must be a multiple of 1024 .*, not 128",
    "descriptor_without_swizzle": "of B has not the swizzle of 128 bytes",
    "descriptor_without_leading_offset": "of B: misaligned, its leading offset must be a multiple of 1024 bytes, not 0",
    "different_descriptors_in_a_warpgroup": r"divergent wgmma: thread 96 \(.*\) has other operands .* than thread 0 ",
    # who takes part
    "wgmma_by_three_warps": f"{NOT_ALL}fence_wgmma",
    "wgmma_by_an_unaligned_warpgroup": f"{NOT_ALL}fence_wgmma",
    "wgmma_by_half_a_warp": f"{NOT_ALL}fence_wgmma|divergent fence_wgmma: the other lanes of its warp are elsewhere",
    "wgmma_in_a_block_of_three_warps": "fence_wgmma: needs a warpgroup, 4 warps from a multiple of 4 on",
    "warps_at_different_instructions": "divergent (wgmma|commit_wgmma): other warps of its warpgroup are elsewhere",
    # mbarriers; a phase too early shows as a race, a phase too late as a deadlock
    "producer_refills_too_early": f"({STILL_READ}|{RACE}|which nobody wrote)",
    "wait_with_the_wrong_parity": f"(which nobody wrote|{RACE}|waiting for the mbarrier .*: phase 1, 0 of 128)",
    "parity_not_flipped": rf"({RACE}|waiting for the mbarrier at .*: phase \d, 0 of 128 arrivals)",
    "arrival_count_too_small": rf"({RACE}|nobody wrote|waiting for the mbarrier at .*: phase \d, \d+ of 64 arrivals)",
    "arrival_count_too_large": r"deadlock: .*waiting for the mbarrier at shared \+ 0x\w+: phase 0, 128 of 129 arr",
    "more_arrivals_than_counted": "thread 5 .*: arrive: more arrivals than its count .* 1 of 1 .*, 64 bytes missing",
    "mbarrier_not_initialised": r"arrive: no mbarrier at shared \+ 0x\w+, init_mbarrier has not run",
    "mbarrier_initialised_without_fence": r"thread 0 \(.*\) initialised the mbarrier .* no fence_mbarrier_init since",
    "mbarrier_initialised_without_barrier": f"({RACE}|init_mbarrier has not run|no fence_mbarrier_init since)",
    "mbarrier_initialised_by_two": "thread 64 .*: init_mbarrier: a second time for the mbarrier at",
    "mbarrier_overwritten": "arrive: the mbarrier at .* was overwritten",
    "one_lane_waits_for_its_warp": f"(which nobody wrote|{RACE})",
    "one_lane_arrives_for_its_warp": f"(which nobody wrote|{RACE})",
    "write_after_arrival": RACE,
    # bulk copies
    "too_few_bytes_announced": "copy_bulk brought 16 more bytes than arrive_expect announced",
    "too_many_bytes_announced": "deadlock: .*phase 0, 1 of 1 arrivals, 16 bytes missing",
    "no_bytes_announced": f"({COPYING}|{RACE} copy_bulk with the mbarrier at)",
    "bulk_copy_misaligned": r"thread 0 .*: copy_bulk: misaligned address a \+ 4 bytes, not a multiple of 16",
    "bulk_copy_of_24_bytes": "copy_bulk: not a multiple of 16: 24 bytes",
    "bulk_copy_out_of_bounds": r"reads 64 bytes at a \+ 1008 bytes: out of bounds",
    "bulk_copy_not_waited_for": f"(which nobody wrote|{RACE}|{COPYING})",
    "bulk_copy_over_unfenced_writes": "writes 64 bytes .*: written by thread .* through the generic proxy: no fence",
    "exit_with_a_bulk_copy_under_way": "the kernel ends while a copy_bulk of thread 0 .* is under way",
    # named barriers
    "roles_disagree_on_the_count": r"(arrive|sync)_group\(\d, \d+\), where others wait for \d+ threads|deadlock",
    "barrier_that_nobody_completes": "the kernel ends with 64 arrivals of 128 at barrier 1, which nobody completes",
    "wait_that_nobody_completes": r"deadlock: .*threads 0 to 63: waiting at sync_group\(1, 128\), where 96 threads",
    "arrival_taken_for_a_wait": f"(which nobody wrote|{RACE})",
    "write_after_named_arrival": RACE,
    # registers
    "registers_beyond_64k": "deadlock: .*waiting at set_max_registers_up<208>, for registers of others",
    "registers_not_a_multiple_of_8": "set_max_registers: must be a multiple of 8 in 24 to 256, got 100",
    "registers_of_one_warp": f"{NOT_ALL}set_max_registers_down",
    "registers_lowered_to_more": "set_max_registers_down<240>: the warpgroup has 168 registers a thread",
}


@pytest.mark.parametrize("name", BAD)
def test_error_is_detected(name, seed):  # noqa: F811
    with pytest.raises(RuntimeError, match=f"^{name}: kernel bad, {THREAD}") as caught:
        run(name, a=torch.zeros(256), c=torch.zeros(3 * 256), n=256, num_blocks=3)
    with pytest.raises(RuntimeError, match=BAD[name]):
        raise caught.value


def test_every_bad_kernel_is_tested():
    sources = "".join((FOLDER / f"{name}.cu").read_text() for name in ("bad_wgmma", "bad_roles"))
    in_sources = re.findall(r"^    BAD(?:_WITH)?\((?:\d+, )?(\w+)\),$", sources, re.MULTILINE)
    assert sorted(in_sources) == sorted([*BAD, "swizzled_by_half_the_row"])


def test_wrong_swizzle_shows_in_the_result():
    """Nothing but the result can tell: row r must hold vector v at v ^ r % 8, and the kernel writes v ^ r / 2 % 4."""
    c = torch.full((128, 32), torch.nan)
    run("swizzled_by_half_the_row", c=c, num_blocks=1)
    assert c.isfinite().all() and not c.equal(torch.full_like(c, 16.0))


def assert_is_product(c, a, b):
    """c = a b up to the truncation of the tensor cores: 17 summands and a sum, each to 2^-23, for every 16 products."""
    bound = a.shape[-1] / 16 * 18 * 2.0**-23 * (a.double().abs() @ b.double().abs())
    difference = (c.double() - a.double() @ b.double()).abs()
    assert (difference <= bound).all(), (difference / bound).max()
    assert c.square().mean() > 1


GEMMS = [
    *(("bf16", "registers", major, n) for n in (16, 32, 48, 64, 128, 256) for major in "kn"),
    *(("bf16", "k", "k", 64), ("bf16", "k", "n", 128), ("bf16", "m", "k", 128), ("bf16", "m", "n", 48)),
    *(("fp16", "registers", "n", 64), ("fp16", "m", "k", 32)),
]


@pytest.mark.parametrize("case", GEMMS, ids=lambda case: "_".join(map(str, case)))
def test_wgmma(case):
    dtype, major_a, major_b, n = case
    dtype = torch.bfloat16 if dtype == "bf16" else torch.float16
    a, b, c = torch.randn(64, 64).to(dtype), torch.randn(64, n).to(dtype), torch.full((64, n), torch.nan)
    stored = {"a": (a.T if major_a == "m" else a).contiguous(), "b": (b.T if major_b == "k" else b).contiguous()}
    run(f"wgmma_{'_'.join(map(str, case))}", **stored, c=c, num_blocks=1)
    assert_is_product(c, a, b)


def test_wgmma_adds_to_an_accumulator_under_way(seed):  # noqa: F811
    a, b, c = torch.randn(64, 64).bfloat16(), torch.randn(2, 64, 64).bfloat16(), torch.full((2, 64, 64), torch.nan)
    run("two_groups", a=a, b=b, c=c, num_blocks=1)
    assert_is_product(c[0], a, b[0].T)
    assert_is_product(c[1], torch.cat([a, a], 1), torch.cat([b[1].T, b[0].T]))


def swizzled(tiles):
    """Return tiles [..., rows, 64] whose 8-element vectors are permuted as wgmma expects them in shared memory."""
    *lead, rows, _ = tiles.shape
    vectors = torch.arange(8) ^ torch.arange(rows)[:, None] % 8
    return tiles.view(*lead, rows, 8, 8).gather(-2, vectors[..., None].expand(*lead, rows, 8, 8)).view(tiles.shape)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("kind", ["async", "bulk"])
def test_pipeline(kind, n, seed):  # noqa: F811
    a, b, c = torch.randn(n, 128, 64).bfloat16(), torch.randn(n, 64, 64).bfloat16(), torch.full((128, 64), torch.nan)
    stored = (a, b) if kind == "async" else (swizzled(a), swizzled(b))
    run(f"{kind}_pipeline", *stored, c, n=n, num_blocks=1)
    assert_is_product(c, a.transpose(0, 1).reshape(128, n * 64), b.transpose(1, 2).reshape(n * 64, 64))


@pytest.mark.parametrize("n", [1, 2, 5])
def test_chain_of_two_products(n, seed):  # noqa: F811
    abv, c = torch.randint(-2, 3, (n, 3, 64, 64)), torch.full((64, 64), torch.nan)  # integers up to 256: exact in bf16
    run("chain", a=abv.bfloat16(), c=c, n=n, num_blocks=1)
    assert c.equal((abv[:, 0] @ abv[:, 1].mT @ abv[:, 2]).sum(0).float())


@pytest.mark.parametrize("name", ["named_barriers", "elected_lanes"])
def test_roles(name, seed):  # noqa: F811
    x, c = torch.randn(7, 64), torch.zeros(7, 64)
    run(name, a=x, c=c, n=7, num_blocks=1)
    assert c.equal(2 * x.flip(1))


@needs_nvcc
def test_compiles_without_spills_and_without_serialised_wgmma(tmp_path):
    """As setup.py compiles; ptxas reports wgmma that it serialises, like C7510, and setmaxnreg that it ignores."""
    cubin = tmp_path / "good_sm90.cubin"
    include = f"-I{FOLDER.parents[1] / 'csrc'}"
    command = [NVCC, *setup.NVCC_FLAGS, "-arch=sm_90a", include, "-DHYPENET_CUDA=1", "-cubin", "-o", cubin]
    ran = subprocess.run([*command, FOLDER / "good_sm90.cu"], capture_output=True, text=True)
    log = ran.stdout + ran.stderr
    assert ran.returncode == 0, log
    assert not re.findall(r".*(?:C75\d\d|serializ|setmaxnreg|[Ww]arning).*", log)
    local_memory = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", log)
    assert local_memory and set(local_memory) == {"0"}
    if disassembler := cuda_resources.disassembler():
        env = os.environ | {"PATH": os.pathsep.join([os.path.dirname(disassembler), os.environ["PATH"]])}
        sass = subprocess.run([disassembler, "-sass", cubin], capture_output=True, text=True, env=env, check=True)
        functions = re.split(r"Function : (\S+)", sass.stdout)[1:]
        multiplies = {name: "HGMMA" in code for name, code in zip(functions[::2], functions[1::2], strict=True)}
        assert 3 * len(multiplies) == len(local_memory)
        for name, found in multiplies.items():
            assert found == any(part in name for part in ("wgmma", "groups", "pipeline", "chain")), name
