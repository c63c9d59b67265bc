"""bench/gpu_check.sh without a GPU: order of the stages, what survives a failure, and the summary."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "bench" / "gpu_check.sh"
TESTS = sorted(path.stem.removeprefix("test_cuda_") for path in (ROOT / "tests").glob("test_cuda_*.py"))
WITHOUT_GPU = {"build", "cycles", "hostile_bounds", "rtc", "rtc_versions", "small_shared_memory"}
TESTS = [name for name in TESTS if name not in WITHOUT_GPU]
FIRST = ["device", "build", "self-test", "timing-first"]
LAST = ["profile", "timing", "synccheck", "memcheck", "racecheck"]
TOTAL = 570  # seconds
PYTHON = """#!/bin/sh
case "$*" in
    -) cat >/dev/null; printf '%s' "$FAKE_FACTS" ;;
    setup.py*) echo "built for $TORCH_CUDA_ARCH_LIST and $HYPENET_CPU_LEVELS" ;;
    "-m pytest"*step.py) echo "1 failed, 3 passed"; exit 1 ;;
    "-m pytest"*) echo "4 passed" ;;
    "-m bench.supervise"*--quick) echo first >"$4"; echo timed ;;
    "-m bench.supervise"*) echo '{"rows": []}' >"$4"; sleep "$FAKE_SECONDS"; echo timed ;;
    "-m bench.tables"*) echo "table of $(cat "$3")" ;;
    *) echo "ran $*" ;;
esac
"""
SANITIZER = """#!/bin/sh
echo "checked by $2: ERROR SUMMARY: 0 errors"
"""


@pytest.fixture
def machine(tmp_path):
    """Environment of a machine on which python, nvcc, nvidia-smi and compute-sanitizer are fakes."""
    for name, text in {
        "python": PYTHON,
        "compute-sanitizer": SANITIZER,
        "ncu": "#!/bin/sh\necho ncu ran\n",
        "nvidia-smi": "#!/bin/sh\necho NVIDIA H200\n",
        "nvcc": "#!/bin/sh\necho release 13.0\n",
    }.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    facts = {"FAKE_FACTS": f"9.0a\nv4\n{tmp_path}/results\n", "FAKE_SECONDS": "0"}
    return os.environ | facts | {"PYTHON": f"{tmp_path}/python", "PATH": f"{tmp_path}:{os.environ['PATH']}"}


def run(environment, *arguments, cwd=None):
    return subprocess.run([SCRIPT, *arguments], env=environment, cwd=cwd, capture_output=True, text=True)


def rows(folder):
    lines = (folder / "gpu_check.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {name: (result, last) for name, result, _, last in cells[1:]}


def test_a_failing_stage_does_not_stop_the_others(machine, tmp_path):
    ran = run(machine)
    assert ran.returncode == 1 and "1 stages did not pass" in ran.stdout, ran.stdout + ran.stderr
    found = rows(tmp_path / "results")
    assert list(found)[: len(FIRST)] == FIRST and list(found)[-len(LAST) :] == LAST
    assert sorted(found.keys() - {*FIRST, *LAST}) == TESTS
    assert found.pop("step") == ("failed (1)", "1 failed, 3 passed")
    assert {result for result, _ in found.values()} == {"passed"}
    assert found["build"][1] == "built for 9.0a and v4" and found["racecheck"][1].startswith("checked by racecheck")
    summary = (tmp_path / "results" / "gpu_check.md").read_text()
    assert "NVIDIA H200" in summary and 'table of {"rows": []}' in summary
    log = (tmp_path / "results" / "gpu_check.log").read_text()
    assert re.search(r"\n== timing: .*\ntimed\n", log) and log.count("\n== ") == len([*FIRST, *TESTS, *LAST])


def test_reports_the_commit_from_the_environment(machine, tmp_path):
    """For a machine without git."""
    run(machine | {"COMMIT": "0123abc"})
    assert "commit 0123abc" in (tmp_path / "results" / "gpu_check.md").read_text()


def test_results_survive_a_timeout(machine, tmp_path):
    """Also: OUT is relative to the working directory of the caller."""
    ran = run(machine | {"FAKE_SECONDS": "60", "GPU_CHECK_SECONDS": "3"}, "out", cwd=tmp_path)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    found = rows(tmp_path / "out")
    assert found["timing"][0].startswith("timed out after") and found["memcheck"][0] == "not run: no time left"
    assert (tmp_path / "out" / "ops.json").read_text() == '{"rows": []}\n'


def test_record_of_an_earlier_run_is_not_resumed(machine, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "ops.json").write_text("earlier")
    run(machine | {"GPU_CHECK_SECONDS": "0"})
    assert not (tmp_path / "results" / "ops.json").exists()
    assert {result for result, _ in rows(tmp_path / "results").values()} == {"not run: no time left"}


def test_without_a_gpu_it_reports_and_exits_2(machine, tmp_path):
    ran = run(machine | {"FAKE_FACTS": ""}, tmp_path / "out")
    assert ran.returncode == 2 and "sees no GPU" in ran.stderr and not (tmp_path / "out").exists()


def test_dry_run_prints_every_stage_and_runs_none(machine, tmp_path):
    ran = run(machine | {"FAKE_FACTS": ""}, "--dry-run", tmp_path / "out")
    assert ran.returncode == 0 and not (tmp_path / "out").exists()
    limits = {name: int(seconds) for name, seconds in re.findall(r"^(\S+) +at most +(\d+) s", ran.stdout, re.MULTILINE)}
    assert limits.keys() == {*FIRST, *TESTS, *LAST}
    assert sum(limits[name] for name in (*FIRST, *TESTS)) < TOTAL and sum(limits.values()) < 1.6 * TOTAL
    assert all(f"--tool {tool}" in ran.stdout for tool in LAST[2:])


def test_help_prints_the_header_of_the_script():
    ran = run(os.environ, "--help")
    assert ran.returncode == 0 and "--dry-run" in ran.stdout and "#" not in ran.stdout
    assert run(os.environ, "--fast").returncode == 2
