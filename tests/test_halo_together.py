"""Several conversions at the same time: all finish, or all stop, and the reason is said."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from halo.demo.together import run_together
from halo.errors import HaloError
from halo.progress import say


def paths(directory):
    return {name: directory / name for name in "ab"}


def greet(path):
    """Print a line once the other process is there too, which only happens if both run at the same time."""
    path.mkdir()
    other = path.with_name("b" if path.name == "a" else "a")
    while not other.exists():
        time.sleep(0.01)
    say(f"works in {path.name}")


def fail_or_wait(path):
    if path.name == "a":
        raise HaloError("teacher: must exist")
    time.sleep(600)


def wait_to_be_stopped(path):
    path.mkdir()
    (path / "process").write_text(str(os.getpid()))
    time.sleep(600)


def start_two(directory):
    """Run two of the last in a process of their own, and return it and their numbers when they have started."""
    here = Path(__file__)
    program = f"""
from pathlib import Path
from {here.stem} import paths, run_together, wait_to_be_stopped
if __name__ == "__main__":
    run_together(wait_to_be_stopped, paths(Path({str(directory)!r})))
"""
    (directory / "program.py").write_text(program)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here.parent), str(here.parents[1])])}
    process = subprocess.Popen([sys.executable, directory / "program.py"], env=environment, stderr=subprocess.PIPE)
    files = [directory / name / "process" for name in "ab"]
    while not all(file.is_file() and file.read_text() for file in files):
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.05)
    return process, [int(file.read_text()) for file in files]


def ended(number):
    """Wait for the end of a process that is not a child of this one."""
    for _ in range(400):
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return True
        if "Z" in Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1][:3]:
            return True
        time.sleep(0.05)
    return False


def test_all_run_at_the_same_time_and_each_line_says_whose_it_is(tmp_path, capfd):
    run_together(greet, paths(tmp_path))
    assert sorted(capfd.readouterr().out.splitlines()) == ["a: works in a", "b: works in b"]


def test_one_that_fails_stops_the_others(tmp_path, capfd):
    with pytest.raises(HaloError, match=r"^a: failed, for the reason printed above$"):
        run_together(fail_or_wait, paths(tmp_path))
    assert capfd.readouterr().err == "halo: a: teacher: must exist\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_all_stop_with_the_process_that_started_them(tmp_path, number):
    process, children = start_two(tmp_path)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1].decode()
    assert process.returncode and all(ended(child) for child in children)
    if number != signal.SIGKILL:
        assert "a, b: stopped and saved; the same command continues" in error
