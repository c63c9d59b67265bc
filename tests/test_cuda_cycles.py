"""Predicted cycles of the CUDA kernels: a rise against the committed record fails. No GPU is needed."""

import pytest

from bench import records
from bench.sass import kernels, listing, predict
from hypenet_kernels import _nvrtc

RISE = 0.03
RISE_OF_OTHER_COMPILERS = 0.15  # between releases of ptxas; the record names the one that it is of
REWRITE = "`python -m bench sass` and `python -m bench report` write"
QUICK = ("GDN fwd 1 x 8192", "HyPE fwd 1 x 8192")  # prepare, the scan of four warps, attention's forward

pytestmark = [
    pytest.mark.skipif(not _nvrtc.is_installed(), reason=f"no NVRTC: {_nvrtc.INSTALL}"),
    pytest.mark.skipif(listing.disassembler() is None, reason="no nvdisasm: pip install nvidia-cuda-nvdisasm"),
]


def problems(measured, record, compiler):
    """Return what is wrong with rows of kernels, compared with those of a record."""
    known = {row["kernel"]: row for row in record["kernels"]}
    most = RISE if compiler == record["compiler"] else RISE_OF_OTHER_COMPILERS
    found = []
    for row in measured:
        name, cycles = row["kernel"], row["cycles"]
        if name not in known:
            found.append(f"{name}: not in the record")
        elif cycles > (1 + most) * (before := known[name]["cycles"]):
            rise = 100 * (cycles / before - 1)
            found.append(f"{name}: {cycles:.0f} cycles per {row['unit']}, {before:.0f} in the record: {rise:+.1f} %")
    return found


def check(cases, whole=False):
    record, model = records.load(predict.RECORD), predict.Model()
    for case in cases:
        model.predict(case)
    found = problems(model.rows(), record, predict.compiler())
    if whole:
        missing = {row["kernel"] for row in record["kernels"]} - {row["kernel"] for row in model.rows()}
        found += [f"{name}: in the record, but no kernel" for name in missing]
    assert not found, "\n".join([*sorted(found), f"if that is intended, commit what {REWRITE}"])


def test_cycles_of_some_kernels_are_those_of_the_record():
    check([case for case in kernels.CASES if case.name in QUICK])


@pytest.mark.slow
def test_cycles_of_all_kernels_are_those_of_the_record():
    check(kernels.CASES, whole=True)


def test_the_record_has_every_kernel_and_case():
    record = records.load(predict.RECORD)
    functions = {row["kernel"].partition(",")[0] for row in record["kernels"]}
    assert functions == {kernel.name for kernel in kernels.KERNELS}
    assert [row["case"] for row in record["cases"]] == [case.name for case in kernels.CASES]
    assert all(case["ms"].keys() == {"H100", "H200"} and case["kernels"] for case in record["cases"])


@pytest.mark.parametrize(
    ("cycles", "compiler", "said"),
    [
        (1029.0, "NVRTC 13.5", []),
        (900.0, "NVRTC 13.5", []),
        (1031.0, "NVRTC 13.5", ["scan, 1 x 4 warps: 1031 cycles per chunk, 1000 in the record: +3.1 %"]),
        (1031.0, "NVRTC 12.8", []),
        (1151.0, "NVRTC 12.8", ["scan, 1 x 4 warps: 1151 cycles per chunk, 1000 in the record: +15.1 %"]),
    ],
)
def test_a_rise_is_a_problem(cycles, compiler, said):
    row = {"kernel": "scan, 1 x 4 warps", "unit": "chunk", "cycles": 1000.0}
    record = {"compiler": "NVRTC 13.5", "kernels": [row]}
    assert problems([row | {"cycles": cycles}], record, compiler) == said
    assert problems([row | {"kernel": "new"}], record, compiler) == ["new: not in the record"]
