"""A conversion that is killed again and again, anywhere and inside writes, ends in the files of one that never was."""

import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
from halo_tiny import config_tree, write_inputs

from halo.config import make_config
from halo.pipeline import Pipeline

MAX_BYTES = 100_000  # more than any file of these runs


def tree_of(directory, out):
    tree = config_tree(directory, out) | {"threads": 1, "precision": "fp32"}
    for name in ("align", "distill", "finetune"):
        tree[name] = tree[name] | {"steps": 5, "checkpoint_every": 2}
    tree["data"]["workers"] = 1
    tree["eval"] = {"length": 160, "multiples": [1], "recall_samples": 2, "text_tokens": 160}
    return tree


def convert(directory, out, plan):
    """Run a conversion in a child process that is killed as planned; return whether it ended by itself."""
    child = os.fork()
    if child == 0:
        try:
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            plan.arm(directory / out)
            Pipeline(make_config(tree_of(directory, out))).run()
        except BaseException:  # a child must never return into pytest
            (directory / f"{out}.failed").write_text(repr(sys.exception()))
            os._exit(1)
        os._exit(0)
    plan.watch(child)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status):
        failure = directory / f"{out}.failed"
        assert os.WEXITSTATUS(status) == 0, failure.read_text()
        return True
    return False


class AtTime:
    """A kill some seconds after the start."""

    def __init__(self, seconds):
        self.seconds = seconds

    def arm(self, out):
        pass

    def watch(self, child):
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)


class AtCall:
    """A kill just before the n-th call that opens, renames, makes or removes a file of the run."""

    EVENTS = frozenset(("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"))

    def __init__(self, number):
        self.number = number

    def arm(self, out):
        seen = [0]

        def hook(event, arguments):
            if event in self.EVENTS and str(arguments[0]).startswith(str(out)):
                seen[0] += 1
                if seen[0] == self.number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    def watch(self, child):
        pass


class InWrite:
    """A kill inside the first write that makes any file longer than so many bytes."""

    def __init__(self, size):
        self.size = size

    def arm(self, out):
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))

    def watch(self, child):
        pass


class Never(AtCall):
    def __init__(self):
        super().__init__(-1)


def results(out):
    """Return the content of everything that a conversion leaves, without times."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if not path.is_file() or path.suffix == ".png" or name in (".lock", "report.md", "config.yaml"):
            continue
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            timeless = [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]
            found[name] = json.dumps(timeless)
        elif path.name == "done.json":
            found[name] = json.dumps(json.loads(path.read_text())["settings"])
        else:
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    directory = tmp_path_factory.mktemp("kills")
    write_inputs(directory)
    began = time.monotonic()
    assert convert(directory, "whole", Never())
    return directory, results(directory / "whole"), time.monotonic() - began


@pytest.mark.parametrize("kills", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_ends_the_same(reference, kills):
    directory, expected, seconds = reference
    assert len(expected) > 20
    rng = random.Random(kills)
    killed = number = 0
    while killed < kills:
        out = f"run-{kills}-{number}"
        number += 1
        for _ in range(4):
            plan = rng.choice(
                [AtTime(rng.uniform(0, seconds)), AtCall(rng.randint(1, 160)), InWrite(rng.randint(0, MAX_BYTES))]
            )
            if convert(directory, out, plan):
                break
            killed += 1
        assert convert(directory, out, Never())
        found = results(Path(directory, out))
        assert found.keys() == expected.keys()
        assert not [name for name in expected if found[name] != expected[name]]
    print(f"{killed} kills in {number} runs")
